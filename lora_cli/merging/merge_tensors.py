"""Merge tensors: W + ΔW in fp32, rounded to the output dtype; measure how much of ΔW is left after rounding.

Memory use does not depend on the size of the model: it is the adapter and, for each thread, one block of one tensor if
the update has low rank, or one full tensor if PEFT has to compute it.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lora_cli.merging.deltas import AdaptedLayer, LowRankDelta, merge_by_peft
from lora_cli.model.checkpoint_reader import BLOCK_WEIGHTS
from lora_cli.model.empty_base import drop_weights, load_weights
from lora_cli.model.finite import is_finite, not_finite_error
from lora_cli.model.safetensors_io import ShardFiles, TensorInfo, as_bytes

COPY_BYTES = 8 << 20  # bytes per read and write of a copy
MAX_THREADS = 4  # that write: further ones would only wait for the disk


class MergedTensor(NamedTuple):
    """A parameter that the adapter changed."""

    name: str
    retained: float  # share of the update that is left after rounding to the output dtype; 1 is all of it


class UpdateRetention:
    """The retained share of an update, ⟨W'-W, ΔW⟩/⟨ΔW, ΔW⟩, summed block by block; W' and W in the output dtype."""

    def __init__(self, norm_squared: float) -> None:
        """Start at zero; `norm_squared` is ⟨ΔW, ΔW⟩ of the full parameter."""
        self._dot, self._norm_squared = 0.0, norm_squared

    def add(self, written: Tensor, delta: Tensor) -> None:
        """Add a block: `written` is W'-W and `delta` is ΔW, both fp32, contiguous and of the same shape."""
        self._dot += float(torch.dot(written.view(-1), delta.view(-1)))

    def result(self, name: str) -> list[MergedTensor]:
        """Return the retained share of the parameter `name`; an empty list if ΔW is zero.

        Raises:
            ValueError: a weight or its update is not finite.
        """
        if not math.isfinite(self._dot) or not math.isfinite(self._norm_squared):
            raise ValueError(f"{name}: the merged weight is not finite")
        return [MergedTensor(name, self._dot / self._norm_squared)] if self._norm_squared else []


def check_finite(name: str, values: Tensor, source: TensorInfo) -> None:
    """Check values that were read from the tensor `name` at `source`.

    Raises:
        LoraError: a value is NaN or infinite.
    """
    if not is_finite(values):
        raise not_finite_error(name, source.file)


