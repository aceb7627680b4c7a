"""From the files of a base to the files of base and adapter: which tensors there will be, and the work of each."""

import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_cli.errors import LoraError
from lora_cli.merging import merge_tensors
from lora_cli.merging.deltas import AdaptedLayer, Deltas, find_deltas, low_rank_delta
from lora_cli.merging.merge_tensors import MergedTensor, ReadWrite
from lora_cli.model.conversion import CheckpointMapping
from lora_cli.model.empty_base import EmptyModel
from lora_cli.model.safetensors_io import ShardFiles, TensorInfo, plan_shards

Job = Callable[[], list[MergedTensor]]


class MergePlan(NamedTuple):
    """What is to be written."""

    base: dict[str, TensorInfo]  # the base's tensors, by their names in the checkpoint
    mapping: CheckpointMapping
    changes: Deltas
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]  # of the merged model, by their names in its checkpoint
    names: dict[str, str]  # of a changed parameter that stands alone, the tensor that it becomes
    origins: dict[str, str]  # of a parameter, the tensor of the base that it comes from, if it is one
    untied: tuple[str, ...]  # parameters that were one with another, and are not any more
    dropped: tuple[str, ...]  # tensors that the model has no use for

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.tensors.values())

    def dtypes(self) -> dict[str, torch.dtype]:
        """What each parameter of the merged model is stored in, by its name in the model."""
        found = {name: self.tensors[parts[0].key][0] for name, parts in self.mapping.parts.items()}
        found |= {name: self.tensors[key][0] for name, key in self.origins.items() if key in self.tensors}
        return found | {name: self.tensors[key][0] for name, key in self.names.items()}

    def dtype_of(self, name: str) -> str:
        """The same of one parameter, as people write it."""
        return str(self.dtypes()[name]).removeprefix("torch.")

    def not_added(self) -> list[str]:
        """What the adapter changes otherwise than by a sum of low rank, or nothing of it is left to see."""
        layers = [layer.name for layer in self.changes.layers if low_rank_delta(layer) is None or layer.brought]
        return [*layers, *self.changes.replaced]


def plan_merge(
    empty: EmptyModel,
    mapping: CheckpointMapping,
    base: dict[str, TensorInfo],
    *,
    dtype: torch.dtype | None,
    keep_unknown: bool,
) -> MergePlan:
    """What the merged model consists of.

    Args:
        hollow: the base's shapes with the adapter on them.
        layout: of the base's checkpoint.
        base: its tensors.
        dtype: that floating tensors are written in; None for what each is in.
        keep_unknown: whether tensors that the model does not know stay.

    Raises:
        LoraError: the base's files are not of the shapes that its config tells, or lack tensors.
    """
    changes = find_deltas(empty)
    model = empty.model.get_base_model()
    shapes = empty.shapes
    origins = {name: parts[0].key for name, parts in mapping.parts.items() if not mapping.is_joined(name)}
    for group in empty.ties:
        held = [origins[name] for name in group if name in origins]
        origins |= {name: held[0] for name in group if held and name not in origins}
    changed = {layer.full(key) for layer in changes.layers for key in layer.keys} | changes.replaced.keys()
    for name, shape in shapes.items():
        if name not in origins:
            if name not in mapping.parts and name not in changed:
                raise LoraError(f"model.path: the checkpoint has no weights for {name}", hint="give a whole model")
            continue
        there = base[origins[name]].shape
        if there != shape and not _has_new_rows(there, shape) and name not in changes.replaced:
            raise LoraError(
                f"model.path: {origins[name]} is {_shape_text(there)} in the checkpoint "
                f"and {_shape_text(shape)} by its config",
                hint="fetch the model again, or give another one",
            )
        if there != shape and name not in changed:
            owner, _, key = name.rpartition(".")
            layer = AdaptedLayer(owner, model.get_submodule(owner), (key,), frozenset(), ())
            changes = changes._replace(layers=(*changes.layers, layer))
            changed.add(name)
    sizes: Counter[torch.dtype] = Counter()
    for stored in base.values():
        sizes[stored.dtype] += stored.size
    main = sizes.most_common(1)[0][0]  # what a new head is written in

    def written(stored: torch.dtype) -> torch.dtype:
        return dtype if dtype is not None and stored.is_floating_point and stored.itemsize > 1 else stored

    kept = {key: stored for key, stored in base.items() if keep_unknown or key not in set(mapping.unknown)}
    tensors = {key: (written(stored.dtype), stored.shape) for key, stored in kept.items()}
    together = [group for group in empty.ties if _stays_tied(group, changes, changed)]
    # Of parameters that stay tied, those that the checkpoint has are written; the others are read from them.
    follow = {name for group in together for name in group if name not in mapping.parts}
    names = {}
    for name in sorted(changed - follow):
        if mapping.is_joined(name):
            continue
        names[name] = mapping.key(name) if name in mapping.parts else name
        shape = shapes.get(name) or tuple(changes.replaced[name].shape)
        tensors[names[name]] = (written(base[origins[name]].dtype if name in origins else main), shape)
    untied = [name for group in empty.ties if group not in together and changed & set(group) for name in group]
    for name in untied:
        tensors.setdefault(mapping.key(name) if name in mapping.parts else name, tensors[origins[name]])
    return MergePlan(
        base, mapping, changes, tensors, names, origins, tuple(untied), tuple(sorted(base.keys() - kept.keys()))
    )


