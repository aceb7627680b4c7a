"""Run liger-kernel on the CPU in Triton's interpreter and compare it with the model's own layers; prints JSON.

python -m tests.support.interpreted_liger FAMILY...

The interpreter (triton 3.9) lacks two things that liger-kernel's norms and gated MLPs need, and
`complete_interpreter` adds: conversion of Python numbers that are combined with tensors, and libdevice's functions.
"""

import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import liger_kernel.transformers  # noqa: F401  the modules that are changed below
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from lora_cli.model import fused_mlp, kernels
from lora_cli.model.fp32_weights import upcast_trainable_params
from lora_cli.model.loss import LossFunction
from tests.model import zoo


def main(families: list[str]) -> None:
    torch.set_num_threads(1)
    complete_interpreter()
    for family in families:
        sys.stdout.write(json.dumps({"family": family, **compare(family)}) + "\n")


def complete_interpreter() -> None:
    """Add to Triton's interpreter what these kernels need."""
    convert = interpreter._implicit_cvt

    def convert_floats_too(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return convert(argument)

    interpreter._implicit_cvt = convert_floats_too
    for module in [module for name, module in sys.modules.items() if name.startswith("liger_kernel.ops")]:
        functions: Any = vars(module)  # the interpreter replaces tl's functions while it runs: they are looked up then
        if "rsqrt" in functions:
            functions["rsqrt"] = lambda x: tl.rsqrt(x)
        if "tanh" in functions:
            functions["tanh"] = lambda x: 1 - 2 / (1 + tl.exp(2 * x))


def compare(family: str) -> dict[str, Any]:
    """Return the differences of logits, loss and gradients between the kernels and the model's own layers."""
    plan = zoo.BatchPlan(zoo.rows_of([30, 41, 12]), packing=True, size=96, batches_per_step=1, seed=0)
    batch = plan.make_batch([0, 1, 2])

    def loss_and_gradient(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        adapted = zoo.adapted(model)
        upcast_trainable_params(adapted)
        loss = LossFunction(adapted)(batch).loss
        gradients = torch.autograd.grad(loss, [p for p in adapted.parameters() if p.requires_grad])
        return loss.detach(), torch.cat([g.flatten() for g in gradients])

    loss, gradient = loss_and_gradient(zoo.make(family))
    model = zoo.make(family)  # the same weights
    choice = kernels.apply_kernels(model, kernels.KernelChoice("liger", "test"), setting="liger")
    replaced = sorted({type(m).__name__ for m in model.modules() if "forward" in vars(m)})
    new_loss, new_gradient = loss_and_gradient(model)
    kinds = {vars(m)[fused_mlp.KIND][0].source[1] for m in model.modules() if fused_mlp.KIND in vars(m)}
    return {
        "choice": choice.line(),
        "loss": float((new_loss - loss).abs() / loss.abs()),
        "gradient": zoo.relative(new_gradient, gradient),
        "replaced": replaced,
        "mlp": sorted(kinds),
        "rotary": sys.modules[type(model).__module__].apply_rotary_pos_emb.__name__,  # type: ignore[attr-defined]
    }


if __name__ == "__main__":
    main(sys.argv[1:])
