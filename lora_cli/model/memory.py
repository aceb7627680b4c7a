"""What a training step will hold in memory, part by part, from the model's shapes alone."""

from typing import NamedTuple

import psutil
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lora_cli.model.target_modules import linear_layers
from lora_cli.recipe.schema import QuantizationSpec

GIB = 1 << 30
PROCESS_BYTES = 700 << 20  # Python, torch and transformers themselves, resident (measured on Linux)
LOGITS_BYTES_PER_ID = 256 * 3 * 4  # chunk of supervised tokens, three fp32 copies: see model/loss.py


class MemoryPlan(NamedTuple):
    """Bytes of each part at the peak of a training step on one device; an estimate for decoder models."""

    weights: int
    adapter: int  # fp32 weights and gradients, and AdamW's two moments
    activations: int
    logits: int
    process: int  # on the CPU only: the libraries

    @property
    def total(self) -> int:
        """Bytes in all."""
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
    moment_bytes: int = 4,
) -> MemoryPlan:
    """Estimate for batches of `tokens` tokens in rows of up to `longest`, with `trainable` adapter parameters,
    and `moment_bytes` for each of AdamW's moments.

    Activations per token and layer, h hidden, i intermediate size, in a decoder with a gated MLP: two norms keep
    their input in fp32 (8h), the projections their inputs (4 times h, and i), attention its q, k, v, and the gate
    three more of i. This counts tensors that the backward pass needs, as Korthikanti et al. (arXiv:2205.05198,
    section 4.1) do for full training; frozen weights need fewer.
    """
    size = dtype.itemsize
    config: PretrainedConfig = model.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    heads = getattr(config, "num_attention_heads", 1)
    per_layer = 2 * 4 * hidden + size * (7 * hidden + 4 * inner)
    if on_cpu:  # score matrices of short rows are kept, see model/packed_attention.py
        per_layer += size * heads * min(longest, 320)
    kept = size * hidden * layers + per_layer if checkpointing else per_layer * layers
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return MemoryPlan(
        weights=_weight_bytes(model, dtype, quantization),
        adapter=trainable * (4 + 4 + 2 * moment_bytes),
        activations=kept * tokens,
        logits=vocabulary * LOGITS_BYTES_PER_ID,
        process=PROCESS_BYTES if on_cpu else 0,
    )


def _weight_bytes(model: PreTrainedModel, dtype: torch.dtype, quantization: QuantizationSpec | None) -> int:
    whole: int = sum(p.numel() for p in model.parameters())
    if quantization is None:
        return whole * int(dtype.itemsize)
    packed: int = sum(m.weight.numel() for m in linear_layers(model).values() if isinstance(m, nn.Linear))
    # Scales: one fp32 per 64 weights, or about 0.127 bits a weight where they are quantised too (QLoRA, section 3).
    scales = 0.127 / 8 if quantization.double_quant else 4 / 64
    per_weight = 1.0 if quantization.bits == 8 else 0.5 + scales
    return int(packed * per_weight) + (whole - packed) * int(dtype.itemsize)


def available_memory(device: torch.device) -> int:
    """Bytes that are free on `device` now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
