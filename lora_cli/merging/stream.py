"""Merge by streaming: plan the merged model's tensors, then read, merge and write the safetensors one at a time."""

import math
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
from lora_cli.model.checkpoint_reader import CheckpointReader, Transforms, has_new_rows
from lora_cli.model.conversion import CheckpointMapping
from lora_cli.model.empty_base import EmptyModel
from lora_cli.model.safetensors_io import ShardFiles, TensorInfo, plan_shards

Job = Callable[[], list[MergedTensor]]


class MergePlan(NamedTuple):
    """The tensors of the merged model, and where each comes from.

    A parameter has a name in the model, a tensor has a key in the checkpoint; `mapping` maps one to the other.
    """

    base: dict[str, TensorInfo]  # the base's tensors, by key
    mapping: CheckpointMapping  # of the base
    deltas: Deltas
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape in the merged checkpoint, by key
    output_keys: dict[str, str]  # by name, the key that a changed parameter is written to; joined parameters left out
    base_keys: dict[str, str]  # by name, the key in the base that the parameter is read from; joined ones left out
    tied: tuple[tuple[str, ...], ...]  # names of the base's parameters that are one tensor
    shapes: dict[str, tuple[int, ...]]  # of the base's parameters in the model, by name
    untied: tuple[str, ...]  # names of parameters that were tied in the base and are not tied in the merged model
    dropped: tuple[str, ...]  # keys of the base that the model does not use

    @property
    def size(self) -> int:
        """Bytes of all tensors of the merged model."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.tensors.values())

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtype that each parameter of the merged model is stored in, by name."""
        dtypes = {name: self.tensors[parts[0].key][0] for name, parts in self.mapping.parts.items()}
        dtypes |= {name: self.tensors[key][0] for name, key in self.base_keys.items() if key in self.tensors}
        return dtypes | {name: self.tensors[key][0] for name, key in self.output_keys.items()}

    def dtype_name(self, name: str) -> str:
        """Return the dtype of one parameter as text, such as `bfloat16`."""
        return str(self.dtypes()[name]).removeprefix("torch.")

    def irreversible_changes(self) -> list[str]:
        """Return the names that cannot be unmerged: layers changed by more than a low-rank sum, replaced parameters."""
        layers = [layer.name for layer in self.deltas.layers if low_rank_delta(layer) is None or layer.from_adapter]
        return [*layers, *self.deltas.replaced]


def plan_merge(
    empty: EmptyModel,
    mapping: CheckpointMapping,
    base: dict[str, TensorInfo],
    *,
    dtype: torch.dtype | None,
    keep_unknown: bool,
) -> MergePlan:
    """Plan the tensors of the merged model.

    Args:
        empty: the base without weights, with the adapter attached.
        mapping: of the base's checkpoint.
        base: tensors of the base's checkpoint, by key.
        dtype: of the floating-point tensors of the merged model; None to keep the dtype of each.
        keep_unknown: whether to copy tensors of the checkpoint that the model does not use.

    Raises:
        LoraError: the base's checkpoint lacks a tensor, or one has another shape than the base's config requires.
    """
    deltas = find_deltas(empty)
    model = empty.model.get_base_model()
    shapes = empty.shapes
    base_keys = mapping.keys(empty.tied)
    changed = {full_name for layer in deltas.layers for full_name in layer.full_names()} | deltas.replaced.keys()
    for name, shape in shapes.items():
        if name not in base_keys:
            if name not in mapping.parts and name not in changed:
                raise LoraError(
                    f"model.path: the checkpoint has no weights for {name}", hint="use a complete checkpoint"
                )
            continue
        stored_shape = base[base_keys[name]].shape
        if stored_shape != shape and not has_new_rows(stored_shape, shape) and name not in deltas.replaced:
            raise LoraError(
                f"model.path: {base_keys[name]} is {_shape_text(stored_shape)} in the checkpoint "
                f"and {_shape_text(shape)} by its config",
                hint="fetch the model again, or use another one",
            )
        if stored_shape != shape and name not in changed:
            owner, _, key = name.rpartition(".")
            layer = AdaptedLayer(owner, model.get_submodule(owner), (key,), frozenset(), ())
            deltas = deltas._replace(layers=(*deltas.layers, layer))
            changed.add(name)
    sizes: Counter[torch.dtype] = Counter()
    for stored in base.values():
        sizes[stored.dtype] += stored.size
    main_dtype = sizes.most_common(1)[0][0]  # a head that the base lacks is written in the dtype of most of its bytes

    def output_dtype(stored: torch.dtype) -> torch.dtype:
        return dtype if dtype is not None and stored.is_floating_point and stored.itemsize > 1 else stored

    kept = {key: stored for key, stored in base.items() if keep_unknown or key not in set(mapping.unknown)}
    tensors = {key: (output_dtype(stored.dtype), stored.shape) for key, stored in kept.items()}
    still_tied = [group for group in empty.tied if _stays_tied(group, deltas, changed)]
    # Of parameters that stay tied, only those in the base's checkpoint are written: loading ties the others to them.
    not_written = {name for group in still_tied for name in group if name not in mapping.parts}
    output_keys = {}
    for name in sorted(changed - not_written):
        if mapping.is_joined(name):
            continue
        output_keys[name] = mapping.key(name) if name in mapping.parts else name
        shape = shapes.get(name) or tuple(deltas.replaced[name].shape)
        stored_dtype = base[base_keys[name]].dtype if name in base_keys else main_dtype
        tensors[output_keys[name]] = (output_dtype(stored_dtype), shape)
    untied = [name for group in empty.tied if group not in still_tied and changed & set(group) for name in group]
    for name in untied:
        tensors.setdefault(mapping.key(name) if name in mapping.parts else name, tensors[base_keys[name]])
    dropped = tuple(sorted(base.keys() - kept.keys()))
    return MergePlan(base, mapping, deltas, tensors, output_keys, base_keys, empty.tied, shapes, tuple(untied), dropped)


