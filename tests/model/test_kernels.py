"""Kernels of libraries are chosen for GPUs, told, and compute what the model computes: liger-kernel, interpreted."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from lora_cli.errors import LoraError
from lora_cli.model import kernels
from tests.model import zoo

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FAMILIES = ("llama", "qwen3", "gemma2", "granite")


def choose(setting: Any = "auto", *, model_type: str = "llama", device: torch.device = GPU, task: Any = "causal-lm"):
    return kernels.choose_kernels(setting, model_type=model_type, device=device, task=task)


def test_liger_is_chosen_on_a_gpu_for_architectures_it_has():
    assert choose() == kernels.KernelChoice("liger", "auto")
    assert choose("liger").line() == "kernels: liger (performance.kernels)"
    assert choose("none").name == "none"


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ({"device": CPU}, "they need a GPU, and the run is on the CPU"),
        ({"model_type": "falcon"}, "liger has none for falcon models"),
        ({"task": "seq-cls"}, "liger is for language models, and task is seq-cls"),
    ],
)
def test_the_reason_is_told_where_auto_takes_none_and_raised_where_liger_is_requested(where: Any, reason: str):
    assert choose(**where) == kernels.KernelChoice("none", reason)
    with pytest.raises(LoraError, match=reason):
        choose("liger", **where)


def test_a_package_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch):
    absent = kernels.KERNELS["liger"]._replace(package="not_installed_anywhere")
    monkeypatch.setitem(kernels.KERNELS, "liger", absent)
    assert choose().line() == "kernels: none (liger is not installed)"
    with pytest.raises(LoraError) as raised:
        choose("liger")
    assert raised.value.hint == "pip install 'lora-cli[liger]', or write none"


def replace_norms(model: Any, scale: float) -> None:
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            own = module.forward
            module.forward = lambda x, own=own: own(x) * scale


@pytest.mark.parametrize("scale", [1.01, float("nan")])
def test_kernels_that_compute_something_else_are_refused(scale: float, monkeypatch: pytest.MonkeyPatch):
    wrong = kernels.KERNELS["liger"]._replace(apply=lambda model: replace_norms(model, scale))
    monkeypatch.setitem(kernels.KERNELS, "liger", wrong)
    model = zoo.make("llama")
    with pytest.raises(LoraError, match="liger computes something else on this model: logits differ by") as raised:
        kernels.apply_kernels(model, "liger")
    assert raised.value.hint == "write `performance: {kernels: none}`"


def test_kernels_that_compute_the_same_are_taken_and_the_mode_of_the_model_stays(monkeypatch: pytest.MonkeyPatch):
    same = kernels.KERNELS["liger"]._replace(apply=lambda model: replace_norms(model, 1 + 1e-7))
    monkeypatch.setitem(kernels.KERNELS, "liger", same)
    model = zoo.make("llama").train()
    assert 0 < kernels.apply_kernels(model, "liger") < 1e-5
    assert model.training


def _fail(model: Any) -> None:
    raise AttributeError("'LlamaModel' object has no attribute 'norm'\nmore")


def test_kernels_that_do_not_run_are_an_error_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(kernels.KERNELS, "liger", kernels.KERNELS["liger"]._replace(apply=_fail))
    with pytest.raises(
        LoraError, match=r"liger does not run on this model: 'LlamaModel' object has no attribute 'norm'$"
    ):
        kernels.apply_kernels(zoo.make("llama"), "liger")


@pytest.mark.slow
def test_liger_computes_the_logits_loss_and_gradients_of_the_model():
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.support.interpreted_liger", *FAMILIES]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    results = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [result["family"] for result in results] == list(FAMILIES), ended.stderr[-2000:]
    for result in results:
        assert {name[-3:] for name in result["replaced"]} == {"MLP", "orm"}, result
        assert result["rotary"] == "liger_rotary_pos_emb", result
        assert max(result["logits"], result["loss"]) < 1e-5, result
        assert result["gradient"] < 1e-5, result
