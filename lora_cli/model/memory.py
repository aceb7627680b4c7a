"""Estimate the peak memory of a training step, part by part, from the model's shapes alone."""

import os
from typing import NamedTuple

import psutil
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lora_cli.model.experts import expert_weights, is_packable
from lora_cli.model.head_loss import chunk_tokens
from lora_cli.model.target_modules import linear_layers
from lora_cli.recipe.schema import QuantizationSpec

GIB = 1 << 30
PROCESS_BYTES = 700 << 20  # resident memory of Python, torch and transformers (measured on Linux)
LOGITS_COPIES = 3  # of a chunk of logits, fp32: see model/head_loss.py


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
    every: int | None,
    quantization: QuantizationSpec | None,
    on_cpu: bool,
    mlp_values: int | None = None,
    optimizer_bytes: int | None = None,
) -> MemoryPlan:
    """Estimate the bytes of a training step at its peak.

    Activations per token and layer of a decoder with a gated MLP (h: hidden size, i: intermediate size): two norms save
    their inputs in fp32 (8h bytes), the projections save their inputs (4h + i values), attention saves q, k and v (3h),
    and the gate saves three more (3i). An MLP that runs as one step keeps `mlp_values` times i in place of the 4i. This
    counts the tensors that the backward pass needs, as Korthikanti et al. (arXiv:2205.05198, section 4.1) do for full
    training; frozen weights need fewer.

    Args:
        model: the base; may be on the meta device.
        dtype: of weights and activations.
        trainable: number of adapter parameters.
        tokens: in one batch.
        longest: tokens of the longest row.
        every: of how many layers one is recomputed (gradient checkpointing); None: none is.
        quantization: the recipe's section; None for a 16-bit or fp32 base.
        on_cpu: whether training runs on the CPU.
        mlp_values: of `fused_mlp.values_kept`.
        optimizer_bytes: state of the optimizer; None for AdamW's two fp32 moments.
    """
    itemsize = dtype.itemsize
    config: PretrainedConfig = model.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    heads = getattr(config, "num_attention_heads", 1)
    between = 4 if mlp_values is None or expert_weights(model) else mlp_values
    per_layer = 2 * 4 * hidden + itemsize * (7 * hidden + between * intermediate)
    if on_cpu:  # attention saves the probabilities of short rows, see model/packed_attention.py
        per_layer += itemsize * heads * min(longest, 320)
    per_layer += itemsize * _expert_values(model, config)
    recomputed = 0 if every is None else -(-layers // every)
    # Of a recomputed layer its input is saved; one at a time has all that it saves otherwise.
    saved = itemsize * hidden * recomputed + per_layer * (layers - recomputed + min(recomputed, 1))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return MemoryPlan(
        weights=_weight_bytes(model, dtype, quantization),
        adapter=trainable * (4 + 4) + (8 * trainable if optimizer_bytes is None else optimizer_bytes),
        activations=saved * tokens + _dense_expert_bytes(model, itemsize),
        logits=vocabulary * chunk_tokens(vocabulary, torch.device("cpu" if on_cpu else "cuda")) * LOGITS_COPIES * 4,
        process=PROCESS_BYTES if on_cpu else 0,
    )


def _weight_bytes(model: PreTrainedModel, dtype: torch.dtype, quantization: QuantizationSpec | None) -> int:
    total: int = sum(p.numel() for p in model.parameters())
    if quantization is None:
        return total * int(dtype.itemsize)
    quantized = sum(quantized_sizes(model, quantization).values())
    # Scales: one fp32 per 64 weights, or about 0.127 bits per weight if they are quantized too (QLoRA, section 3).
    scales = 0.127 / 8 if quantization.double_quant else 4 / 64
    per_weight = 1.0 if quantization.bits == 8 else 0.5 + scales
    return int(quantized * per_weight) + (total - quantized) * int(dtype.itemsize)


def quantized_sizes(model: PreTrainedModel, quantization: QuantizationSpec) -> dict[str, int]:
    """Return the number of weights of each parameter that loading with `quantization` quantizes, by full name.

    These are the linear layers without the output head, and with 4 bits the stacked weights of experts.
    """
    layers = linear_layers(model).items()
    sizes = {f"{name}.weight": layer.weight.numel() for name, layer in layers if isinstance(layer, nn.Linear)}
    if quantization.bits == 4:
        weights = expert_weights(model).items()
        sizes |= {name: weight.shape.numel() for name, weight in weights if is_packable(weight.shape)}
    return sizes


def _expert_values(model: PreTrainedModel, config: PretrainedConfig) -> int:
    """Return the values that the experts of one layer save for each token, in addition to those of a dense MLP.

    Each of the k experts of a token saves a copy of its input and its output (2h), and four times the values between
    its two products (4i), as the dense MLP does that the estimate counts already.
    """
    if not expert_weights(model):
        return 0
    k = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None) or 1
    dense: int = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    inner: int = getattr(config, "moe_intermediate_size", None) or dense
    return max(0, int(k) * (2 * int(config.hidden_size) + 4 * inner) - 4 * dense)


def _dense_expert_bytes(model: PreTrainedModel, itemsize: int) -> int:
    """Return the bytes of W + scale·BA in fp32 and in the compute dtype, and of its gradient.

    Only experts with a forward function of their own need them, one layer at a time: see `experts_lora.py`.
    """
    own = [w.shape.numel() for w in expert_weights(model).values() if not hasattr(w.module, "has_gate")]
    return max(own, default=0) * (4 + 4 + 2 * itemsize)


def available_memory(device: torch.device) -> int:
    """Return the bytes that are free on `device` now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def free_for_process(device: torch.device) -> int:
    """Return the bytes that one process may take: those of a run on one machine see the same free host memory."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if device.type == "cpu" else 1
    return available_memory(device) // processes


def fits_in_memory(parameters: int) -> bool:
    """Return whether two models of `parameters` parameters each fit into memory in fp32, with room for computing."""
    return 2 * 4 * parameters * 1.2 + PROCESS_BYTES < available_memory(torch.device("cpu"))