def _stays_tied(group: tuple[str, ...], deltas: Deltas, changed: set[str]) -> bool:
    """Return whether the adapter changes all parameters of a tied group, and in the same way."""
    return changed.issuperset(group) and len(set(group) - deltas.changed_together) <= 1


def write_merged(
    plan: MergePlan,
    folder: Path,
    *,
    max_shard_size: int,
    transforms: Transforms,
    sign: int = 1,
) -> list[MergedTensor]:
    """Write the tensors of the merged model into `folder`, and return the parameters that the adapter changed.

    Args:
        plan: of the merged model.
        folder: of the merged model.
        max_shard_size: bytes of a file; a larger tensor has a file of its own.
        transforms: by parameter name, a function for the base's weight before the update is added; it keeps the shape.
        sign: 1 to merge, -1 to unmerge (subtract the low-rank updates).

    Raises:
        LoraError: a tensor of the base is not finite.
        ValueError: a merged weight is not finite.
    """
    with ShardFiles(writable=False) as sources, ShardFiles(writable=True) as targets:
        outputs = plan_shards(plan.tensors, folder, targets, max_size=max_shard_size)
        reader = CheckpointReader(
            plan.base, plan.mapping, sources, tied=plan.tied, shapes=plan.shapes, transforms=transforms
        )
        merge_jobs = _MergeJobs(plan, outputs, ReadWrite(sources, targets), reader, transforms, sign)
        with targets.background_fsync():
            return list(merge_tensors.run_jobs(merge_jobs.jobs()))


