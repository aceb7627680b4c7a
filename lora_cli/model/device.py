"""Choose the device (GPU or CPU) of this process, and the dtype that it computes in."""

import time

import torch

from lora_cli.recipe.schema import QuantizationSpec
from lora_cli.run.worker import local_rank

MIN_SLOWDOWN = 1.5  # of a dtype that is told
# By dtype, the instructions of CPUs that multiply it, by torch's name; without one of them, it is emulated.
CPU_INSTRUCTIONS = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16", "fp16_arith"),
}


def pick_device() -> torch.device:
    """Return the GPU of this process (LOCAL_RANK), or the CPU where there is no GPU.

    Under Slurm each process may see only its own GPU, whatever its rank.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a small tensor of the CPU to `device`; from page-locked memory, so that the host does not wait for a GPU."""
    return tensor if device.type == "cpu" else _pinned(tensor).to(device, non_blocking=True)


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def pick_dtype(name: str, device: torch.device, quantization: QuantizationSpec | None = None) -> torch.dtype:
    """Return the dtype of weights and compute; `auto`: bfloat16 where `device` multiplies it in hardware.

    Without it, a GPU computes in float16, with a loss scale, and a CPU in float32.

    Over a 4-bit base, `auto` is the compute dtype of the 4-bit layers, so that no activation is cast between layers.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if quantization is not None and quantization.bits == 4 and quantization.compute_dtype != "auto":
        return resolve_compute_dtype(quantization, torch.float32)
    if multiplies(device, torch.bfloat16):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def describe_emulation(dtype: torch.dtype, quantization: QuantizationSpec | None, device: torch.device) -> list[str]:
    """Return a line for each dtype that a run on `device` computes in, and that the device only emulates.

    Args:
        dtype: of the model.
        quantization: with its compute dtype; None for none.
        device: of the run.
    """
    keys = {dtype: "model.dtype"}
    if quantization is not None and quantization.bits == 4:
        keys.setdefault(resolve_compute_dtype(quantization, dtype), "quantization.compute_dtype")
    lines = []
    for each, key in keys.items():
        if not multiplies(device, each) and (slowdown := _slowdown(each, device)) > MIN_SLOWDOWN:
            name, kind = str(each).removeprefix("torch."), "GPU" if device.type == "cuda" else "CPU"
            lines.append(
                f"note: this {kind} has no instructions for {name}: a matrix product takes {slowdown:.0f} times the "
                f"time of float32; {key}: auto takes what is fast here"
            )
    return lines


def resolve_compute_dtype(spec: QuantizationSpec, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that 4-bit weights are dequantized to in a model of `dtype`."""
    compute_dtype: torch.dtype = dtype if spec.compute_dtype == "auto" else getattr(torch, spec.compute_dtype)
    return compute_dtype


def multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether `device` multiplies matrices of `dtype` in hardware."""
    if dtype not in CPU_INSTRUCTIONS:
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in CPU_INSTRUCTIONS[dtype])


def _slowdown(dtype: torch.dtype, device: torch.device) -> float:
    """Measure how many times longer a matrix product takes in `dtype` than in float32."""
    seconds = {}
    for each in (torch.float32, dtype):
        a, b = torch.ones(64, 512, dtype=each, device=device), torch.ones(512, 512, dtype=each, device=device)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            float((a @ b)[0, 0])  # waits for a GPU
            times.append(time.perf_counter() - start)
        seconds[each] = min(times)
    return seconds[dtype] / seconds[torch.float32]
