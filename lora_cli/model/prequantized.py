"""Pre-quantized base models (GPTQ, AWQ, ...): detected by their config, rejected where PEFT cannot train on them.

Tests cover bitsandbytes' formats, and packed GGUF layers with transformers' slow fallback. Training on torchao's int8
weights was tried by hand on the CPU. The other formats were never tried: their packages need GPUs.
"""

from importlib.util import find_spec
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from lora_cli.errors import LoraError
from lora_cli.recipe.methods import METHOD_FACTS
from lora_cli.recipe.schema import AdapterSpec, QuantizationSpec

USE_16BIT_HINT = "set model.path to the 16-bit model; to save memory, add quantization: {bits: 4}"


class QuantizationMethod(NamedTuple):
    """The support for training on one quantization format."""

    packages: tuple[str, ...] = ()  # import names of the packages that transformers and PEFT need for it
    install: str = ""  # the packages' names for pip
    untrainable: str = ""  # the reason why PEFT cannot train on it; empty if it can


QUANTIZATION_METHODS: dict[str, QuantizationMethod] = {
    "bitsandbytes": QuantizationMethod(),
    "gguf": QuantizationMethod(),  # in transformers' own packed layers
    "gptq": QuantizationMethod(("optimum", "gptqmodel"), "optimum gptqmodel"),
    "awq": QuantizationMethod(("gptqmodel",), "gptqmodel"),
    "aqlm": QuantizationMethod(("aqlm",), "aqlm"),
    "eetq": QuantizationMethod(("eetq",), "eetq"),
    "torchao": QuantizationMethod(("torchao",), "torchao"),
    "hqq": QuantizationMethod(untrainable="transformers 5 has no loader for HQQ weights"),
    "mxfp4": QuantizationMethod(untrainable="transformers has no backward pass for MXFP4 experts"),
    "fp8": QuantizationMethod(untrainable="PEFT has no layer for block-wise FP8 weights"),
    "fbgemm_fp8": QuantizationMethod(untrainable="transformers has no backward pass for FBGEMM FP8 weights"),
    "compressed-tensors": QuantizationMethod(untrainable="PEFT has no layer for compressed-tensors weights"),
    "bitnet": QuantizationMethod(untrainable="transformers has no backward pass for packed BitNet weights"),
    "quanto": QuantizationMethod(untrainable="PEFT has no layer for quanto weights"),
}
# PEFT's other methods compute with the weight matrices, which the formats other than bitsandbytes do not expose.
METHODS_FOR_OTHER_FORMATS = ("lora", "rslora", "lora+", "scaled", "eva")


class Prequantized(NamedTuple):
    """The quantization that a base's config declares."""

    method: str  # a key of QUANTIZATION_METHODS, or an unknown name
    bits: int | None  # None if the config does not declare them


def detect_prequantized(config: PretrainedConfig) -> Prequantized | None:
    """Return the quantization that a checkpoint was saved with; None if it is not quantized."""
    declared: Any = getattr(config, "quantization_config", None)
    if declared is None:
        return None
    section: dict[str, Any] = declared if isinstance(declared, dict) else declared.to_dict()
    method = str(section.get("quant_method") or "bitsandbytes").lower()
    bits = 4 if section.get("load_in_4bit") else 8 if section.get("load_in_8bit") else section.get("bits")
    return Prequantized(method, bits)


def check_prequantized(
    existing: Prequantized, adapter: AdapterSpec, quantization: QuantizationSpec | None, *, path: str
) -> None:
    """Raise a LoraError if the base at `path` cannot be trained on, before any weight is read.

    Args:
        existing: the base's own quantization.
        adapter: the recipe's section.
        quantization: the recipe's section, which must be None.
        path: of the base, for messages.

    Raises:
        LoraError: the recipe quantizes the base a second time, PEFT cannot train on the format, a package is missing,
            or the adapter method does not support the format.
    """
    base = f"{path} is already quantized ({existing.method}{f', {existing.bits} bits' if existing.bits else ''})"
    if quantization is not None:
        raise LoraError(
            f"quantization: {base} and cannot be quantized again",
            hint="remove the quantization section, or set model.path to the 16-bit model",
        )
    support = QUANTIZATION_METHODS.get(existing.method)
    if support is None:
        raise LoraError(f"model.path: {base}, a format that PEFT does not support", hint=USE_16BIT_HINT)
    if support.untrainable:
        raise LoraError(f"model.path: {base} and cannot be trained: {support.untrainable}", hint=USE_16BIT_HINT)
    if missing := [package for package in support.packages if find_spec(package) is None]:
        raise LoraError(
            f"model.path: {base}, which needs {' and '.join(missing)}",
            hint=f"pip install {support.install}; or {USE_16BIT_HINT}",
        )
    facts = METHOD_FACTS[adapter.method]
    if facts.needs_bits:
        raise LoraError(
            f"adapter.method: {adapter.method} needs the unquantized weights, but {base}",
            hint="set model.path to the 16-bit model and add quantization: {bits: 4}, or choose another method",
        )
    if existing.method == "bitsandbytes":
        supported = existing.bits in facts.bits
    else:
        supported = adapter.method in METHODS_FOR_OTHER_FORMATS
    if not supported:
        reason = f": {facts.no_quantization_reason}" if facts.no_quantization_reason else ""
        raise LoraError(
            f"adapter.method: {adapter.method} does not support {existing.method} weights{reason}; {base}",
            hint="set adapter: {method: lora}, or set model.path to the 16-bit model",
        )
