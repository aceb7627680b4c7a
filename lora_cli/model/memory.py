"""Estimate the peak memory of a training step, part by part, from the model's shapes alone."""

from typing import NamedTuple

import psutil
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lora_cli.model.target_modules import linear_layers
from lora_cli.recipe.schema import QuantizationSpec

GIB = 1 << 30
PROCESS_BYTES = 700 << 20  # resident memory of Python, torch and transformers (measured on Linux)
LOGITS_BYTES_PER_ID = 256 * 3 * 4  # 256 supervised tokens in one chunk, three fp32 copies: see model/loss.py


class MemoryPlan(NamedTuple):
    """Bytes of each part at the peak of a training step on one device; an estimate for decoder models."""

    weights: int
    adapter: int  # fp32 weights and gradients, and the state of the optimizer
    activations: int
    logits: int
    process: int  # Python and its libraries; 0 on a GPU

    @property
    def total(self) -> int:
        """Return the sum of all parts, in bytes."""
        return sum(self)


def plan_memory(
    model: PreTrainedModel,
    *,
    dtype: torch.dtype,
    trainable: int,
    tokens: int,
    longest: int,
    checkpointing: bool,
    quantization: QuantizationSpec | None,
    on_cpu: bool,
    optimizer_bytes: int | None = None,
) -> MemoryPlan:
    """Estimate the bytes of a training step at its peak.

    Activations per token and layer of a decoder with a gated MLP (h: hidden size, i: intermediate size): two norms save
    their inputs in fp32 (8h bytes), the projections save their inputs (4h + i values), attention saves q, k and v (3h),
    and the gate saves three more (3i). This counts the tensors that the backward pass needs, as Korthikanti et al.
    (arXiv:2205.05198, section 4.1) do for full training; frozen weights need fewer.

    Args:
        model: the base; may be on the meta device.
        dtype: of weights and activations.
        trainable: number of adapter parameters.
        tokens: in one batch.
        longest: tokens of the longest row.
        checkpointing: whether gradient checkpointing is on.
        quantization: the recipe's section; None for a 16-bit or fp32 base.
        on_cpu: whether training runs on the CPU.
        optimizer_bytes: state of the optimizer; None for AdamW's two fp32 moments.
    """
    itemsize = dtype.itemsize
    config: PretrainedConfig = model.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    heads = getattr(config, "num_attention_heads", 1)
    per_layer = 2 * 4 * hidden + itemsize * (7 * hidden + 4 * intermediate)
    if on_cpu:  # attention saves the probabilities of short rows, see model/packed_attention.py
        per_layer += itemsize * heads * min(longest, 320)
    saved = itemsize * hidden * layers + per_layer if checkpointing else per_layer * layers
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return MemoryPlan(
        weights=_weight_bytes(model, dtype, quantization),
        adapter=trainable * (4 + 4) + (8 * trainable if optimizer_bytes is None else optimizer_bytes),
        activations=saved * tokens,
        logits=vocabulary * LOGITS_BYTES_PER_ID,
        process=PROCESS_BYTES if on_cpu else 0,
    )


def _weight_bytes(model: PreTrainedModel, dtype: torch.dtype, quantization: QuantizationSpec | None) -> int:
    total: int = sum(p.numel() for p in model.parameters())
    if quantization is None:
        return total * int(dtype.itemsize)
    quantized: int = sum(m.weight.numel() for m in linear_layers(model).values() if isinstance(m, nn.Linear))
    # Scales: one fp32 per 64 weights, or about 0.127 bits per weight if they are quantized too (QLoRA, section 3).
    scales = 0.127 / 8 if quantization.double_quant else 4 / 64
    per_weight = 1.0 if quantization.bits == 8 else 0.5 + scales
    return int(quantized * per_weight) + (total - quantized) * int(dtype.itemsize)


def available_memory(device: torch.device) -> int:
    """Return the bytes that are free on `device` now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
