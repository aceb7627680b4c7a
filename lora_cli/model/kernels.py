"""Kernels of libraries for norms, rotary embeddings and gated MLPs: one entry per library; each is proved on the model.

A kernel replaces functions of the model in place, and computes the same up to rounding: `apply_kernels` compares the
logits before and after.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_cli.data.collate import Batch
from lora_cli.errors import LoraError, first_line
from lora_cli.model.loss import logits_at, model_inputs
from lora_cli.recipe.tasks import TaskName

# Largest difference between the logits with and without kernels, relative to the largest logit, that rounding explains
# in this dtype: that of `select_attention.TOLERANCE`, which has the reasons, because both sum in another order.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.2}
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

    _apply_liger_kernel_to_instance(model=model, **LIGER_LEFT_OUT)


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
    elif model_type not in kernels.architectures():
        reason, fix = f"{name} has none for {model_type} models", "write auto or none"
    else:
        return KernelChoice(name, "auto" if setting == "auto" else "performance.kernels")
    if setting == "auto":
        return KernelChoice("none", reason)
    raise LoraError(f"performance.kernels: {reason}", hint=fix)


def apply_kernels(model: PreTrainedModel, name: str) -> float:
    """Replace functions of `model` by the kernels `name`, in place, and compare its logits on a few tokens.

    Returns:
        The largest difference between logits, relative to the largest logit.

    Raises:
        LoraError: the logits differ by more than rounding explains, or the kernels do not run.
    """
    training = model.training
    model.eval()
    before = _probe_logits(model)
    try:
        KERNELS[name].apply(model)
        after = _probe_logits(model)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # of a version that does not fit the model
        failure = f"performance.kernels: {name} does not run on this model: {first_line(error)}"
        raise LoraError(failure, hint="write `performance: {kernels: none}`") from error
    finally:
        model.train(training)
    difference = float((after - before).abs().max() / before.abs().max().clamp_min(1e-12))
    if not difference <= TOLERANCE[model.dtype]:  # also if it is not a number
        raise LoraError(
            f"performance.kernels: {name} computes something else on this model: logits differ by {difference:.1g} of "
            "the largest",
            hint="write `performance: {kernels: none}`",
        )
    return difference


@torch.no_grad()
def _probe_logits(model: PreTrainedModel) -> Tensor:
    """Return the logits of a few tokens, fp32 [tokens, vocabulary]."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (PROBE_TOKENS,), generator=generator)
    positions, empty = torch.arange(PROBE_TOKENS), torch.empty(0, dtype=torch.int64)
    batch = Batch(ids[None], positions[None], None, (PROBE_TOKENS,), empty, empty, ())
    inputs: dict[str, Any] = model_inputs(model, batch)
    return logits_at(model, inputs, positions).float()
