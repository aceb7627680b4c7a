"""Measure one way to train on one shape: a process of its own, so that no other leaves memory or errors behind.

python -m tests.gpu.measure SHAPE BASE WAY STEPS     prints one line of JSON
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, cast
from unittest.mock import patch

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import PreTrainedModel

from lora_cli.data.batches import BatchPlan
from lora_cli.data.prefetch import prefetch_steps
from lora_cli.errors import LoraError
from lora_cli.model.attach_adapter import attach
from lora_cli.model.compile_layers import compile_layers
from lora_cli.model.device import pick_device, pick_dtype
from lora_cli.model.fp32_weights import upcast_trainable_params
from lora_cli.model.kernels import apply_kernels, choose_kernels
from lora_cli.model.loss import LossFunction
from lora_cli.model.quantize import check_cpu_4bit, prepare_for_kbit_training
from lora_cli.model.select_attention import choose_attention
from lora_cli.recipe.schema import AdapterSpec
from lora_cli.recipe.training_section import TrainingSpec
from lora_cli.run.os_errors import is_out_of_memory
from lora_cli.training import loop
from lora_cli.training.cpu import peak_memory
from lora_cli.training.gpu import set_up_allocator, set_up_gpu
from lora_cli.training.memory_ladder import MemoryLadder
from lora_cli.training.optimizer import make_optimizer, state_bytes, trained_shapes
from tests.gpu.cases import SHAPES, Base, Shape
from tests.gpu.library_inputs import library_inputs
from tests.gpu.machine import synchronize
from tests.gpu.random_models import make_base, matrix_parameters, rows_of
from tests.model.zoo import MemoryRows

RANK, ALPHA, DROPOUT, LEARNING_RATE = 16, 32, 0.05, 2e-4
LAST_STEPS = 5  # of the end, whose mean loss is told
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Work:
    """What is measured: a shape on a device."""

    shape: Shape
    base: Base
    steps: int  # the first one is not counted
    device: torch.device
    dtype: torch.dtype

    def rows(self) -> MemoryRows:
        """Return the rows of a run, some more than are used."""
        return rows_of(self.shape, steps=self.steps + 2)

    def model(self) -> PreTrainedModel:
        """Return a new base."""
        return make_base(self.shape, self.base, self.device, self.dtype)


class Count(NamedTuple):
    """One step."""

    tokens: int  # real ones, padding not counted
    supervised: int
    loss: float  # nats per supervised token


class Prepared(NamedTuple):
    """Steps that are taken as they are asked for, and how."""

    steps: Iterator[Count]
    how: Callable[[], str]  # asked after the steps


def lora(
    work: Work,
    *,
    attention: str = "auto",
    fused: bool = True,
    prefetched: bool = True,
    kernels: Literal["auto", "none"] = "auto",
    compiled: bool = False,
) -> Prepared:
    """Train with `fit` as `lora train` does, with single parts of it replaced by those of the libraries."""
    if work.device.type == "cuda":
        set_up_gpu(work.dtype)
    base = work.model()
    plan = packed_plan(work) if work.shape.packing else padded_plan(work)
    if work.base == "nf4":
        check_cpu_4bit(base, work.device)
        prepare_for_kbit_training(base, work.dtype)
    choose_attention(base, attention, packing=work.shape.packing)
    choice = choose_kernels(kernels, model_type=base.config.model_type, device=work.device, task="causal-lm")
    choice = apply_kernels(base, choice, setting=kernels)
    spec = AdapterSpec.model_validate({"rank": RANK, "alpha": ALPHA, "dropout": DROPOUT})
    model = attach(base, spec, seed=0) if fused else get_peft_model(base, lora_config())
    training = TrainingSpec(learning_rate=LEARNING_RATE, warmup=0)
    ladder = MemoryLadder(
        base,
        setting="auto",
        can_recompute=True,
        use_reentrant=False,
        max_parts=plan.max_rows,
        reserve=state_bytes("adamw", trained_shapes(model)),
        info=lambda line: None,
    )
    upcast_trainable_params(model)
    how = [choice.line()]
    if compiled:
        probe = plan.largest_batch()
        how.append(compile_layers(base, lambda: LossFunction(model)(probe).loss, setting=True).line())
    steps = loop.fit(
        model,
        plan,
        spec=training,
        optimizer=make_optimizer(model, training),
        accelerator=Accelerator(cpu=work.device.type == "cpu"),
        total=work.steps,
        ladder=ladder,
    )
    rows = "packed" if plan.packing else "padded"
    # The loop has no switch for it: on the CPU, batches are made when they are needed.
    here = partial(_without_thread, CPU)
    swap = nullcontext() if prefetched else patch.object(loop, "prefetch_steps", here)
    counts = (Count(step.tokens, step.supervised, step.loss) for step in _within(swap, steps))
    return Prepared(counts, lambda: ", ".join([rows, base.config._attn_implementation, *how, ladder.rung.describe()]))


def _within(context: AbstractContextManager[Any], steps: Iterator[loop.Step]) -> Iterator[loop.Step]:
    with context:
        yield from steps


def _without_thread(here: torch.device, *args: Any, **options: Any) -> Any:
    return prefetch_steps(*args, **{**options, "device": here})


def lora_config() -> LoraConfig:
    """Return the same adapter as PEFT's configuration."""
    return LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def packed_plan(work: Work) -> BatchPlan:
    """Return batches of packed rows."""
    return BatchPlan(work.rows(), packing=True, size=work.shape.tokens, batches_per_step=1, seed=0)


