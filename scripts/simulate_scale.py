"""Simulate LoRA of Llama 3.1 8B, 70B and 405B on 1 to 1,024 GPUs: bytes sent and seconds of a step, and what bounds it.

    python scripts/simulate_scale.py                                      16-bit bases, batches of 8,192 tokens per GPU
    python scripts/simulate_scale.py --bits 4 --model 70B --rate 0.8e14   NF4, with the rate that was measured

Nothing is run: the times follow from sizes and rates. N is the number of GPUs, T the tokens of a GPU's batch, P the
parameters of the base, L the bytes of its decoder layers as stored, A and G those of the adapter and of its gradients
in fp32.

    compute  T * P / rate * (1 + r / 2)   r: share of the layers that are computed again: 2 of 4 operations more
    ddp      2 (N - 1) / N * G            ring all-reduce: each GPU sends every part twice, but for its own
    fsdp     2 (N - 1) / N * (L + A)      all-gather of the layers in the forward and in the backward pass
             + (N - 1) / N * G            reduce-scatter of the gradients

ddp exchanges after the backward pass, and its times are added; fsdp fetches while it computes, and the longer time
counts. Up to 8 GPUs are one machine, with NVLink. In a ring over machines each GPU still sends the bytes above through
NVLink, and the network adapters of a machine share what passes from one machine to the next, so that the slower of both
rates counts. Latency is left out: it counts where many GPUs pass on many small messages, as with fsdp from hundreds of
GPUs on. What fits follows from the memory plan of `lora check --gpus N --budget SIZE`, with the fastest form of the
memory ladder.

Defaults: 989e12 operations/s of an H100 SXM in bfloat16 without sparsity, 80 GB, and 450 GB/s of NVLink in each
direction (NVIDIA's data sheet); 40 % of the operations, as Llama 3 was trained with (arXiv:2407.21783, table 4), at 4
operations per parameter and token: 2 forward, 2 backward, as the base has no gradients; and 8 adapters of 400 Gb/s in a
machine (the same, section 3.3.1). `--rate` replaces the product of tokens/s and parameters that one GPU was measured
with, without recomputation; `scripts/gpu` measures it.
"""

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lora_cli.model import attach_adapter
from lora_cli.model.activation_memory import TrainingSetup
from lora_cli.model.gpu_plan import Form, StrategyPlan, plan_strategies
from lora_cli.model.memory import FP32, TrainingMemory, training_memory
from lora_cli.model.packed_attention import LONG_ROW
from lora_cli.model.weight_memory import stored_weights
from lora_cli.recipe.schema import AdapterSpec, QuantizationSpec
from lora_cli.run.byte_size import parse_size
from lora_cli.run.console import format_bytes
from lora_cli.training.memory_ladder import all_rungs
from lora_cli.training.optimizer import state_bytes, trained_shapes

GPUS_OF_MACHINE = 8
RATE = 0.4 * 989e12 / 4  # tokens/s times parameters
# Llama 3.1 (arXiv:2407.21783, table 3): hidden size, intermediate size, layers, query heads; 8 key heads.
SHAPES = {"8B": (4096, 14336, 32, 32), "70B": (8192, 28672, 80, 64), "405B": (16384, 53248, 126, 128)}
VOCABULARY = 128256


class Rates(NamedTuple):
    """What GPUs and links do in a second."""

    compute: float  # tokens times parameters, of one GPU, without recomputation
    nvlink: float  # bytes that a GPU sends
    network: float  # bytes that a machine sends