def _stays_tied(group: tuple[str, ...], changes: Deltas, changed: set[str]) -> bool:
    """Whether the adapter changes all of the parameters that are tied, and all alike."""
    return changed.issuperset(group) and len(set(group) - changes.together) <= 1


def write_merged(
    plan: MergePlan, folder: Path, *, largest: int, transform: dict[str, Callable[[Tensor], Tensor]], sign: int = 1
) -> list[MergedTensor]:
    """Write the merged tensors into `folder`.

    Args:
        plan: what they are.
        folder: where they go.
        largest: bytes of a file, where a tensor is not larger.
        transform: by the parameter's name, what is to be done to weights of the base first.
        sign: -1 to take low-rank updates away instead.

    Raises:
        LoraError: too little room on the disk.
        ValueError: a merged weight that is not finite.
    """
    free = shutil.disk_usage(folder).free
    if free < plan.size:
        raise LoraError(
            f"{folder.parent}: the model takes {plan.size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free",
            hint="make room, or name a place on another disk",
            exit_code=1,
        )
    with ShardFiles(writable=False) as sources, ShardFiles(writable=True) as targets:
        placed = plan_shards(plan.tensors, folder, targets, largest=largest)
        for stored in plan.base.values():
            sources.open(stored.file)
        work = _MergeJobs(plan, placed, ReadWrite(sources, targets), transform, sign)
        with targets.flushed():
            return list(merge_tensors.run_jobs(work.jobs()))


