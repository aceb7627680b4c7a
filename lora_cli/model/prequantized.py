"""Bases that somebody has quantised already: recognised by their config, trained on where PEFT can, refused where not.

bitsandbytes' formats are tested, and packed GGUF layers with transformers' slow fallback. torchao's int8 weights were
trained over by hand, on the CPU; the others never: their packages need GPUs.
"""

from importlib.util import find_spec
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from lora_cli.errors import LoraError
from lora_cli.recipe.methods import METHOD_FACTS
from lora_cli.recipe.schema import AdapterSpec, QuantizationSpec

USE_16BIT_HINT = "give the 16-bit model as model.path; to save memory, add quantization: {bits: 4}"


class QuantizationMethod(NamedTuple):
    """How a kind of quantised base is trained on."""

    packages: tuple[str, ...] = ()  # importable names of what transformers and PEFT need for it
    install: str = ""  # what pip installs for them
    refused: str = ""  # why it cannot be trained on, where it cannot


QUANTIZATION_METHODS: dict[str, QuantizationMethod] = {
    "bitsandbytes": QuantizationMethod(),
    "gguf": QuantizationMethod(),  # packed, by transformers' own layers
    "gptq": QuantizationMethod(("optimum", "gptqmodel"), "optimum gptqmodel"),
    "awq": QuantizationMethod(("gptqmodel",), "gptqmodel"),
    "aqlm": QuantizationMethod(("aqlm",), "aqlm"),
    "eetq": QuantizationMethod(("eetq",), "eetq"),
    "torchao": QuantizationMethod(("torchao",), "torchao"),
    "hqq": QuantizationMethod(refused="transformers 5 has no loader for HQQ weights"),
    "mxfp4": QuantizationMethod(refused="transformers has no backward pass for MXFP4 experts"),
    "fp8": QuantizationMethod(refused="PEFT has no layer over block-wise FP8 weights"),
    "fbgemm_fp8": QuantizationMethod(refused="transformers runs FBGEMM's FP8 forward only"),
    "compressed-tensors": QuantizationMethod(refused="PEFT has no layer over compressed-tensors weights"),
    "bitnet": QuantizationMethod(refused="transformers runs packed BitNet weights forward only"),
    "quanto": QuantizationMethod(refused="PEFT has no layer over quanto's weights"),
}
# PEFT's other methods compute on the weights themselves, and these formats give none.
METHODS_OVER_OTHER_FORMATS = ("lora", "rslora", "lora+", "scaled", "eva")


class Prequantized(NamedTuple):
    """What a base's config says of its weights."""

    method: str
    bits: int | None


def detect_prequantized(config: PretrainedConfig) -> Prequantized | None:
    """The quantisation that a checkpoint was saved with; None for a plain one."""
    given: Any = getattr(config, "quantization_config", None)
    if given is None:
        return None
    section: dict[str, Any] = given if isinstance(given, dict) else given.to_dict()
    method = str(section.get("quant_method") or "bitsandbytes").lower()
    bits = 4 if section.get("load_in_4bit") else 8 if section.get("load_in_8bit") else section.get("bits")
    return Prequantized(method, bits)


def check_prequantized(
    found: Prequantized, adapter: AdapterSpec, quantization: QuantizationSpec | None, *, path: str
) -> None:
    """Refuse what cannot be trained, before any weight is read.

    Raises:
        LoraError: quantising twice, a format that nothing trains over, a package that is not there, or an adapter
            method that this base does not allow.
    """
    name = f"{path} is quantised already ({found.method}{f', {found.bits} bits' if found.bits else ''})"
    if quantization is not None:
        raise LoraError(
            f"quantization: {name}, and cannot be quantised again",
            hint="remove the quantization section, or give the 16-bit model as model.path",
        )
    known = QUANTIZATION_METHODS.get(found.method)
    if known is None:
        raise LoraError(f"model.path: {name}, a format that PEFT does not know", hint=USE_16BIT_HINT)
    if known.refused:
        raise LoraError(f"model.path: {name}, and cannot be trained on: {known.refused}", hint=USE_16BIT_HINT)
    if missing := [package for package in known.packages if find_spec(package) is None]:
        raise LoraError(
            f"model.path: {name}, which needs {' and '.join(missing)}",
            hint=f"pip install {known.install}; or {USE_16BIT_HINT}",
        )
    facts, foreign = METHOD_FACTS[adapter.method], found.method != "bitsandbytes"
    if facts.needs_bits:
        raise LoraError(
            f"adapter.method: {adapter.method} needs the weights from before quantisation, and {name}",
            hint="give the 16-bit model and quantization: {bits: 4}, or write another method",
        )
    if (foreign and adapter.method not in METHODS_OVER_OTHER_FORMATS) or (not foreign and found.bits not in facts.bits):
        reason = f": {facts.no_quantization}" if facts.no_quantization else ""
        raise LoraError(
            f"adapter.method: {adapter.method} does not train over {found.method}{reason}; {name}",
            hint="write adapter: {method: lora}, or give the 16-bit model as model.path",
        )