def padded_plan(work: Work) -> BatchPlan:
    """Return batches of padded rows with about as many real tokens as a packed batch."""
    rows = work.rows()
    size = max(1, round(work.shape.tokens / float(rows.lengths.mean())))
    return BatchPlan(rows, packing=False, size=size, batches_per_step=1, seed=0)


def peft_model(work: Work, *, recompute: bool) -> PeftModel:
    """Return the model as PEFT's documentation prepares it, with every layer recomputed or none."""
    base = work.model()
    if work.base == "nf4":
        check_cpu_4bit(base, work.device)
        options = {"use_reentrant": False}
        base = prepare_model_for_kbit_training(
            base, use_gradient_checkpointing=recompute, gradient_checkpointing_kwargs=options
        )
    elif recompute:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    return get_peft_model(base, lora_config())


def peft(work: Work, *, recompute: bool = False) -> Prepared:
    """Train with transformers, PEFT and torch's AdamW, in autocast, on padded rows."""
    model, plan = peft_model(work, recompute=recompute), padded_plan(work)
    return Prepared(
        _peft_steps(model, plan, work), lambda: f"padded, {model.get_base_model().config._attn_implementation}"
    )


def _peft_steps(model: PeftModel, plan: BatchPlan, work: Work) -> Iterator[Count]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0)
    half = work.dtype != torch.float32
    model.train()
    for number in range(work.steps):
        for _, batch in plan.batches_of_step(number):
            moved = {name: tensor.to(work.device) for name, tensor in library_inputs(batch).items()}
            with torch.autocast(work.device.type, work.dtype) if half else nullcontext():
                loss = model(**moved, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield Count(batch.tokens, len(batch.targets), loss.item())


def trl(work: Work, *, packing: bool = False) -> Prepared:
    """Train with TRL's SFTTrainer, every layer recomputed as by its default, on the same rows."""
    model, plan = peft_model(work, recompute=False), packed_plan(work) if packing else padded_plan(work)
    rows = "packed" if packing else "padded"
    return Prepared(_trl_steps(model, plan, work), lambda: f"{rows}, every layer is recomputed")


def _trl_steps(model: PeftModel, plan: BatchPlan, work: Work) -> Iterator[Count]:
    from tests.gpu.trl_steps import train_with_trl  # TRL is no dependency

    with tempfile.TemporaryDirectory(prefix="trl-") as folder:
        for step in train_with_trl(
            model, plan, steps=work.steps, dtype=work.dtype, folder=folder, learning_rate=LEARNING_RATE
        ):
            yield Count(*step)


PREPARE: dict[str, Callable[[Work], Prepared]] = {
    "lora": lora,
    "lora-sdpa": partial(lora, attention="sdpa"),
    "lora-peft-layers": partial(lora, fused=False),
    "lora-no-prefetch": partial(lora, prefetched=False),
    "lora-no-kernels": partial(lora, kernels="none"),
    "lora-compiled": partial(lora, compiled=True),
    "peft": peft,
    "peft-recompute": partial(peft, recompute=True),
    "trl": trl,
    "trl-packed": partial(trl, packing=True),
}


def measure(work: Work, prepare: Callable[[Work], Prepared]) -> dict[str, Any]:
    """Train, and return tokens per second, peak memory and the operations that the tokens need, per second.

    Counted are 4 operations per parameter and token, forward and backward through frozen weights, of the layers for
    every token and of the head for every supervised one; those of attention's scores and of the adapter are not.
    """
    prepared = prepare(work)
    if work.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(work.device)
    first = next(prepared.steps)
    synchronize(work.device)
    start = time.perf_counter()
    counts = list(prepared.steps)
    synchronize(work.device)
    seconds = time.perf_counter() - start
    tokens, supervised = sum(count.tokens for count in counts), sum(count.supervised for count in counts)
    layers, head = matrix_parameters(work.shape)
    return {
        "tokens_per_second": tokens / seconds,
        "operations_per_second": 4 * (layers * tokens + head * supervised) / seconds,
        "peak_memory": peak_memory(work.device),  # bytes: allocated on a GPU, else of this process
        "steps": len(counts),
        "seconds": seconds,
        "tokens": tokens,
        "supervised": supervised,
        "first_loss": first.loss,
        "last_loss": _mean_loss(counts[-LAST_STEPS:]),
        "dtype": str(work.dtype).removeprefix("torch."),
        "how": prepared.how(),
    }


def _mean_loss(counts: list[Count]) -> float:
    """Return the mean loss of the supervised tokens of some steps."""
    return sum(count.loss * count.supervised for count in counts) / sum(count.supervised for count in counts)


def main(arguments: list[str]) -> int:
    """Measure as the command line says, and print the result."""
    shape, base, way, steps = arguments
    device = pick_device()
    set_up_allocator()
    return print_result(Work(SHAPES[shape], cast(Base, base), int(steps), device, pick_dtype("auto", device)), way)


def print_result(work: Work, way: str) -> int:
    """Measure a way of PREPARE, and print the result in one line; running out of memory is a result too."""
    try:
        result = measure(work, PREPARE[way])
    except LoraError as error:
        result = {"error": error.message}
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        result = {"error": "out of memory"}
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
