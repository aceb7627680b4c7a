"""Describe a quantized base: the share of its weights that is quantized, and the weights that stay in 16 bits."""

from collections import Counter

import torch
from transformers import PreTrainedModel

from lora_cli.model.device import resolve_compute_dtype
from lora_cli.model.experts import expert_weights
from lora_cli.model.prequantized import Prequantized
from lora_cli.model.weight_memory import quantized_sizes
from lora_cli.recipe.schema import QuantizationSpec
from lora_cli.run.console import format_bytes

MIN_SHARE = 0.01  # of all weights: kinds with a smaller share are not named
MAX_KINDS = 3  # that are named


def describe_quantization(
    skeleton: PreTrainedModel,
    spec: QuantizationSpec | None,
    *,
    existing: Prequantized | None,
    dtype: torch.dtype,
) -> list[str]:
    """Return lines on how the base's weights are stored in memory; empty if all are in `dtype`.

    Args:
        skeleton: the base on the meta device, not quantized.
        spec: the recipe's section.
        existing: the quantization that the checkpoint was saved with.
        dtype: of weights that are not quantized.
    """
    stacked = bool(expert_weights(skeleton))
    if existing is not None:
        lines = [f"  its weights were quantized before: {existing.method}"]
        # Only linear layers can be quantized in a checkpoint of bitsandbytes.
        linear_only = QuantizationSpec(bits=8)
        bitsandbytes = stacked and existing.method == "bitsandbytes"
        return lines + ([_shares(skeleton, linear_only, existing.bits or 4, dtype)] if bitsandbytes else [])
    if spec is None:
        return []
    if spec.bits == 8:
        lines = ["  its linear layers: int8 (LLM.int8)", _shares(skeleton, spec, 8, dtype)]
        return (
            [*lines, "  bitsandbytes has no int8 form of stacked expert weights; bits: 4 packs them"]
            if stacked
            else lines
        )
    double = ", double quantization" if spec.double_quant else ""
    computed = str(resolve_compute_dtype(spec, dtype)).removeprefix("torch.")
    layers = "linear layers and experts" if stacked else "linear layers"
    line = f"  its {layers}: 4-bit {spec.type}{double}, computed in {computed}"
    return [line, _shares(skeleton, spec, 4, dtype)]


def _shares(skeleton: PreTrainedModel, spec: QuantizationSpec, bits: int, dtype: torch.dtype) -> str:
    """Return a line such as `4 bits: 6 % of the weights; experts stay bfloat16: 58 GiB`."""
    quantized, stacked = quantized_sizes(skeleton, spec), expert_weights(skeleton)
    sizes = {name: parameter.numel() for name, parameter in skeleton.named_parameters()}
    total = sum(sizes.values())
    rest: Counter[str] = Counter()
    for name, size in sizes.items():
        if name not in quantized:
            rest["experts" if name in stacked else name.removesuffix(".weight").rpartition(".")[2]] += size
    named = [kind for kind, size in rest.most_common(MAX_KINDS) if size >= MIN_SHARE * total]
    line = f"  {bits} bits: {sum(quantized.values()) / total:.0%} of the weights"
    if not named:
        return line
    left = format_bytes(sum(rest[kind] for kind in named) * dtype.itemsize)
    stay = "stays" if len(named) == 1 and named[0] != "experts" else "stay"
    return f"{line}; {', '.join(named)} {stay} {str(dtype).removeprefix('torch.')}: {left}"
