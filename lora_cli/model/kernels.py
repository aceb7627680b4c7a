"""Kernels of libraries for norms, rotary embeddings and gated MLPs: one entry per library; each is proved on the model.

A kernel replaces functions of the model in place, and computes the same up to rounding: `apply_kernels` compares the
logits before and after, within the tolerance of another attention (`select_attention.py`), because both sum in another
order.
"""

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_cli.data.collate import Batch
from lora_cli.errors import LoraError, first_line
from lora_cli.model.experts import expert_weights
from lora_cli.model.loss import logits_at, model_inputs
from lora_cli.model.select_attention import TOLERANCE, matmul_dtype
from lora_cli.recipe.tasks import TaskName
from lora_cli.run.os_errors import is_out_of_memory

PROBE_TOKENS = 64
# Of liger-kernel's functions; the loss is ours, which is computed in chunks and only where there is a label.
LIGER_LEFT_OUT = {"cross_entropy": False, "fused_linear_cross_entropy": False}


class Kernels(NamedTuple):
    """A library of kernels."""

    package: str  # that is imported
    extra: str  # of this project, that installs it
    architectures: Callable[[], set[str]]  # the model types that it has kernels for
    apply: Callable[[PreTrainedModel], None]  # replaces functions of the model, in place


class KernelChoice(NamedTuple):
    """The kernels of a run, and why."""

    name: str  # of KERNELS, or none
    reason: str

    def line(self) -> str:
        """Return the line that a run prints."""
        return f"kernels: {self.name} ({self.reason})"


def _liger_architectures() -> set[str]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return set(MODEL_TYPE_TO_APPLY_LIGER_FN)


def _apply_liger(model: PreTrainedModel) -> None:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    # Its experts have no form for packed weights, and compute gradients of frozen ones.
    left_out = {**LIGER_LEFT_OUT, "swiglu": False} if expert_weights(model) else LIGER_LEFT_OUT
    _apply_liger_kernel_to_instance(model=model, **left_out)


KERNELS: dict[str, Kernels] = {
    "liger": Kernels("liger_kernel", "liger", _liger_architectures, _apply_liger),
}


def choose_kernels(
    setting: Literal["auto", "none", "liger"], *, model_type: str, device: torch.device, task: TaskName
) -> KernelChoice:
    """Return the kernels for a model of `model_type` on `device`.

    Raises:
        LoraError: `setting` names kernels that cannot be used.
    """
    if setting == "none":
        return KernelChoice("none", "performance.kernels")
    name = "liger"
    kernels = KERNELS[name]
    if device.type != "cuda":
        reason, fix = f"they need a GPU, and the run is on the {device.type.upper()}", "write auto or none"
    elif find_spec(kernels.package) is None:
        reason, fix = f"{name} is not installed", f"pip install 'lora-cli[{kernels.extra}]', or write none"
    elif task != "causal-lm":
        reason, fix = f"{name} is for language models, and task is {task}", "write auto or none"
    else:
        try:
            known = kernels.architectures()
        except (ImportError, AttributeError) as error:  # of a version that does not fit
            reason, fix = f"{name} cannot be imported: {first_line(error)}", "write auto or none"
        else:
            if model_type in known:
                return KernelChoice(name, "auto" if setting == "auto" else "performance.kernels")
            reason, fix = f"{name} has none for {model_type} models", "write auto or none"
    if setting == "auto":
        return KernelChoice("none", reason)
    raise LoraError(f"performance.kernels: {reason}", hint=fix)


def apply_kernels(model: PreTrainedModel, choice: KernelChoice, *, setting: str) -> KernelChoice:
    """Replace functions of `model` by kernels, in place, and compare its logits on a few tokens.

    Args:
        model: the base.
        choice: of `choose_kernels`; nothing is done for none.
        setting: `performance.kernels`: with auto, a model that the kernels do not fit stays as it is.

    Returns:
        The choice, with the largest difference between logits, or why the kernels are not used.

    Raises:
        LoraError: `setting` names kernels that do not run on the model, or compute something else.
    """
    if choice.name == "none":
        return choice
    training = model.training
    model.eval()
    before, places = _probe_logits(model), _functions_of(model)
    problem = None
    try:
        KERNELS[choice.name].apply(model)
        difference = _relative_difference(model, _probe_logits(model), before)
        if not difference <= TOLERANCE[matmul_dtype(model)]:  # also if it is not a number
            problem = f"computes something else on this model: logits differ by {difference:.1g} of the largest"
    except _failures() as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        problem = f"does not run on this model: {first_line(error)}"
    finally:
        model.train(training)
    if problem is None:
        return choice._replace(reason=f"{choice.reason}; logits differ by {difference:.0e} of the largest")
    for place, functions in places:
        place.clear()
        place.update(functions)
    if setting == "auto":
        return KernelChoice("none", f"{choice.name} {problem}")
    raise LoraError(f"performance.kernels: {choice.name} {problem}", hint="write `performance: {kernels: none}`")


def _functions_of(model: PreTrainedModel) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return what kernels may replace, and its present contents: the model's modules, and the file of its code."""
    code = {vars(sys.modules[type(module).__module__])["__name__"] for module in model.modules()}
    own = [vars(sys.modules[name]) for name in code if name.startswith("transformers.models.")]
    return [(place, dict(place)) for place in (*own, *(module.__dict__ for module in model.modules()))]


def _failures() -> tuple[type[Exception], ...]:
    """Return the errors of kernels that do not fit model, GPU, compiler or versions."""
    errors = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, ImportError, OSError)
    try:
        from triton.errors import TritonError
    except ImportError:
        return (*errors, subprocess.CalledProcessError)
    return (*errors, subprocess.CalledProcessError, TritonError)


def _relative_difference(model: PreTrainedModel, after: Tensor, before: Tensor) -> float:
    """Return the largest difference of logits [tokens, vocabulary], relative to the largest; with experts, the median.

    In half precision, rounding sends single tokens to other experts, which changes their logits by any amount.
    """
    differences = (after - before).abs().amax(dim=-1) / before.abs().max().clamp_min(1e-12)
    return float(differences.median() if expert_weights(model) else differences.max())


@torch.no_grad()
def _probe_logits(model: PreTrainedModel) -> Tensor:
    """Return the logits of a few tokens, fp32 [tokens, vocabulary]."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (PROBE_TOKENS,), generator=generator)
    positions, empty = torch.arange(PROBE_TOKENS), torch.empty(0, dtype=torch.int64)
    batch = Batch(ids[None], positions[None], None, (PROBE_TOKENS,), empty, empty, ())
    inputs: dict[str, Any] = model_inputs(model, batch)
    return logits_at(model, inputs, positions).float()
