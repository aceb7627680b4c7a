"""Settings of a process that trains on a GPU, and of the workers of several GPUs."""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from lora_cli.errors import LoraError
from lora_cli.recipe.schema import Recipe
from lora_cli.training import gpu, process_group
from lora_cli.training.device_errors import device_errors_as_lora_error


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


@pytest.fixture
def nothing_deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC", raising=False)
    benchmark, fill = torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory = benchmark, fill


@pytest.mark.usefixtures("nothing_deterministic")
def test_deterministic_operations_are_requested_of_every_library(monkeypatch: pytest.MonkeyPatch):
    def accelerator(**_: object) -> SimpleNamespace:
        return SimpleNamespace(num_processes=1, deterministic=torch.are_deterministic_algorithms_enabled())

    monkeypatch.setattr(process_group, "Accelerator", accelerator)
    monkeypatch.setattr(process_group, "set_up_cpu", lambda _: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    join: Any = process_group.join_processes
    assert not join(torch.device("cpu"), deterministic=True).deterministic  # the CPU's are anyway
    assert not join(torch.device("cuda")).deterministic
    assert join(torch.device("cuda"), deterministic=True).deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"


@pytest.mark.usefixtures("nothing_deterministic")
def test_an_operation_that_is_not_deterministic_is_an_error_that_names_the_key():
    gpu.set_up_determinism()
    recipe = Recipe.model_validate({"model": {"path": "base"}, "data": {"train": "rows.jsonl"}})
    with (
        pytest.raises(
            LoraError, match=r"^performance\.deterministic: torch has no deterministic form of put_, which"
        ) as raised,
        device_errors_as_lora_error(recipe, Accelerator(cpu=True), sharded=False),
    ):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
    assert raised.value.hint == "write `performance: {deterministic: false}`"
