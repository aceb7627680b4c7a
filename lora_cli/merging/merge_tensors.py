"""Write a base with an adapter folded in, tensor by tensor: W + ΔW in fp32, rounded to what is written, and measured.

Whatever the size of the model, what is in memory is the adapter and, for each thread, one block of one tensor where the
update is of low rank; one whole tensor where PEFT has to compute it.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lora_cli.merging.deltas import AdaptedLayer, LowRankDelta, merge_by_peft
from lora_cli.model.empty_base import drop_weights, load_weights
from lora_cli.model.safetensors_io import ShardFiles, TensorInfo, as_bytes

BLOCK_WEIGHTS = 1 << 19  # weights at once: few enough that their fp32 copies stay in the caches
COPY_BYTES = 8 << 20  # bytes at once
MAX_THREADS = 4  # more wait for the disk


class MergedTensor(NamedTuple):
    """One parameter that an adapter changed."""

    name: str
    survived: float  # share of the update that is left after rounding to the dtype that is written: 1 is all of it


class UpdateRetention:
    """⟨W'-W, ΔW⟩/⟨ΔW, ΔW⟩, summed up block by block; W' is rounded to the dtype that is written, and so is W."""

    def __init__(self, whole: float) -> None:
        """`whole` is ⟨ΔW, ΔW⟩."""
        self._kept, self._whole = 0.0, whole

    def add(self, kept: Tensor, delta: Tensor) -> None:
        """W'-W and ΔW of some weights, fp32 and contiguous."""
        self._kept += float(torch.dot(kept.view(-1), delta.view(-1)))

    def share(self, name: str) -> Iterator[MergedTensor]:
        """What came of the parameter `name`; nothing if it was not changed.

        Raises:
            ValueError: a weight or its update is not finite.
        """
        if not math.isfinite(self._kept) or not math.isfinite(self._whole):
            raise ValueError(f"{name}: the merged weight is not finite")
        if self._whole:
            yield MergedTensor(name, self._kept / self._whole)


