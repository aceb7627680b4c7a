"""Choose the device (GPU or CPU) of this process, and the dtype that it computes in."""

import os

import torch

from lora_cli.recipe.schema import QuantizationSpec


def pick_device() -> torch.device:
    """Return the GPU of this process (LOCAL_RANK), or the CPU where there is no GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def pick_dtype(name: str, device: torch.device, quantization: QuantizationSpec | None = None) -> torch.dtype:
    """Return the dtype of weights and compute; `auto`: bfloat16 where `device` multiplies it in hardware, else float32.

    Over a 4-bit base, `auto` is the compute dtype of the 4-bit layers, so that no activation is cast between layers.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if quantization is not None and quantization.bits == 4:
        computed: torch.dtype = getattr(torch, quantization.compute_dtype)
        return computed
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32


def _cpu_multiplies_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
