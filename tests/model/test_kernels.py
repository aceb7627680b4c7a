"""Kernels of libraries are chosen for GPUs, told, and compute what the model computes: liger-kernel, interpreted."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama
from triton.errors import TritonError

from lora_cli.errors import LoraError
from lora_cli.model import kernels
from tests.model import zoo
from tests.model.families import FAMILIES as EXPERT_FAMILIES
from tests.model.families import config_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FAMILIES = ("llama", "qwen3", "gemma2")


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


AUTO = kernels.KernelChoice("liger", "auto")


def apply(model: Any, setting: str = "liger") -> kernels.KernelChoice:
    return kernels.apply_kernels(model, AUTO, setting=setting)


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
        apply(model)
    assert raised.value.hint == "write `performance: {kernels: none}`"


def test_kernels_that_compute_the_same_are_taken_and_the_mode_of_the_model_stays(monkeypatch: pytest.MonkeyPatch):
    same = kernels.KERNELS["liger"]._replace(apply=lambda model: replace_norms(model, 1 + 1e-7))
    monkeypatch.setitem(kernels.KERNELS, "liger", same)
    model = zoo.make("llama").train()
    choice = apply(model, "auto")
    assert choice.line().startswith("kernels: liger (auto; logits differ by ")
    assert choice.reason.endswith(("e-07 of the largest", "e-06 of the largest"))
    assert model.training


class WrongCompiler(subprocess.CalledProcessError):
    def __init__(self) -> None:
        super().__init__(1, ["gcc"])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (AttributeError("'LlamaModel' has no attribute 'norm'\nmore"), "'LlamaModel' has no attribute 'norm'"),
        (AssertionError("no"), "no"),
        (WrongCompiler(), "Command '['gcc']' returned non-zero exit status 1."),
        (TritonError("kernel"), "kernel"),
    ],
)
def test_kernels_that_do_not_run_leave_the_model_as_it_was(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
):
    def fail(model: Any) -> None:
        replace_norms(model, 2.0)
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", None)
        raise error

    monkeypatch.setitem(kernels.KERNELS, "liger", kernels.KERNELS["liger"]._replace(apply=fail))
    model, ids = zoo.make("llama"), torch.arange(3, 12)[None]
    before = model(ids).logits
    assert apply(model, "auto").line() == f"kernels: none (liger does not run on this model: {told})"
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(LoraError) as raised:
        apply(model)
    assert raised.value.message == f"performance.kernels: liger does not run on this model: {told}"
    assert torch.equal(model(ids).logits, before)


def test_too_little_memory_is_not_taken_for_kernels_that_do_not_run(monkeypatch: pytest.MonkeyPatch):
    def fail(model: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setitem(kernels.KERNELS, "liger", kernels.KERNELS["liger"]._replace(apply=fail))
    with pytest.raises(torch.OutOfMemoryError):
        apply(zoo.make("llama"), "auto")


def test_the_experts_of_a_model_keep_their_own_function(monkeypatch: pytest.MonkeyPatch):
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        "liger_kernel.transformers._apply_liger_kernel_to_instance", lambda **kwargs: given.update(kwargs)
    )
    kernels.KERNELS["liger"].apply(zoo.make("llama"))
    assert "swiglu" not in given
    kernels.KERNELS["liger"].apply(AutoModelForCausalLM.from_config(config_of(EXPERT_FAMILIES["qwen3-moe"])))
    assert given["swiglu"] is False


@pytest.mark.slow
def test_liger_computes_the_logits_loss_and_gradients_of_the_model():
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.support.interpreted_liger", *FAMILIES]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    results = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [result["family"] for result in results] == list(FAMILIES), ended.stderr[-2000:]
    for result in results:
        assert {name[-3:] for name in result["replaced"]} == {"MLP", "orm"}, result
        # The MLP is one step over the functions of these kernels.
        assert result["mlp"] == ["LigerGEGLUMLP" if result["family"] == "gemma2" else "LigerSwiGLUMLP"], result
        assert result["rotary"] == "liger_rotary_pos_emb", result
        assert result["choice"].startswith("kernels: liger (test; logits differ by "), result
        assert result["loss"] < 1e-5, result
        assert result["gradient"] < 1e-5, result
