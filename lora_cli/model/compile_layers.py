"""torch.compile of each decoder layer, and the choice whether it pays.

The layers of a model are compiled one by one: they have the same code, so that it is compiled once for all, in a
fraction of the time of the whole model. Batches have other lengths in each step, so that shapes are dynamic.
"""

import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_cli.errors import LoraError, first_line
from lora_cli.model.select_attention import TOLERANCE, matmul_dtype

MIN_BATCHES = 1000  # device batches of a run that pays for the start of minutes
BACKEND = "inductor"


class CompileChoice(NamedTuple):
    """Whether decoder layers are compiled, and why."""

    on: bool
    reason: str

    def line(self) -> str:
        """Return the line that a run prints."""
        return f"compile: {'each decoder layer' if self.on else 'no'} ({self.reason})"


def choose_compile(
    setting: Literal["auto"] | bool, *, device: torch.device, batches: int, dropout: bool
) -> CompileChoice:
    """Return whether a run of `batches` device batches on `device`, whose adapter may have dropout, compiles."""
    if setting != "auto":
        return CompileChoice(setting, "performance.compile")
    if device.type != "cuda":
        return CompileChoice(False, "on a CPU it takes minutes to start, and gains little")
    if dropout:
        return CompileChoice(False, "adapter.dropout draws a seed in each layer, which parts the compiled graphs")
    if batches < MIN_BATCHES:
        return CompileChoice(False, f"pays from {MIN_BATCHES:,} batches on; this run has {batches:,}")
    return CompileChoice(True, f"the run has {batches:,} batches")


def compile_layers(
    model: PreTrainedModel, loss: Callable[[], Tensor], *, setting: Literal["auto"] | bool, backend: str = BACKEND
) -> CompileChoice:
    """Compile the decoder layers of `model`, in place, if they then compute the same loss and gradients.

    Args:
        model: the base, with the adapter in its modules.
        loss: computes a loss of it, a scalar fp32 tensor; twice, without dropout.
        setting: `performance.compile`: if auto, layers that cannot be compiled stay as they are.
        backend: of torch.compile.

    Raises:
        LoraError: `setting` is true, and they cannot be compiled, or compute something else.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    layers, training, start = decoder_layers(model), model.training, time.perf_counter()
    model.eval()
    problem = None
    try:
        plain = _loss_and_gradient(loss, trained)
        for layer in layers:
            layer.compile(backend=backend, dynamic=True)
        compiled = _loss_and_gradient(loss, trained)
        differences = [_relative_difference(a, b) for a, b in zip(compiled, plain, strict=True)]
        if not all(difference <= TOLERANCE[matmul_dtype(model)] for difference in differences):  # one may be NaN
            problem = f"loss or gradient changed by {max(differences):.1g}"
        elif not layers:
            problem = "this architecture has no decoder layers that are known"
    except TorchDynamoException as error:  # without a C compiler or Triton, for example
        problem = f"torch.compile failed: {first_line(error)}"
    finally:
        model.train(training)
    if problem is None:
        seconds = time.perf_counter() - start
        return CompileChoice(True, f"{len(layers)} decoder layers, compared with the plain ones in {seconds:.0f} s")
    for layer in layers:
        layer._compiled_call_impl = None
    if setting is True:
        raise LoraError(f"performance.compile: {problem}", hint="write `performance: {compile: false}`")
    return CompileChoice(False, problem)


def _loss_and_gradient(loss: Callable[[], Tensor], trained: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """Return the loss, fp32 [1], and all gradients in one fp32 vector; parameters without a gradient count as zeros."""
    value = loss()
    value.backward()
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in trained])
    for parameter in trained:
        parameter.grad = None
    return value.detach().reshape(1), gradient


def _relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers of `model` that activation checkpointing would recompute, which are those of the decoder."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
