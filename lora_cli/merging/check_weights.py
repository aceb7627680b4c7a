"""Check every weight of a merged model, read back from its files: it must be PEFT's merge, rounded once.

A weight that the adapter does not change must have the bits of the base's. LoRA's update is computed in blocks of rows,
by PEFT, from slices of its factors. The other methods merge one full layer at a time.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from lora_cli.merging.deltas import AdaptedLayer, find_deltas, low_rank_delta, merge_by_peft
from lora_cli.merging.streamed_models import AdaptedModel, MergedModel, Streams
from lora_cli.model.checkpoint_reader import CheckpointReader, row_blocks
from lora_cli.model.empty_base import drop_weights, load_weights
from lora_cli.model.safetensors_io import ShardFiles, TensorInfo
from lora_cli.model.streamed_weights import find_slots

NOT_IN_BASE = "is neither in the base nor in the adapter"
SUMMATION_ERROR = 1e-5  # of fp32 sums in another order, relative to the largest weight of a block

Rows = Callable[[slice], Tensor]  # returns some rows of a tensor


class Mismatch(NamedTuple):
    """A tensor of the merged model that is wrong."""

    name: str  # of the parameter; of a tensor that the model does not use, its key
    found: str  # what is wrong, for the user


class Check(NamedTuple):
    """The check of a few tensors of the merged model."""

    weights: int  # that it reads
    find: Callable[[], list[Mismatch]]

    @torch.no_grad()  # gradients are enabled in each thread
    def run(self) -> list[Mismatch]:
        """Return the wrong tensors."""
        return self.find()


def mismatches(adapted: AdaptedModel, merged: MergedModel, streams: Streams) -> Iterator[Mismatch]:
    """Yield the wrong tensors of a merged model.

    Args:
        adapted: base and adapter. Do not run it afterwards: PEFT merges its layers.
        merged: the merged model.
        streams: of both.

    Raises:
        ValueError: a merged weight is not finite.
    """
    checks = sorted(_checks(adapted, merged, streams.files), key=lambda check: -check.weights)
    for found in streams.pool.map(Check.run, checks):
        yield from found


def _checks(adapted: AdaptedModel, merged: MergedModel, files: ShardFiles) -> Iterator[Check]:
    """Yield a check of each changed layer, each other parameter, and each tensor that the model does not use."""
    base, written = adapted.reader, merged.reader
    deltas = find_deltas(adapted.empty)
    slots = find_slots(merged.model)
    done: set[str] = set()  # keys of the merged checkpoint

    def are_new(names: list[str]) -> bool:
        """Return whether the parameters are not tied to ones that are checked."""
        keys = {key for name in names for key in written.keys_of(name)}
        new = not done.issuperset(keys)
        done.update(keys)
        return new

    for layer in deltas.layers:
        if are_new(layer.full_names()):
            weights = sum(layer.module.get_parameter(name).numel() for name in layer.parameter_names)
            yield Check(weights, partial(_check_layer, layer, base, written, files))
    for name, value in deltas.replaced.items():
        if are_new([name]):
            yield Check(value.numel(), partial(_check_values, name, value, written))
    for name, slot in slots.items():
        if not written.has(name):
            yield Check(0, partial(list, [Mismatch(name, "is missing")]))
        elif are_new([name]):
            yield Check(slot.value.numel(), partial(_check_unchanged, name, base, written, files))
    for key, target in written.tensors.items():
        if key not in done:
            yield Check(target.size, partial(_check_copy, key, base.tensors.get(key), target, files))


def _check_layer(
    layer: AdaptedLayer, base: CheckpointReader, written: CheckpointReader, files: ShardFiles
) -> list[Mismatch]:
    name = layer.full_name("weight")
    if low_rank_delta(layer) is None or base.stored(name) is None:
        return _check_merged_by_peft(layer, base, written, files)
    delta = _delta_rows(layer)

    def merged(rows: slice) -> Tensor:
        return base.read_rows(name, rows.start, rows.stop).float() + delta(rows)

    found = _compare(name, tuple(layer.module.get_parameter("weight").shape), merged, written)
    for parameter, full_name in zip(layer.parameter_names, layer.full_names(), strict=True):
        if parameter in layer.from_adapter:
            found += _check_values(full_name, layer.module.get_parameter(parameter).data, written)
        elif parameter != "weight":
            found += _check_unchanged(full_name, base, written, files)
    return found


def _delta_rows(layer: AdaptedLayer) -> Rows:
    """Return a function for rows of the update of a layer that only plain LoRA changes, as PEFT computes it, fp32."""
    (tuner,) = layer.tuners
    assert isinstance(tuner, LoraLinear | LoraEmbedding)
    (adapter,) = tuner.active_adapters
    owner: nn.Module
    if isinstance(tuner, LoraEmbedding):
        owner, key, dim = tuner.lora_embedding_A, adapter, 1  # row i is the embedding of token i: column i of A
    elif tuner.fan_in_fan_out:
        owner, key, dim = tuner.lora_A[adapter], "weight", 1
    else:
        owner, key, dim = tuner.lora_B[adapter], "weight", 0
    factor = owner.get_parameter(key).data

    def delta(rows: slice) -> Tensor:
        load_weights(owner, {key: factor.narrow(dim, rows.start, rows.stop - rows.start)})
        update: Tensor = tuner.get_delta_weight(adapter)
        load_weights(owner, {key: factor})
        return update

    return delta


def _check_merged_by_peft(
    layer: AdaptedLayer, base: CheckpointReader, written: CheckpointReader, files: ShardFiles
) -> list[Mismatch]:
    names = dict(zip(layer.parameter_names, layer.full_names(), strict=True))
    before = {key: base.read(name).float() for key, name in names.items() if key not in layer.from_adapter}
    load_weights(layer.module, before)
    merge_by_peft(layer)
    found = []
    for key, name in names.items():
        merged = layer.module.get_parameter(key).data
        if merged.ndim == 1 and base.has(name) and torch.equal(merged, base.read(name).float()):
            found += _check_unchanged(name, base, written, files)  # a bias
        else:
            found += _check_values(name, merged, written)
    drop_weights(layer.module, list(before))
    return found


def _check_unchanged(name: str, base: CheckpointReader, written: CheckpointReader, files: ShardFiles) -> list[Mismatch]:
    """Compare a parameter with that of the base, tensor by tensor, where both checkpoints store it in the same way."""
    if not base.has(name):
        return [Mismatch(name, NOT_IN_BASE)]
    sources, targets = ([reader.tensors[key] for key in reader.keys_of(name)] for reader in (base, written))
    if name in base.transforms or [each.shape for each in sources] != [each.shape for each in targets]:
        return _check_values(name, base.read(name), written)
    pairs = zip(sources, targets, strict=True)
    return [found for source, target in pairs for found in _check_copy(name, source, target, files)]


def _check_copy(name: str, source: TensorInfo | None, target: TensorInfo, files: ShardFiles) -> list[Mismatch]:
    """Compare a tensor bit by bit with the base's, cast to its dtype."""
    if source is None or source.shape != target.shape:
        return [Mismatch(name, NOT_IN_BASE)]
    shape = target.shape or (1,)
    different = 0
    for rows in row_blocks(shape):
        expected, actual = (_read_rows(files, info, rows).to(target.dtype) for info in (source, target))
        if not _equal_bits(expected, actual):
            different += _count_different(expected, actual)
    if not different:
        return []
    return [Mismatch(name, f"differs from the base's in {different:,} weights, and the adapter does not change it")]