class _MergeJobs:  # what the jobs of one model share
    def __init__(
        self,
        plan: MergePlan,
        placed: dict[str, TensorInfo],
        pair: ReadWrite,
        transform: dict[str, Callable[[Tensor], Tensor]],
        sign: int,
    ) -> None:
        self.plan, self.placed, self.pair, self.transform, self.sign = plan, placed, pair, transform, sign

    def jobs(self) -> list[Job]:
        """One for each changed layer, and one for each tensor that is not in any.

        Large ones first, and neighbours for different files: two threads that write into one wait for each other.
        """
        done: set[str] = set()
        found: dict[Path, list[tuple[int, Job]]] = defaultdict(list)

        def add(keys: Sequence[str], job: Job) -> None:
            done.update(keys)
            targets = [self.placed[key] for key in keys]
            found[targets[0].file].append((sum(target.size for target in targets), job))

        for layer in self.plan.changes.layers:
            keys = [key for name in map(layer.full, layer.keys) for key in self._keys(name)]
            if keys:
                add(keys, partial(self._layer, layer))
        for name, value in self.plan.changes.replaced.items():
            if name in self.plan.names:
                add([self.plan.names[name]], partial(self._replace, name, value))
        parameters = {key: name for name, key in self.plan.origins.items()}
        for key, target in self.placed.items():
            if key not in done:
                # One that the base has not is the untied end of one that it has.
                source = self.plan.base[key if key in self.plan.base else self.plan.origins[key]]
                name = parameters.get(key, key)
                copy: Job = partial(self.pair.copy, source, target)
                add([key], partial(self._transformed, name, source, target) if name in self.transform else copy)
        queues = [sorted(jobs, key=lambda sized: -sized[0]) for jobs in found.values()]
        return [sized[1] for turn in zip_longest(*queues) for sized in turn if sized is not None]

    def _keys(self, name: str) -> list[str]:
        mapping = self.plan.mapping
        if mapping.is_joined(name):
            return [part.key for part in mapping.parts[name]]
        return [self.plan.names[name]] if name in self.plan.names else []

    def _layer(self, layer: AdaptedLayer) -> list[MergedTensor]:
        low = low_rank_delta(layer)
        name = layer.full("weight")
        plain = low is not None and not self.plan.mapping.is_joined(name) and name not in self.transform
        source = self.plan.base.get(self.plan.origins.get(name, ""))
        if not plain or source is None or source.shape != tuple(layer.module.get_parameter("weight").shape):
            return merge_tensors.merge_layer(layer, read=self._read, write=self._write, dtype_of=self._dtype)
        assert low is not None
        found = self.pair.fold_low_rank(name, low, source, self.placed[self.plan.names[name]], sign=self.sign)
        for key in layer.keys:
            full = layer.full(key)
            if key in layer.brought:
                found += self._replace(full, layer.module.get_parameter(key).data)
            elif key != "weight":
                self.pair.copy(self.plan.base[self.plan.origins[full]], self.placed[self.plan.names[full]])
        return found

    def _replace(self, name: str, value: Tensor) -> list[MergedTensor]:
        """A tensor that the adapter brings; measured where the base has one in its place."""
        self._write(name, value)
        source = self.plan.base.get(self.plan.origins.get(name, ""))
        if source is None or source.shape != value.shape or not value.is_floating_point():
            return []
        return merge_tensors.measure_retention(name, self._read(name), value.float(), self._dtype(name))

    def _transformed(self, name: str, source: TensorInfo, target: TensorInfo) -> list[MergedTensor]:
        self.pair.write(self.transform[name](self.pair.read(source)), target)
        return []

    def _read(self, name: str) -> Tensor:
        """A parameter of the base, fp32, in the shape that the merged model has."""
        if self.plan.mapping.is_joined(name):
            value = self.plan.mapping.to_parameter(name, lambda key: self.pair.read(self.plan.base[key]))
        else:
            value = self.pair.read(self.plan.base[self.plan.origins[name]])
            rows = self.plan.tensors[self.plan.names.get(name, self.plan.origins[name])][1]
            if _has_new_rows(tuple(value.shape), rows):
                return merge_tensors.add_rows(value.float(), rows[0])
        if name in self.transform:
            value = self.transform[name](value)
        return value.float()

    def _write(self, name: str, value: Tensor) -> None:
        for key, part in self.plan.mapping.to_checkpoint(name, value).items():
            where = key if self.plan.mapping.is_joined(name) else self.plan.names.get(name)
            if where is not None:
                self.pair.write(part, self.placed[where])

    def _dtype(self, name: str) -> torch.dtype:
        keys = self._keys(name)
        return self.placed[keys[0]].dtype if keys else torch.float32


def _has_new_rows(stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(stored) == len(wanted) and stored[1:] == wanted[1:] and stored[0] < wanted[0]


def _shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


class Difference(NamedTuple):
    """How two files' weights differ."""

    equal: float  # share of the weights
    roundings: float  # largest difference, in units in the last place of the largest of the weight's three values
    worst: str  # the tensor that has it


@torch.no_grad()
def compare_files(
    found: dict[str, TensorInfo], expected: dict[str, TensorInfo], *, between: dict[str, TensorInfo]
) -> Difference:
    """Compare all floating tensors of the same name and shape, each as a whole.

    A weight that went through another value, `between`, was rounded there: that is the unit it may be off by.
    """
    equal = total = 0
    worst = (0.0, "none")
    with ShardFiles(writable=False) as files:
        for name, one in found.items():
            other = expected.get(name)
            middle = between.get(name)
            if other is None or middle is None or other.shape != one.shape or not one.dtype.is_floating_point:
                continue
            a, b, c = (ReadWrite(files, files).read(side).float().view(-1) for side in (one, other, middle))
            equal, total = equal + int((a == b).sum()), total + a.numel()
            unit = torch.finfo(one.dtype).eps * torch.maximum(torch.maximum(a.abs(), b.abs()), c.abs()).clamp_min(
                torch.finfo(one.dtype).tiny
            )
            worst = max(worst, (float(((a - b).abs() / unit).max()) if a.numel() else 0.0, name))
    return Difference(equal / max(1, total), *worst)
