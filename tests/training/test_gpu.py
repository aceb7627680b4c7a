"""Settings of a process that trains on a GPU, and of the workers of several GPUs."""

import os

import pytest
import torch

from lora_cli.training import gpu


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*gpu.ALLOCATOR_SETTINGS, "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
        monkeypatch.delenv(name, raising=False)


def test_the_allocator_grows_its_blocks_unless_the_user_has_set_it(monkeypatch: pytest.MonkeyPatch):

    gpu.set_up_allocator()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    gpu.set_up_allocator()
    assert "PYTORCH_ALLOC_CONF" not in os.environ


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "highest"), (torch.bfloat16, "high")])
def test_tf32_is_used_only_where_the_run_is_not_in_float32(
    dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
):
    found: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", found.append)
    gpu.set_up_gpu(dtype)
    assert found == [precision]


@pytest.mark.parametrize(("gpus", "works", "set_names"), [(1, False, 0), (2, True, 0), (2, False, 2)])
def test_links_that_hang_are_switched_off(gpus: int, works: bool, set_names: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(gpu, "check_cuda_p2p_ib_support", lambda: works)
    assert len(gpu.link_settings()) == set_names
    monkeypatch.setenv("NCCL_P2P_DISABLE", "0")
    assert "NCCL_P2P_DISABLE" not in gpu.link_settings()  # the user has decided