class _MergeJobs:
    """The jobs that write one merged model, and the state that they share."""

    def __init__(
        self,
        plan: MergePlan,
        outputs: dict[str, TensorInfo],
        files: ReadWrite,
        reader: CheckpointReader,
        transforms: Transforms,
        sign: int,
    ) -> None:
        self.plan, self.outputs, self.files, self.reader = plan, outputs, files, reader
        self.transforms, self.sign = transforms, sign

    def jobs(self) -> list[Job]:
        """Return one job for each changed layer or replaced tensor, and one for each tensor that is only copied.

        Large tensors come first. Consecutive jobs write to different files where possible, because two threads that
        write to the same file wait for each other.
        """
        done: set[str] = set()
        jobs_by_file: dict[Path, list[tuple[int, Job]]] = defaultdict(list)

        def add(keys: Sequence[str], job: Job) -> None:
            done.update(keys)
            targets = [self.outputs[key] for key in keys]
            jobs_by_file[targets[0].file].append((sum(target.size for target in targets), job))

        for layer in self.plan.deltas.layers:
            keys = [key for name in layer.full_names() for key in self._keys(name)]
            if keys:
                add(keys, partial(self._merge_layer, layer))
        for name, value in self.plan.deltas.replaced.items():
            if name in self.plan.output_keys:
                add([self.plan.output_keys[name]], partial(self._replace, name, value))
        for name in self.transforms:  # parameters that only change by quantization, from several tensors each
            keys = self._keys(name) if self.plan.mapping.is_joined(name) else []
            if keys and done.isdisjoint(keys):
                add(keys, partial(self._transform_joined, name))
        names_by_key = {key: name for name, key in self.plan.base_keys.items()}
        for key, target in self.outputs.items():
            if key not in done:
                # A key that the base lacks is an untied parameter: it is copied from the one that it was tied to.
                source = self.plan.base[key if key in self.plan.base else self.plan.base_keys[key]]
                name = names_by_key.get(key, key)
                copy: Job = partial(self.files.copy, name, source, target)
                add([key], partial(self._transform, name, target) if name in self.transforms else copy)
        queues = [sorted(jobs, key=lambda sized: -sized[0]) for jobs in jobs_by_file.values()]
        return [sized[1] for turn in zip_longest(*queues) for sized in turn if sized is not None]

    def _keys(self, name: str) -> list[str]:
        """Return the keys that a changed parameter is written to."""
        mapping = self.plan.mapping
        if mapping.is_joined(name):
            return [part.key for part in mapping.parts[name]]
        return [self.plan.output_keys[name]] if name in self.plan.output_keys else []

    def _merge_layer(self, layer: AdaptedLayer) -> list[MergedTensor]:
        low_rank = low_rank_delta(layer)
        name = layer.full_name("weight")
        in_blocks = low_rank is not None and not self.plan.mapping.is_joined(name) and name not in self.transforms
        source = self.plan.base.get(self.plan.base_keys.get(name, ""))
        if not in_blocks or source is None or source.shape != tuple(layer.module.get_parameter("weight").shape):
            return merge_tensors.merge_layer(layer, read=self._read, write=self._write, dtype_of=self._dtype)
        assert low_rank is not None
        target = self.outputs[self.plan.output_keys[name]]
        merged = self.files.merge_low_rank(name, low_rank, source, target, sign=self.sign)
        for parameter, full_name in zip(layer.parameter_names, layer.full_names(), strict=True):
            if parameter in layer.from_adapter:
                merged += self._replace(full_name, layer.module.get_parameter(parameter).data)
            elif parameter != "weight":
                source = self.plan.base[self.plan.base_keys[full_name]]
                self.files.copy(full_name, source, self.outputs[self.plan.output_keys[full_name]])
        return merged

    def _replace(self, name: str, value: Tensor) -> list[MergedTensor]:
        """Write a parameter from the adapter file, and measure the change if the base has one of the same shape."""
        self._write(name, value)
        source = self.plan.base.get(self.plan.base_keys.get(name, ""))
        if source is None or source.shape != value.shape or not value.is_floating_point():
            return []
        return merge_tensors.measure_retention(name, self._read(name), value.float(), self._dtype(name))

    def _transform(self, name: str, target: TensorInfo) -> list[MergedTensor]:
        self.files.write(self._read_finite(name), target)
        return []

    def _transform_joined(self, name: str) -> list[MergedTensor]:
        self._write(name, self._read(name))
        return []

    def _read(self, name: str) -> Tensor:
        """Read a parameter of the base as fp32, in its shape in the merged model."""
        return self._read_finite(name).float()

    def _read_finite(self, name: str) -> Tensor:
        """Read a parameter of the base, and check that it is finite."""
        value = self.reader.read(name)
        merge_tensors.check_finite(name, value, self.plan.base[self.reader.keys_of(name)[0]])
        return value

    def _write(self, name: str, value: Tensor) -> None:
        """Write a merged parameter, unless it stays tied to one that is written."""
        for key, tensor in self.plan.mapping.to_checkpoint(name, value).items():
            output_key = key if self.plan.mapping.is_joined(name) else self.plan.output_keys.get(name)
            if output_key is not None:
                self.files.write(tensor, self.outputs[output_key])

    def _dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a parameter is written in; fp32 if it is not written."""
        keys = self._keys(name)
        return self.outputs[keys[0]].dtype if keys else torch.float32


def _shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


class Difference(NamedTuple):
    """The difference between the weights of two checkpoints."""

    equal_share: float  # share of the weights that are equal
    max_ulps: float  # largest difference of a weight, in units in the last place (see `compare_files`)
    worst_tensor: str  # key of the tensor with the largest difference


@torch.no_grad()
def compare_files(
    actual: dict[str, TensorInfo], expected: dict[str, TensorInfo], *, merged: dict[str, TensorInfo]
) -> Difference:
    """Compare the floating-point tensors of two checkpoints that have the same key and shape.

    Merging and unmerging rounds a weight at its merged value. The unit of a difference is therefore one unit in the
    last place of the largest of the three values.

    Args:
        actual: tensors after unmerging, by key.
        expected: tensors of the original base.
        merged: tensors of the merged model, which were unmerged.
    """
    equal = total = 0
    worst = (0.0, "none")
    with ShardFiles(writable=False) as files:
        for key, info in actual.items():
            expected_info = expected.get(key)
            merged_info = merged.get(key)
            if (
                expected_info is None
                or merged_info is None
                or expected_info.shape != info.shape
                or not info.dtype.is_floating_point
            ):
                continue
            a, b, c = (files.read_tensor(each).float().view(-1) for each in (info, expected_info, merged_info))
            equal, total = equal + int((a == b).sum()), total + a.numel()
            largest = torch.maximum(torch.maximum(a.abs(), b.abs()), c.abs())
            ulp = torch.finfo(info.dtype).eps * largest.clamp_min(torch.finfo(info.dtype).tiny)
            worst = max(worst, (float(((a - b).abs() / ulp).max()) if a.numel() else 0.0, key))
    return Difference(equal / max(1, total), *worst)
