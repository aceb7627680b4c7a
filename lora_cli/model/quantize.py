"""The recipe's quantization section as bitsandbytes takes it, and a quantised base made ready for training on it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from lora_cli.errors import LoraError
from lora_cli.recipe.schema import QuantizationSpec

BLOCK_SIZE = 64  # weights that share a scale


def bnb_config(spec: QuantizationSpec) -> BitsAndBytesConfig:
    """QLoRA's storage (Dettmers et al., arXiv:2305.14314, section 3): 4-bit codes, scales quantised too; or int8."""
    if spec.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    assert spec.storage_dtype is not None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.type,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, spec.compute_dtype),
        bnb_4bit_quant_storage=getattr(torch, spec.storage_dtype),
    )


def prepare_for_kbit_training(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Freeze a quantised base, and compute its norms in fp32, as QLoRA's authors do; all else that is whole in `dtype`.

    Embeddings, head and what flows between the layers are in `dtype`, whatever a checkpoint that was quantised before
    has them in. PEFT's own preparation makes all of them fp32, which doubles the memory of the largest tensors left.
    """
    for module in model.modules():
        norm = _is_norm(module)
        if norm or type(module) is nn.Linear or isinstance(module, nn.Embedding):
            module.to(dtype)
        if norm and dtype in (torch.float16, torch.bfloat16):
            module.to(torch.float32)
            module.register_forward_pre_hook(_as_fp32)
            module.register_forward_hook(_back_to(dtype))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.device.type == "cpu" and parameter.is_floating_point():
            # It lies in the mapped file of the whole checkpoint, which stays in memory as long as one tensor does.
            parameter.data = parameter.data.clone()
    return model


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("RMSNorm", "LayerNorm"))


def _as_fp32(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return (given[0].float(), *given[1:])


def _back_to(dtype: torch.dtype) -> Any:
    def cast(_: nn.Module, given: Any, output: Tensor) -> Tensor:
        return output.to(dtype)

    return cast


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether transformers loaded it with packed weights, its own or those of the recipe's section."""
    return getattr(model, "hf_quantizer", None) is not None


def quantized_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Bytes that the 4-bit layers' codes and scales take, and how many weights they hold."""
    taken = held = 0
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            held += state.shape.numel()
            nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
            parts = [module.weight, state.absmax, *nested]  # the code of 16 values is bitsandbytes', once for all
            taken += sum(part.numel() * part.element_size() for part in parts)
    return taken, held


def check_cpu_4bit(model: PreTrainedModel) -> None:
    """Keep two faults of bitsandbytes' CPU kernels (0.50) out of the results; nothing to do on a GPU.

    At the first forward in eval mode on a CPU with AVX512-BF16 it packs 4-bit weights anew, for good, and the product
    with packed weights has no backward: training after an evaluation would pass no gradient through the base,
    silently. And where a row of weights is no whole number of blocks, it gives blocks the scales of others.

    Raises:
        LoraError: the model has such rows.
    """
    ragged = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and hasattr(module, "support_avx512bf16_for_cpu"):  # Linear4bit
            layer: Any = module
            layer.support_avx512bf16_for_cpu = False
            if module.weight.device.type == "cpu" and module.in_features % BLOCK_SIZE:
                ragged[name.rpartition(".")[2]] = module.in_features
    if ragged:
        listed = ", ".join(f"{kind} ({width:,})" for kind, width in ragged.items())
        raise LoraError(
            f"quantization: on the CPU, 4-bit layers take inputs of a multiple of {BLOCK_SIZE} only; not so: {listed}",
            hint="use a GPU, bits: 8, or leave quantization out",
        )