class Entry(NamedTuple):
    """A row of the table."""

    sent: float  # bytes of each GPU in a step
    compute: float  # seconds
    exchange: float  # seconds
    step: float  # seconds
    bound: str  # by what


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=SHAPES, help="may be repeated; default: all")
    parser.add_argument("--gpus", type=int, action="append", metavar="N", help="may be repeated; default: 1 to 1,024")
    parser.add_argument("--tokens", type=int, default=8192, help="of a batch on each GPU")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA on all linear layers")
    parser.add_argument("--bits", type=int, choices=(4, 8, 16), default=16, help="of the base's linear layers")
    parser.add_argument("--rate", type=float, default=RATE, help=f"tokens/s times parameters of a GPU ({RATE:.3g})")
    parser.add_argument("--nvlink", type=float, default=450, metavar="GB/S", help="that each GPU sends")
    parser.add_argument("--network", type=float, default=400, metavar="GB/S", help="that a machine of 8 GPUs sends")
    parser.add_argument("--budget", default="80GB", metavar="SIZE", help="memory of each GPU")
    options = parser.parse_args()
    budget = parse_size(options.budget, option="--budget", example="80GB")
    rates = Rates(options.rate, options.nvlink * 1e9, options.network * 1e9)
    print(
        "| model | GPUs | strategy | form | memory | sent per step | compute | exchange | step | tokens/s | bound by |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name in options.model or SHAPES:
        memory = memory_of(name, rank=options.rank, bits=options.bits)
        for line in rows(name, memory, options, rates, budget):
            print(line)


def memory_of(name: str, *, rank: int, bits: int) -> TrainingMemory:
    """Return what LoRA on all linear layers of a model takes in training with AdamW; it has no weights."""
    dtype = torch.bfloat16
    quantization = None if bits == 16 else QuantizationSpec.model_validate({"bits": bits})
    weights = stored_weights(skeleton(name), dtype=dtype, quantization=quantization)
    model: PeftModel = attach_adapter.attach(skeleton(name), AdapterSpec(rank=rank), seed=0)
    unfused = torch.float32 if bits == 8 else None
    setup = TrainingSetup(dtype, packed=True, on_cpu=False, row=LONG_ROW + 1, unfused=unfused)
    state = state_bytes("adamw", trained_shapes(model))
    return training_memory(model, setup, weights=weights, optimizer_bytes=state)


def skeleton(name: str) -> PreTrainedModel:
    hidden, intermediate, layers, heads = SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
    )
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def rows(name: str, memory: TrainingMemory, options: Any, rates: Rates, budget: int) -> Iterator[str]:
    """Yield a line for each number of GPUs and each strategy."""
    rungs = all_rungs(setting="auto", can_recompute=True, on_cpu=False, max_parts=1)
    forms = [Form(rung.describe(), rung.every, rung.offload, options.tokens) for rung in rungs]
    parameters = sum(p.numel() for p in skeleton(name).parameters())
    for gpus in options.gpus or [2**power for power in range(11)]:
        for plan in plan_strategies(memory, forms, gpus=gpus, budget=budget):
            start = f"| {name} | {gpus:,} | {plan.name if gpus > 1 else 'one GPU'} |"
            if plan.best is None:
                least = min(form.total for form in plan.forms)
                yield f"{start} | {format_bytes(least)} | | | | | | does not fit in memory |"
                continue
            entry = simulate(plan, memory, gpus=gpus, tokens=options.tokens, parameters=parameters, rates=rates)
            yield (
                f"{start} {plan.best.form.name} | {format_bytes(plan.best.total)} | {format_bytes(entry.sent)} | "
                f"{entry.compute:.2f} s | {entry.exchange:.2f} s | {entry.step:.2f} s | "
                f"{gpus * options.tokens / entry.step:,.0f} | {entry.bound} |"
            )


def simulate(
    plan: StrategyPlan, memory: TrainingMemory, *, gpus: int, tokens: int, parameters: int, rates: Rates
) -> Entry:
    """Return the bytes and times of a step in the fastest form that fits; the formulas are at the top of this file."""
    assert plan.best is not None
    every, layers = plan.best.form.every, len(memory.weights.layers)
    recomputed = 0.0 if every is None else len(range(0, layers, every)) / layers
    compute = tokens * parameters / rates.compute * (1 + recomputed / 2)
    share = (gpus - 1) / gpus
    gradients = FP32 * memory.trained.total
    if plan.name == "ddp":
        sent = 2 * share * gradients
    else:
        base = sum(layer.plain + layer.codes for layer in memory.weights.layers)
        sent = share * (2 * (base + FP32 * memory.adapter.layers) + gradients)
    link = "NVLink" if gpus <= GPUS_OF_MACHINE or rates.nvlink < rates.network else "network"
    exchange = sent / (rates.nvlink if link == "NVLink" else rates.network)
    step = compute + exchange if plan.name == "ddp" else max(compute, exchange)
    return Entry(sent, compute, exchange, step, link if exchange > compute else "compute")


if __name__ == "__main__":
    main()
