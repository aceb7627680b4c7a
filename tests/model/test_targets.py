"""Every target module is one that exists, and what carries the adapter is counted as it is."""

import pytest
from torch import nn

from lora_cli.errors import LoraError
from lora_cli.model import adapter, targets
from lora_cli.recipe.schema import AdapterSpec
from tests.model import zoo

LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("llama", LLAMA),
        ("llama-tied", LLAMA),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
        ("gpt-neox", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        ("phi3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    ],
)
def test_all_linear_is_every_linear_layer_but_the_head(family: str, kinds: set[str]):
    model = zoo.make(family)
    layers = targets.linear_layers(model)
    assert {name.rpartition(".")[2] for name in layers} == kinds
    adapted = zoo.adapted(model)
    assert adapter.adapted_layers(adapted).keys() == layers.keys()
    for row in adapter.coverage(adapted, layers):
        assert row.matched == row.layers > 0


@pytest.mark.parametrize(
    ("wanted", "kinds", "count"),
    [
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}, 4),
        ("q_proj", {"q_proj"}, 2),
        (["model.layers.1.mlp.up_proj"], {"up_proj"}, 1),
        (["layers.0.self_attn.q_proj"], {"q_proj"}, 1),
        (r".*layers\.1\..*_proj", LLAMA, 7),
        (r".*\.(q|k)_proj", {"q_proj", "k_proj"}, 4),
        (["q_proj", "lm_head"], {"q_proj", "lm_head"}, 3),
    ],
)
@pytest.mark.parametrize("method", adapter.METHODS)
def test_names_and_regexes_reach_what_they_name(wanted: str | list[str], kinds: set[str], count: int, method: str):
    model = zoo.make("llama")
    layers = targets.linear_layers(model)
    spec = AdapterSpec.model_validate({"method": method, "rank": 4, "target_modules": wanted})
    adapted = adapter.attach(model, spec, seed=0)
    carrying = adapter.adapted_layers(adapted)
    assert len(carrying) == count
    assert {name.rpartition(".")[2] for name in carrying} == kinds
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    rows = adapter.coverage(adapted, layers)
    assert sum(row.parameters for row in rows) == sum(carrying.values()) == trainable
    assert sum(row.matched for row in rows) == count
    # PEFT itself has adapted the same layers.
    assert {n.removeprefix("base_model.model.") for n in adapted.targeted_module_names} == carrying.keys()


def test_an_adapter_of_rank_r_has_r_times_in_plus_out_parameters():
    model = zoo.make("llama")
    shapes = {name: layer.weight.shape for name, layer in targets.linear_layers(model).items()}
    carrying = adapter.adapted_layers(zoo.adapted(model, rank=3))
    assert carrying == {name: 3 * sum(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("wanted", "said", "hinted"),
    [
        (["q_proj", "q_porj"], "q_porj matches no layer", "did you mean q_proj?"),
        (["query_key_value"], "query_key_value matches no layer", "its linear layers are: down_proj, gate_proj"),
        (["q_prj", "v_prj"], "q_prj, v_prj match no layer", "did you mean q_proj, v_proj?"),
        (r".*\.attention\..*", "the regex '.*\\\\.attention\\\\..*' matches no layer", "its linear layers are:"),
        ("q_porj", "q_porj matches no layer", "did you mean q_proj?"),
        (r"q_proj|v_proj", "matches no layer", "its linear layers are:"),  # PEFT matches the whole name
        (["proj"], "proj matches no layer", "its linear layers are:"),  # a part of a name is no name
    ],
)
def test_what_matches_nothing_is_refused(wanted: str | list[str], said: str, hinted: str):
    with pytest.raises(LoraError) as caught:
        targets.resolve(zoo.make("llama"), wanted)
    assert said in caught.value.message
    assert hinted in str(caught.value.hint)


def test_a_layer_that_the_method_cannot_adapt_is_refused_in_one_line():
    spec = AdapterSpec(rank=4, target_modules=["input_layernorm"])
    with pytest.raises(LoraError, match="PEFT refuses it") as caught:
        adapter.attach(zoo.make("llama"), spec, seed=0)
    assert "\n" not in caught.value.message


def test_a_model_without_linear_layers_says_so():
    model = zoo.make("llama")
    model.model.layers = nn.ModuleList()
    with pytest.raises(LoraError, match="no linear layers"):
        targets.resolve(model, "all-linear")
