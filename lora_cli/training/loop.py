"""The training loop: a generator of steps. Logging, evaluation and checkpoints are the body of the `for` around it."""

import time
from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from lora_cli.data.batches import BatchPlan
from lora_cli.data.collate import Batch
from lora_cli.errors import LoraError
from lora_cli.model.adalora import AdaLoraRankAllocator
from lora_cli.model.loss import LossFunction
from lora_cli.recipe.tasks import TaskName
from lora_cli.recipe.training_section import TrainingSpec
from lora_cli.training.distributed import all_reduce_gradients, all_reduce_sum
from lora_cli.training.lr_schedule import learning_rate, set_learning_rate


class Step(NamedTuple):
    """One optimizer step, over all processes."""

    number: int  # from 1
    epoch: float  # passes over the rows so far
    loss: float  # nats per supervised token (or word, or row), mean over this update
    learning_rate: float
    grad_norm: float  # L2, before clipping
    tokens: int  # real tokens, padding not counted
    supervised: int  # tokens, words or rows that carried loss
    seconds: float  # wall time of this step


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
) -> Iterator[Step]:
    """Take optimizer steps `start`+1 to `total`, and yield after each.

    The loss of a step is the mean over the supervised tokens of all its batches on all processes, whatever the shapes
    of the batches. Every random number comes from a seed made of (run seed, step, position of the batch in the step): a
    resumed run draws the same numbers as an uninterrupted one, and two processes the same as one. AdaLoRA's
    `rank_allocator` acts around the optimizer step; its penalty is part of the gradient, not of the reported loss.

    Raises:
        LoraError: the loss or the gradient is not finite; raised before the parameters change.
    """
    loss_fn = LossFunction(model, task=task, label_smoothing=spec.label_smoothing, neftune_alpha=spec.neftune_alpha)
    trained = [p for p in model.parameters() if p.requires_grad]
    world, rank = accelerator.num_processes, accelerator.process_index
    model.train()
    with closing(loss_fn):
        for number in range(start, total):
            start_time = time.perf_counter()
            batches = list(plan.batches_of_step(number, rank=rank, world_size=world))
            counts = torch.tensor(
                [sum(len(b.targets) for _, b in batches), sum(b.tokens for _, b in batches)], device=accelerator.device
            )
            supervised, tokens = (int(n) for n in all_reduce_sum(accelerator, counts))
            loss_sum = torch.zeros((), device=accelerator.device)
            losses: list[tuple[Batch, Tensor]] = []
            # Gradient accumulation: the gradients of all batches of the step add up before one optimizer step.
            for position, batch in batches:
                if len(batch.targets) == 0:
                    continue
                torch.manual_seed(_seed(spec.seed, number, position))
                loss = loss_fn(batch).loss
                # The sum, not the mean: gradients scaled by 1/supervised could fall below fp16's smallest number.
                loss.backward()
                losses.append((batch, loss.detach()))
                loss_sum += loss.detach()
            all_reduce_gradients(trained, accelerator, share=max(1, supervised))
            if rank_allocator is not None:
                rank_allocator.orthogonality_loss().backward()
            grad_norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
            loss_sum = all_reduce_sum(accelerator, loss_sum)
            if not (torch.isfinite(loss_sum) and torch.isfinite(grad_norm)):
                raise _not_finite_error(number + 1, losses, plan)
            rate = learning_rate(number, spec=spec, total=total)
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
                loss=float(loss_sum) / max(1, supervised),  # a step may have no label: rows of one token, for example
                learning_rate=rate,
                grad_norm=float(grad_norm),
                tokens=tokens,
                supervised=supervised,
                seconds=time.perf_counter() - start_time,
            )


def _seed(run_seed: int, step: int, position: int) -> int:
    # Large odd multipliers give neighboring steps and batches different seeds.
    return (run_seed * 1_000_003 + step * 8191 + position) % (1 << 63)


def _not_finite_error(number: int, losses: list[tuple[Batch, Tensor]], plan: BatchPlan) -> LoraError:
    """Return the error of a step whose sums are not finite. All processes must call it."""
    rows = {
        finite: [
            plan.rows[i].where for batch, loss in losses if bool(torch.isfinite(loss)) == finite for i in batch.rows
        ]
        for finite in (False, True)
    }
    not_finite, finite = gather_object(rows[False]), gather_object(rows[True])
    quantity, affected = ("loss", not_finite) if not_finite else ("gradient", finite)
    more = f" and {len(affected) - 5} more" if len(affected) > 5 else ""
    return LoraError(
        f"step {number}: the {quantity} is not finite; its rows: {', '.join(affected[:5])}{more}",
        hint="try a lower training.learning_rate or a longer training.warmup, and inspect these rows; "
        "the last checkpoint is from before this step",
        exit_code=1,
    )