def _read_rows(files: ShardFiles, info: TensorInfo, rows: slice) -> Tensor:
    return files.read_rows(info, rows.start, rows.stop) if info.shape else files.read_tensor(info)[None]


def _check_values(name: str, expected: Tensor, written: CheckpointReader) -> list[Mismatch]:
    """Compare a parameter with `expected`, its values before rounding."""
    values = expected if expected.ndim else expected[None]
    return _compare(name, tuple(expected.shape), lambda rows: values[rows].float(), written)


def _compare(name: str, shape: tuple[int, ...], expected: Rows, written: CheckpointReader) -> list[Mismatch]:
    """Compare a parameter of `shape` with its values before rounding, which `expected` returns in fp32."""
    if not written.has(name):
        return []  # found already, or not part of the model that is written
    actual_shape, actual = _written_rows(name, written)
    if actual_shape != shape:
        return [Mismatch(name, f"has the shape {list(actual_shape)}, not {list(shape)}")]
    worst = max((_error_ratio(actual(rows), expected(rows)) for rows in row_blocks(shape or (1,))), default=0.0)
    if worst <= 1:
        return []
    return [Mismatch(name, f"differs from PEFT's merge by {worst:.3g} times what rounding explains")]


def _written_rows(name: str, written: CheckpointReader) -> tuple[tuple[int, ...], Rows]:
    """Return the shape of a parameter, and a function for its rows; a scalar is one row."""
    stored = written.stored(name)
    if stored is not None and stored.shape:
        return stored.shape, lambda rows: written.read_rows(name, rows.start, rows.stop)
    value = written.read(name)
    return tuple(value.shape), (value if value.ndim else value[None]).__getitem__


def _error_ratio(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference of a value, divided by the one that rounding `expected` to the dtype explains.

    That is half a unit in the last place, and the error of the sums.

    Args:
        actual: of any dtype.
        expected: fp32, of the same shape.
    """
    if _equal_bits(expected.to(actual.dtype), actual):
        return 0.0
    if not actual.is_floating_point():
        return float("inf")
    limits = torch.finfo(actual.dtype)
    # Below the smallest normal number, where 0 is too, all numbers are equally far apart.
    _, exponent = torch.frexp(expected.abs().clamp_min(limits.smallest_normal))
    half_unit = torch.exp2(exponent.float()) * (limits.eps / 4)
    tolerance = half_unit + float(expected.abs().max()) * SUMMATION_ERROR
    ratio = float(((actual.float() - expected).abs() / tolerance).max())
    return ratio if ratio == ratio else float("inf")


def _equal_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two contiguous tensors of one shape and dtype have the same bits; eight bytes at a time."""
    words, rest = zip(*(_split_bytes(tensor) for tensor in (a, b)), strict=True)
    return torch.equal(*words) and torch.equal(*rest)


def _count_different(a: Tensor, b: Tensor) -> int:
    """Return the number of elements whose bits differ."""
    bytes_of = [tensor.view(-1, 1).view(torch.uint8) for tensor in (a, b)]
    return int((bytes_of[0] != bytes_of[1]).any(dim=1).sum())


def _split_bytes(tensor: Tensor) -> tuple[Tensor, Tensor]:
    data = tensor.contiguous().view(-1).view(torch.uint8)
    data = data.clone() if data.storage_offset() % 8 else data
    whole = len(data) // 8 * 8
    return data[:whole].view(torch.int64), data[whole:]
