"""The dtype that a run computes in follows the device; a dtype that it only emulates is told."""

import re

import pytest
import torch

from lora_cli.model import device
from lora_cli.model.device import describe_emulation, multiplies, pick_dtype, resolve_compute_dtype
from lora_cli.recipe.schema import QuantizationSpec

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NF4 = QuantizationSpec(bits=4)
NF4_BF16 = QuantizationSpec(bits=4, compute_dtype="bfloat16")


def have_instructions(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True))


@pytest.mark.parametrize("instructions", [(), ("amx_bf16",), ("avx512_bf16",), ("bf16",), ("amx_fp16",)])
def test_the_dtype_follows_the_cpu_also_over_a_4_bit_base(
    instructions: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    have_instructions(monkeypatch, *instructions)
    expected = torch.bfloat16 if any("bf16" in name for name in instructions) else torch.float32
    assert pick_dtype("auto", CPU) == expected
    assert pick_dtype("auto", CPU, NF4) == expected
    assert resolve_compute_dtype(NF4, expected) == expected
    assert pick_dtype("auto", CPU, NF4_BF16) == torch.bfloat16
    assert pick_dtype("float16", CPU, NF4_BF16) == torch.float16
    assert multiplies(CPU, torch.float16) == ("amx_fp16" in instructions)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_the_dtype_follows_the_gpu(has_bf16: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert pick_dtype("auto", GPU) == (torch.bfloat16 if has_bf16 else torch.float16)
    assert pick_dtype("auto", GPU, NF4) == (torch.bfloat16 if has_bf16 else torch.float16)
    assert multiplies(GPU, torch.float16)


@pytest.mark.parametrize(("gpus", "rank", "index"), [(1, "0", 0), (8, "5", 5), (1, "5", 0), (2, "3", 1), (2, "-1", 0)])
def test_the_gpu_of_a_process_is_one_that_it_sees(gpus: int, rank: str, index: int, monkeypatch: pytest.MonkeyPatch):
    """Under Slurm, a process of any rank may see its own GPU alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert device.pick_device() == torch.device("cuda", index)


def test_an_emulated_dtype_is_told_with_its_key_and_its_cost(monkeypatch: pytest.MonkeyPatch):
    have_instructions(monkeypatch)
    monkeypatch.setattr(device, "_slowdown", lambda dtype, device: 39.6)
    assert describe_emulation(torch.float32, NF4, CPU) == []
    expected = "note: this CPU has no instructions for bfloat16: a matrix product takes 40 times the time of float32; "
    end = ": auto takes what is fast here"
    assert describe_emulation(torch.bfloat16, NF4_BF16, CPU) == [f"{expected}model.dtype{end}"]
    assert describe_emulation(torch.float32, NF4_BF16, CPU) == [f"{expected}quantization.compute_dtype{end}"]
    have_instructions(monkeypatch, "avx512_bf16")
    assert describe_emulation(torch.bfloat16, NF4_BF16, CPU) == []


def test_the_cost_is_measured(monkeypatch: pytest.MonkeyPatch):
    have_instructions(monkeypatch)
    monkeypatch.setattr(device, "MIN_SLOWDOWN", 0.0)
    (line,) = describe_emulation(torch.bfloat16, None, CPU)
    assert re.search(r"takes \d+ times the time of float32", line)