@contextmanager
def thread_pool() -> Iterator[ThreadPoolExecutor]:
    """Threads that compute on one core each: whole tensors side by side go further than single products split up."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(min(MAX_THREADS, threads), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(threads)


def run_jobs(jobs: list[Callable[[], list[MergedTensor]]]) -> Iterator[MergedTensor]:
    """Do `jobs` on several threads; what they changed, as it is done."""
    with thread_pool() as pool:
        for done in as_completed([pool.submit(job) for job in jobs]):
            yield from done.result()


class ReadWrite(NamedTuple):
    """Files to read from and to write to."""

    base: ShardFiles
    out: ShardFiles

    def copy(self, source: TensorInfo, target: TensorInfo) -> list[MergedTensor]:
        """A tensor as it is, or cast where the dtypes differ."""
        if source.dtype == target.dtype:
            buffer = memoryview(bytearray(min(COPY_BYTES, source.size)))
            for at in range(0, source.size, COPY_BYTES):
                part = buffer[: min(COPY_BYTES, source.size - at)]
                self.base.read(source.file, part, source.begin + at)
                self.out.write(target.file, part, target.begin + at)
            return []
        count = math.prod(source.shape)
        for at in range(0, count, BLOCK_WEIGHTS):
            block = torch.empty(min(BLOCK_WEIGHTS, count - at), dtype=source.dtype)
            self.base.read(source.file, as_bytes(block), source.begin + at * source.dtype.itemsize)
            self.out.write(target.file, as_bytes(block.to(target.dtype)), target.begin + at * target.dtype.itemsize)
        return []

    def read(self, source: TensorInfo) -> Tensor:
        """A whole tensor, in the dtype that it is stored in."""
        value = torch.empty(source.shape, dtype=source.dtype)
        self.base.read(source.file, as_bytes(value), source.begin)
        return value

    def write(self, value: Tensor, target: TensorInfo) -> None:
        """A whole tensor, cast to the dtype that its place has."""
        self.out.write(target.file, as_bytes(value.to(target.dtype).contiguous()), target.begin)

    @torch.no_grad()
    def fold_low_rank(
        self, name: str, low: LowRankDelta, source: TensorInfo, target: TensorInfo, *, sign: int = 1
    ) -> list[MergedTensor]:
        """W + left @ right in blocks of rows; the update is taken away again where `sign` is -1."""
        rows, columns = source.shape
        at_once = max(1, min(rows, BLOCK_WEIGHTS // columns))
        raw = torch.empty(at_once, columns, dtype=source.dtype)
        before, delta, after = (torch.empty(at_once, columns) for _ in range(3))
        rounded = torch.empty(at_once, columns, dtype=target.dtype)
        left, right = low.left.double(), low.right.double()
        # ⟨LR, LR⟩ is the sum of (LᵀL)∘(RRᵀ): no product of the full size.
        survival = UpdateRetention(float(((left.T @ left) * (right @ right.T)).sum()))
        signed = low.left if sign > 0 else -low.left
        for start in range(0, rows, at_once):
            part = slice(0, min(at_once, rows - start))
            self.base.read(source.file, as_bytes(raw[part]), source.begin + start * columns * source.dtype.itemsize)
            before[part].copy_(raw[part])
            torch.mm(signed[start : start + at_once], low.right, out=delta[part])
            torch.add(before[part], delta[part], out=after[part])
            rounded[part].copy_(after[part])
            self.out.write(target.file, as_bytes(rounded[part]), target.begin + start * columns * target.dtype.itemsize)
            # Of what was written, and not of what was meant to be: an update that is lost on the way shows as lost.
            after[part].copy_(rounded[part])
            if source.dtype != target.dtype:
                before[part].copy_(raw[part].to(target.dtype))
            survival.add(after[part].sub_(before[part]), delta[part])
        return list(survival.share(name))


@torch.no_grad()
def merge_layer(
    layer: AdaptedLayer,
    *,
    read: Callable[[str], Tensor],
    write: Callable[[str, Tensor], None],
    dtype_of: Callable[[str], torch.dtype],
) -> list[MergedTensor]:
    """A layer's parameters in fp32, merged by PEFT.

    Args:
        layer: with its parameters empty, but for those that the adapter brings.
        read: gives a parameter of the base by its name, fp32.
        write: takes one.
        dtype_of: what it is rounded to there.
    """
    before = {key: read(layer.full(key)) for key in layer.keys if key not in layer.brought}
    load_weights(layer.module, {key: value.clone() for key, value in before.items()})
    merge_by_peft(layer)
    found: list[MergedTensor] = []
    for key in layer.keys:
        after = layer.module.get_parameter(key).data
        write(layer.full(key), after)
        base = before[key] if key in before else read(layer.full(key))
        found += measure_retention(layer.full(key), base, after, dtype_of(layer.full(key)))
    drop_weights(layer.module, list(before))
    return found


@torch.no_grad()
def measure_retention(name: str, before: Tensor, after: Tensor, dtype: torch.dtype) -> list[MergedTensor]:
    """How much of the way from `before` to `after`, both fp32, is left when both are rounded to `dtype`."""
    survival = UpdateRetention(float((after.double() - before).square().sum()))
    for old, new in zip(before.reshape(-1).split(BLOCK_WEIGHTS), after.reshape(-1).split(BLOCK_WEIGHTS), strict=True):
        survival.add(new.to(dtype).float() - old.to(dtype).float(), new - old)
    return list(survival.share(name))


@torch.no_grad()
def add_rows(weight: Tensor, rows: int) -> Tensor:
    """`weight` with new rows, each the mean of the others: as training began with them."""
    mean = weight.mean(dim=0, keepdim=True)
    return torch.cat([weight, mean.expand(rows - weight.shape[0], -1)])
