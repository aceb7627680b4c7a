"""A saved adapter equals the trained one: plain PEFT loads it, and every difference on disk is detected."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lora_cli.errors import LoraError
from lora_cli.model import attach_adapter, fp32_weights, save_adapter
from lora_cli.recipe.methods import METHOD_FACTS, MethodName
from lora_cli.recipe.schema import AdapterSpec
from tests.model import zoo

IDS = torch.arange(3, 40)[None]


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    out: Tensor = model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return out[:, -IDS.shape[1] :]


def reload_difference(model: PeftModel, folder: Path) -> save_adapter.ReloadDifference:
    return save_adapter.compare_reloaded(model, folder, logits)


def assert_plain_peft_loads(model: PeftModel, folder: Path, family: str = "qwen2", **options: Any) -> None:
    """Save the adapter of `model` and load it with plain PEFT on a fresh base; the logits must be the same."""
    for_inference = deepcopy(model)
    fp32_weights.upcast_trainable_params(for_inference, for_inference=True)
    trained = logits(for_inference)
    fp32_weights.upcast_trainable_params(model)
    save_adapter.save_adapter(model, folder, base="org/base", revision="abc")
    assert reload_difference(model, folder) == (0, 0)
    loaded = PeftModel.from_pretrained(zoo.make(family, **options), str(folder))
    fp32_weights.upcast_trainable_params(loaded, for_inference=True)
    assert torch.equal(logits(loaded), trained)
    assert zoo.relative(logits(loaded), logits(zoo.make(family, **options))) > 1e-3
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "abc")
    modules = model.peft_config["default"].target_modules if "target_modules" in config else None
    if isinstance(modules, set):  # whose order is another one in each process
        assert config["target_modules"] == sorted(modules)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", zoo.METHODS)
def test_plain_peft_loads_the_trained_model(tmp_path: Path, method: str, dtype: torch.dtype):
    assert_plain_peft_loads(zoo.adapted(zoo.make("qwen2", dtype=dtype), method=method), tmp_path, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens", "v_proj"]},
        {"bias": "lora_only"},
        {"bias": "all", "method": "dora"},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_tokens": ["word", "another"]},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {r"layers\.0\..*_proj": 3.0}},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3.0}, "method": "pissa"},
        {"layers": [1], "exclude_modules": ["down_proj"]},
        {"freeze_a": True},
        {"dropout": 0.3},
    ],
    ids=str,
)
def test_plain_peft_loads_an_adapter_with_any_option(tmp_path: Path, options: dict[str, Any], dtype: torch.dtype):
    assert_plain_peft_loads(zoo.adapted(zoo.make("qwen2", dtype=dtype), **options), tmp_path, dtype=dtype)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[PeftModel, Path]:
    model = zoo.adapted(zoo.make("llama"))
    save_adapter.save_adapter(model, tmp_path / "adapter", base="org/base", revision=None)
    return model, tmp_path / "adapter"


def remove_a_tensor(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(list(tensors.items())[1:])


def change_one_bit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] = torch.nextafter(tensors[name][0, 0], torch.tensor(9.0))
    return tensors


def rename_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("layers.0", "layers.7"): tensor for name, tensor in tensors.items()}


def convert_to_bf16(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


@pytest.mark.parametrize("damage", [remove_a_tensor, change_one_bit, rename_tensors, convert_to_bf16])
def test_differing_tensors_in_the_saved_adapter_are_detected(saved: tuple[PeftModel, Path], damage):
    model, folder = saved
    file = folder / "adapter_model.safetensors"
    save_file(damage(load_file(file)), file)
    difference = reload_difference(model, folder)
    assert difference.tensors > 0
    with pytest.raises(LoraError, match="the written adapter differs from the trained one"):
        difference.check(torch.bfloat16)


def test_a_differing_lora_alpha_in_the_saved_config_is_detected(saved: tuple[PeftModel, Path]):
    model, folder = saved
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 9}))
    with pytest.raises(LoraError, match="differs in lora_alpha"):
        reload_difference(model, folder)


def test_a_depends_on_the_seed_and_b_is_zero():
    def initial_weights(seed: int) -> dict[str, Tensor]:
        model = attach_adapter.attach(zoo.make("llama"), AdapterSpec(rank=4), seed=seed)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    one, same, other = initial_weights(1), initial_weights(1), initial_weights(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    for name, parameter in one.items():
        assert torch.equal(parameter, other[name]) == ("lora_B" in name)
        assert bool((parameter == 0).all()) == ("lora_B" in name)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"trainable_tokens": ["word"]}])
@pytest.mark.parametrize("method", zoo.METHODS)
def test_trained_weights_are_fp32_on_a_bf16_base(method: str, options: dict[str, Any]):
    supported = {key: value for key, value in options.items() if key in METHOD_FACTS[method].options}
    model = zoo.adapted(zoo.make("qwen2", dtype=torch.bfloat16), method=method, **supported)
    fp32_weights.upcast_trainable_params(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    output = model(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    assert output.logits.dtype == torch.bfloat16
    output.logits.float().square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_dora_on_a_bf16_base_equals_plain_peft_and_starts_at_the_base(tmp_path: Path):
    """Its row norms must be computed in fp32: with the eight bits of bf16 they scale every row by up to 0.4 %."""
    base = zoo.make("qwen2", dtype=torch.bfloat16)
    exact = logits(zoo.make("qwen2"))
    bf16_error = zoo.relative(logits(base).float(), exact)  # the rounding error of the base alone
    fresh = zoo.attached(base, method="dora", seed=1)
    fp32_weights.upcast_trainable_params(fresh)
    assert zoo.relative(logits(fresh).float(), exact) < 1.5 * bf16_error
    trained = zoo.adapted(zoo.make("qwen2", dtype=torch.bfloat16), method="dora")
    fp32_weights.upcast_trainable_params(trained)
    save_adapter.save_adapter(trained, tmp_path, base="org/base", revision=None)
    plain = PeftModel.from_pretrained(zoo.make("qwen2", dtype=torch.bfloat16), str(tmp_path))
    assert torch.equal(logits(plain), logits(trained))


def test_the_tables_of_methods_have_the_same_names():
    assert attach_adapter.METHODS.keys() == METHOD_FACTS.keys() == set(get_args(MethodName))


def make_moe() -> Any:
    """Return a mixture-of-experts model that stores the weights of all experts in one parameter."""
    options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **zoo.COMMON, **options))
    return model.requires_grad_(False)


def test_each_trained_parameter_of_experts_is_counted_once():
    model = zoo.adapted(make_moe())
    layers = attach_adapter.adapted_layers(model)
    assert sum(layers.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {name.rpartition(".")[2] for name in layers} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj",
    }  # fmt: skip
    assert not [name for name in layers if "base_layer" in name]


def test_dropout_on_experts_is_refused_with_a_hint():
    with pytest.raises(LoraError, match=r"adapter\.dropout: 0\.1, but PEFT has no dropout") as caught:
        zoo.adapted(make_moe(), dropout=0.1)
    assert caught.value.hint is not None
    assert "adapter.dropout: 0" in caught.value.hint
