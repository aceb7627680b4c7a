"""4-bit and 8-bit quantization: the recipe's section as BitsAndBytesConfig, and k-bit training preparation."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitsAndBytesConfig, PreTrainedModel

from lora_cli.errors import LoraError
from lora_cli.model.device import resolve_compute_dtype
from lora_cli.model.multimodal import is_inside, outside_text
from lora_cli.model.quantize_experts import register_quantizers
from lora_cli.recipe.schema import QuantizationSpec

BLOCK_SIZE = 64  # weights that share one scale
NOT_RUN = (TypeError, AttributeError, RuntimeError, ValueError, IndexError)  # by a layer that needs another input


def bnb_config(spec: QuantizationSpec, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the recipe's quantization of a model of `dtype` as a BitsAndBytesConfig.

    4-bit is QLoRA's storage (Dettmers et al., arXiv:2305.14314, section 3): 4-bit codes, and scales that may be
    quantized too. 8-bit is LLM.int8. Loading with 4 bits packs the stacked weights of experts too.
    """
    register_quantizers()
    if spec.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    assert spec.storage_dtype is not None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.type,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=resolve_compute_dtype(spec, dtype),
        bnb_4bit_quant_storage=getattr(torch, spec.storage_dtype),
    )


def prepare_for_kbit_training(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Freeze a quantized base; norms compute in fp32, as QLoRA's authors do, everything else unquantized in `dtype`.

    Most norms compute in fp32 whatever the dtype of their input, and need nothing. Embeddings, output head and hidden
    states are in `dtype`, whatever dtype a pre-quantized checkpoint stores them in. PEFT's function of this name
    converts them to fp32, which doubles the memory of the largest unquantized tensors.
    """
    for module in model.modules():
        norm = _is_norm(module)
        if norm or type(module) is nn.Linear or isinstance(module, nn.Embedding):
            module.to(dtype)
        if norm and dtype in (torch.float16, torch.bfloat16) and not _computes_in_fp32(module):
            module.to(torch.float32)
            module.register_forward_pre_hook(_as_fp32)
            module.register_forward_hook(_back_to(dtype))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.device.type == "cpu" and parameter.is_floating_point():
            # The tensor is a view of the memory-mapped checkpoint, which stays in memory while any tensor refers to it.
            parameter.data = parameter.data.clone()
    return model


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("RMSNorm", "LayerNorm"))


class _RootDtypes(TorchDispatchMode):
    """Records the dtypes that roots are taken in: float32 for the operations of torch that do it in their kernel."""

    KERNELS = ("native_layer_norm", "_fused_rms_norm")  # they accumulate in fp32

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("rsqrt", "sqrt"):
            self.found.add(args[0].dtype)
        elif name in self.KERNELS:
            self.found.add(torch.float32)
        elif name == "pow" and args[1] == -0.5:
            self.found.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def _computes_in_fp32(norm: nn.Module) -> bool:
    """Return whether `norm` computes in fp32 for an input in the dtype of its weight: it is run on one.

    A norm that needs more than its input, a gate for example, or another shape, counts as one that does not.
    """
    weight = norm._parameters.get("weight")
    if weight is None:
        return False
    with torch.no_grad(), _RootDtypes() as roots, suppress(*NOT_RUN):
        norm(weight.new_ones(1, 1, weight.shape[-1]))
    return bool(roots.found == {torch.float32})


def _as_fp32(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].float(), *args[1:])


def _back_to(dtype: torch.dtype) -> Any:
    def cast(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.to(dtype)

    return cast


def is_quantized(model: PreTrainedModel) -> bool:
    """Return whether transformers loaded `model` quantized, by its own config or by the recipe's section."""
    return getattr(model, "hf_quantizer", None) is not None


def quantized_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Return the bytes of the 4-bit layers' codes and scales, and the number of weights that they store."""
    size = weights = 0
    # The layer has the scales of codes that are sharded.
    sharded = {id(layer.weight): layer.quant_state for layer in model.modules() if isinstance(layer, Linear4bit)}
    for weight in model.parameters():  # by modules, an adapted weight would count twice: PEFT's layer shows its base's
        state = getattr(weight, "quant_state", None) or sharded.get(id(weight))
        if state is not None:
            weights += state.shape.numel()
            nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
            parts = [weight, state.absmax, *nested]  # the table of 16 code values is shared
            size += sum(part.numel() * part.element_size() for part in parts)
    return size, weights


def check_cpu_4bit(model: PreTrainedModel, device: torch.device) -> None:
    """Prevent two bugs of bitsandbytes' CPU kernels (0.50) from affecting results; a GPU is not affected.

    First, on a CPU with AVX512-BF16, the first forward pass in eval mode repacks 4-bit weights permanently, and the
    kernel for repacked weights has no backward pass: training after an evaluation would pass no gradient through the
    base, without an error. A flag of the layer disables that. The second is that of `check_cpu_widths`.

    Raises:
        LoraError: as `check_cpu_widths`.
    """
    packed = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and hasattr(module, "support_avx512bf16_for_cpu"):  # Linear4bit
            layer: Any = module
            layer.support_avx512bf16_for_cpu = False
            packed[name] = module
    if device.type == "cpu":
        check_cpu_widths(model, packed)


def check_cpu_widths(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> None:
    """Check the widths of `layers`, the 4-bit layers of `model` by name, or those that would be, on the CPU.

    If in_features is not a multiple of 64, bitsandbytes' CPU kernel applies another block's scale. Layers that text
    does not pass through are never used.

    Raises:
        LoraError: a layer has such an in_features.
    """
    towers = [part.name for part in outside_text(model)]
    unaligned = {
        name.rpartition(".")[2]: layer.in_features
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear) and layer.in_features % BLOCK_SIZE and not is_inside(name, towers)
    }
    if unaligned:
        listed = ", ".join(f"{kind} ({width:,})" for kind, width in unaligned.items())
        raise LoraError(
            f"quantization: on the CPU, in_features of 4-bit layers must be a multiple of {BLOCK_SIZE}; found {listed}",
            hint="use a GPU, bits: 8, or leave quantization out",
        )