@contextmanager
def thread_pool(max_threads: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads that compute on one core each: at most `max_threads`, and one for each core.

    Several tensors in parallel are faster than matrix products that are split over the cores.
    """
    threads = torch.get_num_threads()
    count = min(max_threads or threads, threads)
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(threads)


def run_jobs(jobs: list[Callable[[], list[MergedTensor]]]) -> Iterator[MergedTensor]:
    """Run `jobs` on several threads and yield the parameters that they changed, as the jobs finish."""
    with thread_pool(MAX_THREADS) as pool:
        for future in as_completed([pool.submit(job) for job in jobs]):
            yield from future.result()


class ReadWrite(NamedTuple):
    """The files of the base to read from, and those of the merged model to write to."""

    base: ShardFiles
    out: ShardFiles

    def copy(self, name: str, source: TensorInfo, target: TensorInfo) -> list[MergedTensor]:
        """Copy a tensor unchanged, or cast it block by block if the dtypes differ; returns an empty list.

        Raises:
            LoraError: it is not finite; `name` is its name, for the message.
        """
        if source.dtype == target.dtype:
            buffer = memoryview(bytearray(min(COPY_BYTES, source.size)))
            for at in range(0, source.size, COPY_BYTES):
                part = buffer[: min(COPY_BYTES, source.size - at)]
                self.base.read(source.file, part, source.begin + at)
                check_finite(name, torch.frombuffer(part, dtype=source.dtype), source)
                self.out.write(target.file, part, target.begin + at)
            return []
        count = math.prod(source.shape)
        for at in range(0, count, BLOCK_WEIGHTS):
            block = torch.empty(min(BLOCK_WEIGHTS, count - at), dtype=source.dtype)
            self.base.read(source.file, as_bytes(block), source.begin + at * source.dtype.itemsize)
            check_finite(name, block, source)
            self.out.write(target.file, as_bytes(block.to(target.dtype)), target.begin + at * target.dtype.itemsize)
        return []

    def write(self, value: Tensor, target: TensorInfo) -> None:
        """Write a full tensor, cast to the dtype of `target`."""
        self.out.write(target.file, as_bytes(value.to(target.dtype).contiguous()), target.begin)

    @torch.no_grad()
    def merge_low_rank(
        self, name: str, low_rank: LowRankDelta, source: TensorInfo, target: TensorInfo, *, sign: int = 1
    ) -> list[MergedTensor]:
        """Write W + left @ right, in blocks of rows.

        Args:
            name: of the parameter.
            low_rank: the factors of ΔW, fp32.
            source: W [rows, columns] in the base.
            target: the same shape in the merged model.
            sign: 1 to merge, -1 to unmerge (subtract ΔW).

        Returns:
            The share of ΔW that is left in the written tensor; an empty list if ΔW is zero.

        Raises:
            LoraError: W is not finite.
            ValueError: the merged weight is not finite.
        """
        rows, columns = source.shape
        block_rows = max(1, min(rows, BLOCK_WEIGHTS // columns))
        stored = torch.empty(block_rows, columns, dtype=source.dtype)
        before, delta, after = (torch.empty(block_rows, columns) for _ in range(3))
        rounded = torch.empty(block_rows, columns, dtype=target.dtype)
        left, right = low_rank.left.double(), low_rank.right.double()
        # ⟨LR, LR⟩ is the sum of (LᵀL)∘(RRᵀ), which needs no product of the full size.
        retention = UpdateRetention(float(((left.T @ left) * (right @ right.T)).sum()))
        signed = low_rank.left if sign > 0 else -low_rank.left
        for start in range(0, rows, block_rows):
            block = slice(0, min(block_rows, rows - start))  # the last block can be shorter
            offset = start * columns  # weights before the block
            self.base.read(source.file, as_bytes(stored[block]), source.begin + offset * source.dtype.itemsize)
            check_finite(name, stored[block], source)
            before[block].copy_(stored[block])
            torch.mm(signed[start : start + block_rows], low_rank.right, out=delta[block])
            torch.add(before[block], delta[block], out=after[block])
            rounded[block].copy_(after[block])
            self.out.write(target.file, as_bytes(rounded[block]), target.begin + offset * target.dtype.itemsize)
            # Measure the written values, not `after`: then a bug that loses the update is measured as a lost update.
            after[block].copy_(rounded[block])
            if source.dtype != target.dtype:
                before[block].copy_(stored[block].to(target.dtype))
            retention.add(after[block].sub_(before[block]), delta[block])
        return retention.result(name)


@torch.no_grad()
def merge_layer(
    layer: AdaptedLayer,
    *,
    read: Callable[[str], Tensor],
    write: Callable[[str, Tensor], None],
    dtype_of: Callable[[str], torch.dtype],
) -> list[MergedTensor]:
    """Merge a layer by PEFT, all its parameters in fp32.

    Args:
        layer: its module's parameters are empty, except those from the adapter file.
        read: returns a parameter of the base as fp32, by its name in the base.
        write: stores a merged fp32 parameter under its name in the base.
        dtype_of: returns the dtype that a parameter is stored in, by its name in the base.

    Returns:
        The changed parameters.

    Raises:
        ValueError: a merged weight is not finite.
    """
    full_names = dict(zip(layer.parameter_names, layer.full_names(), strict=True))
    before = {key: read(full_name) for key, full_name in full_names.items() if key not in layer.from_adapter}
    load_weights(layer.module, {key: value.clone() for key, value in before.items()})
    merge_by_peft(layer)
    merged: list[MergedTensor] = []
    for key, full_name in full_names.items():
        after = layer.module.get_parameter(key).data
        write(full_name, after)
        base = before[key] if key in before else read(full_name)
        merged += measure_retention(full_name, base, after, dtype_of(full_name))
    drop_weights(layer.module, list(before))
    return merged


@torch.no_grad()
def measure_retention(name: str, before: Tensor, after: Tensor, dtype: torch.dtype) -> list[MergedTensor]:
    """Measure the share of the update `after - before` that is left when both are rounded to `dtype`.

    Args:
        name: of the parameter.
        before: fp32, any shape.
        after: fp32, the same shape.
        dtype: that the parameter is stored in.

    Returns:
        The share; an empty list if nothing changed.

    Raises:
        ValueError: a value is not finite.
    """
    retention = UpdateRetention(float((after.double() - before).square().sum()))
    for old, new in zip(before.reshape(-1).split(BLOCK_WEIGHTS), after.reshape(-1).split(BLOCK_WEIGHTS), strict=True):
        retention.add(new.to(dtype).float() - old.to(dtype).float(), new - old)
    return retention.result(name)
