"""Fixtures of the GPU laws: the device is the GPU where there is one, else the CPU with a stub of torch's kernel."""

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from lora_cli.model import varlen_attention
from lora_cli.model.device import pick_device
from tests.support.eager_varlen import use_eager_varlen


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return the device that every law of this folder is tested on."""
    return pick_device()


@pytest.fixture(autouse=True)
def kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace torch's variable-length kernel on the CPU, where it does not run; multiply float32 without TF32."""
    torch.set_float32_matmul_precision("highest")
    if device.type == "cpu":
        use_eager_varlen(monkeypatch)


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """Return the GPU; skip the test without one."""
    if device.type != "cuda":
        pytest.skip("needs a GPU: this law is about its memory or its queue of kernels")
    return device


@pytest.fixture
def kernel_dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    """Return the dtype of the parametrized test; skip it where torch's kernel does not take it."""
    dtype: torch.dtype = request.param
    if device.type == "cuda" and not varlen_attention.runs_on(device, dtype):
        pytest.skip(f"torch's variable-length kernel does not run with {dtype} on this GPU")
    return dtype


@pytest.fixture
def accelerator(device: torch.device) -> Iterator[Accelerator]:
    """Return the Accelerator of one process on the device; its state is shared by a process, so it is reset."""
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=device.type == "cpu")
    AcceleratorState._reset_state(True)
