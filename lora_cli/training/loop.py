"""The training loop: a generator of steps. Logging, evaluation and checkpoints are the body of the `for` around it."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from lora_cli.data.batches import BatchPlan
from lora_cli.data.collate import Batch
from lora_cli.data.prefetch import prefetch_steps
from lora_cli.errors import LoraError
from lora_cli.model.adalora import AdaLoraRankAllocator
from lora_cli.model.loss import LossFunction
from lora_cli.model.sharding import is_sharded
from lora_cli.recipe.tasks import TaskName
from lora_cli.recipe.training_section import TrainingSpec
from lora_cli.run import console
from lora_cli.run.os_errors import is_out_of_memory
from lora_cli.training import cpu
from lora_cli.training.distributed import (
    all_reduce_counts,
    all_reduce_gradients,
    all_reduce_sum,
    any_process,
    max_of_processes,
)
from lora_cli.training.loss_scale import LossScale
from lora_cli.training.loss_spikes import LossSpikes, Spike, describe_rows
from lora_cli.training.lr_schedule import learning_rate, set_learning_rate
from lora_cli.training.memory_ladder import MemoryLadder, drop_gradients, release_memory


class Step(NamedTuple):
    """One optimizer step, over all processes."""

    number: int  # from 1
    epoch: float  # passes over the rows so far
    loss: float  # nats per supervised token (or word, or row), mean over this update; not finite only if skipped
    learning_rate: float
    grad_norm: float  # L2, before clipping; not finite only if skipped
    tokens: int  # real tokens, padding not counted
    supervised: int  # tokens, words or rows that carried loss
    seconds: float  # wall time of this step
    spike: Spike | None = None  # what is unusual in it
    overflows: int = 0  # of its gradient in float16, after each of which it was taken again with half the loss scale

    def record(self) -> dict[str, Any]:
        """Return its line of metrics.jsonl: `step` is what `metrics_log.truncate_after` reads; null: not finite."""
        left_out = ("number", "spike", *(() if self.overflows else ("overflows",)))
        values = {name: value for name, value in self._asdict().items() if name not in left_out}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        return {"step": self.number, **finite, **(self.spike.record() if self.spike else {})}

    def figures(self, device: torch.device) -> dict[str, str]:
        """Return the figures of its progress line."""
        return {
            "loss": f"{self.loss:.4f}",
            "lr": f"{self.learning_rate:.2e}",
            "grad": f"{self.grad_norm:.2f}",
            "tok/s": f"{self.tokens / self.seconds:.0f}",
            "mem": console.format_bytes(cpu.peak_memory(device)),
        }


class _BatchRows(NamedTuple):
    """The loss of a batch of a step, on any process, and its rows."""

    loss: float  # nats per supervised token (or word, or row)
    rows: list[str]  # locations of the raw rows


def fit(
    model: nn.Module,
    plan: BatchPlan,
    *,
    spec: TrainingSpec,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    total: int,
    start: int = 0,
    task: TaskName = "causal-lm",
    rank_allocator: AdaLoraRankAllocator | None = None,
    spikes: LossSpikes | None = None,
    ladder: MemoryLadder | None = None,
    scale: LossScale | None = None,
) -> Iterator[Step]:
    """Take optimizer steps `start`+1 to `total`, and yield after each.

    The loss of a step is the mean over the supervised tokens of all its batches on all processes, whatever the shapes
    of the batches. Every random number comes from a seed made of (run seed, step, position of the batch in the step): a
    resumed run draws the same numbers as an uninterrupted one, and two processes the same as one. AdaLoRA's
    `rank_allocator` acts around the optimizer step; its penalty is part of the gradient, not of the reported loss.

    With `on_spike: skip`, a step whose loss is a spike, or whose loss or gradient is not finite, changes neither
    parameters nor optimizer state. The learning rate follows from the number of the step, which advances. `spikes` has
    the losses of the steps before `start`.

    With a `ladder`, a step that runs out of memory in the forward or backward pass is taken again in a form that needs
    less, on all processes; on a GPU the largest batch is tried first. The tokens of a step stay the same. With an
    enabled loss `scale`, a step whose gradient overflows float16 is taken again with a lower one.

    Raises:
        LoraError: the loss or the gradient is not finite, too many steps in a row were skipped, or a step needs too
            much memory in every form; raised before the parameters change.
    """
    spikes, scale = spikes or LossSpikes(), scale or LossScale(enabled=False)
    loss_fn = LossFunction(model, task=task, label_smoothing=spec.label_smoothing, neftune_alpha=spec.neftune_alpha)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    device, rank = accelerator.device, accelerator.process_index
    idle = IdleBatch(plan, accelerator, trained) if is_sharded(model) else None
    with closing(loss_fn), closing(prefetch_steps(plan, start, total, rank=rank, device=device)) as steps:
        if ladder is not None and accelerator.device.type != "cpu":
            _rehearse(loss_fn, plan, ladder, trained, accelerator, started=bool(optimizer.state))
        for number in range(start, total):
            start_time = time.perf_counter()
            batches = next(steps)
            own = sum(len(b.targets) for _, b in batches), sum(b.tokens for _, b in batches)
            supervised, tokens = all_reduce_counts(accelerator, own)
            before = scale.to_json()
            while True:  # until the step fits into memory and into float16
                parts = _parts_of(batches, plan, ladder.rung.parts if ladder else 1)
                losses = _accumulate_gradients(
                    loss_fn, parts, seed=spec.seed, number=number, ladder=ladder, scale=scale.value, idle=idle
                )
                if ladder is not None and idle is None and any_process(accelerator, losses is None):
                    drop_gradients(trained)
                    release_memory(device)
                    ladder.go_down(f"step {number + 1}")
                    continue
                assert losses is not None
                all_reduce_gradients(trained, accelerator, share=max(1, supervised) * scale.value)
                if rank_allocator is not None:
                    rank_allocator.orthogonality_loss().backward()
                grad_norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
                loss_sum = sum((loss for _, loss in losses), start=torch.zeros((), device=device))
                loss_sum = all_reduce_sum(accelerator, loss_sum)
                # One transfer of both: the host waits for the device once, before the parameters change.
                summed, norm = torch.stack((loss_sum, grad_norm.to(loss_sum.device))).tolist()
                if math.isfinite(norm) or not math.isfinite(summed) or not scale.lower():
                    break
                drop_gradients(trained)
            if math.isfinite(norm):
                scale.count_step()
            else:
                scale.restore(before)  # no scale helps, so that it was no overflow
            # A step may have no label: rows of one token, for example.
            loss_of_step = summed / supervised if supervised else None
            spike = _find_spike(
                number + 1, loss_of_step, norm, losses, plan, spikes=spikes, on_spike=spec.on_spike, half=scale.enabled
            )
            rate = learning_rate(number, spec=spec, total=total)
            if spike is None or not spike.skipped:
                set_learning_rate(optimizer, rate)
                if spec.max_grad_norm is not None:
                    nn.utils.clip_grads_with_norm_(trained, spec.max_grad_norm, grad_norm)
                optimizer.step()
                if rank_allocator is not None:
                    rank_allocator.update_and_allocate(number + 1)
            optimizer.zero_grad(set_to_none=True)
            yield Step(
                number=number + 1,
                epoch=(number + 1) / plan.steps_per_epoch,
                loss=loss_of_step or 0.0,
                learning_rate=rate,
                grad_norm=norm,
                tokens=tokens,
                supervised=supervised,
                seconds=time.perf_counter() - start_time,
                spike=spike,
                overflows=scale.overflows - before["overflows"],
            )


class _Part(NamedTuple):
    """A batch, or a part of one, that is run at a time."""

    position: int  # of its batch in the step
    batch: Batch


def _parts_of(batches: Sequence[tuple[int, Batch]], plan: BatchPlan, count: int) -> list[_Part]:
    """Return the batches of a step in `count` parts each, without those that have no label."""
    parts = (_Part(position, part) for position, batch in batches for part in plan.split(batch, count))
    return [part for part in parts if len(part.batch.targets)]


def _accumulate_gradients(
    loss_fn: LossFunction,
    parts: Sequence[_Part],
    *,
    seed: int,
    number: int,
    ladder: MemoryLadder | None,
    scale: float,
    idle: "IdleBatch | None",
) -> list[tuple[Batch, Tensor]] | None:
    """Add up the gradients of all batches of a step on this process (gradient accumulation), multiplied by `scale`.

    `idle` is given if the base is sharded.

    Returns:
        The batches, or their parts, with their losses, each a sum: fp32 []. None if memory ran out, and `ladder` has
        another form of the step; then the gradients are of no use.

    Raises:
        StartAgain: memory ran out in the forward or backward pass, and the base is sharded.
    """
    losses: list[tuple[Batch, Tensor]] = []
    position = None
    try:
        if idle:
            idle.run(loss_fn, idle.count(parts))
        for part in parts:
            if part.position != position:
                position = part.position
                torch.manual_seed(_seed(seed, number, position))
            loss = loss_fn(part.batch).loss
            # The sum, not the mean: gradients scaled by 1/supervised could fall below fp16's smallest number.
            (loss if scale == 1 else loss * scale).backward()
            losses.append((part.batch, loss.detach()))
    except (MemoryError, RuntimeError) as error:
        if ladder is None or not is_out_of_memory(error):
            raise
        if idle:  # the other processes wait for this one to gather a layer
            ladder.start_again(f"step {number + 1}")
        return None
    return losses


class IdleBatch:
    """A short batch that does not count, for a process with fewer batches than others: all gather a sharded base."""

    def __init__(self, plan: BatchPlan, accelerator: Accelerator, trained: list[nn.Parameter]) -> None:
        self._batch = plan.make_batch([int(plan.rows.lengths.argmin())])
        self._accelerator, self._trained = accelerator, trained

    def count(self, parts: Sequence[object]) -> int:
        """Return how many passes fewer than the process with the most this one makes, with `parts`; all must call it.

        Before the step, so that the host does not wait within it.
        """
        return max_of_processes(self._accelerator, len(parts)) - len(parts)

    def run(self, loss_fn: LossFunction, passes: int) -> None:
        """Run forward and backward, before the step's own batches: it drops all gradients.

        Not with a loss times zero, which is NaN where this row's loss is not finite.
        """
        for _ in range(passes):
            loss_fn(self._batch).loss.backward()
            drop_gradients(self._trained)


def _rehearse(
    loss_fn: LossFunction,
    plan: BatchPlan,
    ladder: MemoryLadder,
    trained: list[nn.Parameter],
    accelerator: Accelerator,
    *,
    started: bool,
) -> None:
    """Try the largest batch before the first step, on a GPU; it changes nothing."""
    batch = plan.largest_batch()

    def run_batch() -> None:
        try:
            for part in plan.split(batch, ladder.rung.parts):
                loss_fn(part).loss.backward()
        finally:
            drop_gradients(trained)

    ladder.rehearse(run_batch, accelerator, tokens=batch.tokens, started=started)


def _seed(run_seed: int, step: int, position: int) -> int:
    # Large odd multipliers give neighboring steps and batches different seeds.
    return (run_seed * 1_000_003 + step * 8191 + position) % (1 << 63)


def _find_spike(
    number: int,
    loss: float | None,
    grad_norm: float,
    losses: list[tuple[Batch, Tensor]],
    plan: BatchPlan,
    *,
    spikes: LossSpikes,
    on_spike: Literal["warn", "skip"],
    half: bool,
) -> Spike | None:
    """Return what is unusual in step `number` (from 1); `loss` and `grad_norm` are equal on all processes.

    All processes call it. `loss` is None in a step without labels; `half` means that the run is in float16. Only for an
    unusual step, the host waits for the `losses` of the batches.

    Raises:
        LoraError: the loss or the gradient is not finite and not skipped, or too many steps in a row were skipped.
    """
    skip, spike = on_spike == "skip", None
    if not (math.isfinite(loss or 0.0) and math.isfinite(grad_norm)):
        batches = _gather_batches(losses, plan)
        not_finite = [row for batch in batches if not math.isfinite(batch.loss) for row in batch.rows]
        rows = not_finite or [row for batch in batches for row in batch.rows]
        problem = f"the {'loss' if not_finite else 'gradient'} is not finite"
        if not skip:
            raise LoraError(
                f"step {number}: {problem}; {describe_rows(rows)}",
                hint=("the activations of some models overflow float16: try model.dtype: float32; or " if half else "")
                + "try a lower training.learning_rate or a longer training.warmup, and inspect these rows; the last "
                "checkpoint is from before this step; --resume --set training.on_spike=skip leaves such steps out",
                exit_code=1,
            )
        spike = Spike(problem, rows, skipped=True)
    elif loss is not None and (usual := spikes.compare(loss)):
        highest = max(_gather_batches(losses, plan))
        spike = Spike(usual.describe(loss), highest.rows, skipped=skip, mean=usual.mean, sigma=usual.sigma)
    spikes.add(number, spike)
    return spike


def _gather_batches(losses: list[tuple[Batch, Tensor]], plan: BatchPlan) -> list[_BatchRows]:
    """Return the batches with labels of a step, of all processes, which must all call it."""
    own = [
        _BatchRows(float(loss) / len(batch.targets), [plan.rows[i].where for i in batch.rows]) for batch, loss in losses
    ]
    gathered: list[_BatchRows] = gather_object(own)
    return gathered
