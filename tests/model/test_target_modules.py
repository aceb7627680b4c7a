"""Every target module is one that exists, and what carries the adapter is counted as it is."""

from typing import Any

import pytest
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from lora_cli.errors import LoraError
from lora_cli.model import attach_adapter, base_model, target_modules
from lora_cli.recipe.methods import METHOD_FACTS
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
    layers = target_modules.linear_layers(model)
    assert {name.rpartition(".")[2] for name in layers} == kinds
    adapted = zoo.adapted(model)
    assert attach_adapter.adapted_layers(adapted).keys() == layers.keys()
    for row in attach_adapter.coverage(adapted, layers):
        assert row.matched == row.layers > 0


def check_reach(model: PreTrainedModel, kinds: set[str], count: int, **spec: Any) -> None:
    layers = target_modules.linear_layers(model)
    adapted = zoo.attached(model, **spec)
    carrying = attach_adapter.adapted_layers(adapted)
    assert len(carrying) == count
    assert {name.rpartition(".")[2] for name in carrying} == kinds
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    rows = attach_adapter.coverage(adapted, layers)
    assert sum(row.parameters for row in rows) == sum(carrying.values()) == trainable
    assert sum(row.matched for row in rows) == count
    # PEFT itself has adapted the same layers.
    assert {n.removeprefix("base_model.model.") for n in adapted.targeted_module_names} == carrying.keys()


@pytest.mark.parametrize(
    ("wanted", "kinds", "count"),
    [
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}, 4),
        ("q_proj", {"q_proj"}, 2),
        ([f"model.layers.{n}.mlp.up_proj" for n in (0, 1)], {"up_proj"}, 2),
        (r".*\.(q|k)_proj", {"q_proj", "k_proj"}, 4),
        (r".*\.layers\.\d+\..*_proj", LLAMA, 14),
    ],
)
@pytest.mark.parametrize("method", [name for name in zoo.LAYERED if name not in ("eva", "vera")])
def test_names_and_regexes_reach_what_they_name(wanted: str | list[str], kinds: set[str], count: int, method: str):
    check_reach(zoo.make("llama"), kinds, count, target_modules=wanted, method=method)


def test_the_head_may_be_named():
    check_reach(zoo.make("llama"), {"q_proj", "lm_head"}, 3, target_modules=["q_proj", "lm_head"])


@pytest.mark.parametrize(
    ("options", "kinds", "count"),
    [
        ({"layers": [1]}, LLAMA, 7),
        ({"layers": [1], "target_modules": ["q_proj", "mlp.up_proj"]}, {"q_proj", "up_proj"}, 2),
        ({"layers": [0], "target_modules": r".*\.(q|k)_proj"}, {"q_proj", "k_proj"}, 2),
        ({"exclude_modules": ["down_proj", "o_proj"]}, LLAMA - {"down_proj", "o_proj"}, 10),
        ({"exclude_modules": r".*self_attn.*"}, {"gate_proj", "up_proj", "down_proj"}, 6),
        ({"exclude_modules": ["mlp.up_proj"], "target_modules": r".*(q|up)_proj"}, {"q_proj"}, 2),
        ({"exclude_modules": r".*\.0\..*", "target_modules": ["q_proj"]}, {"q_proj"}, 1),
        ({"exclude_modules": ["layers.0.self_attn.q_proj"], "layers": [0]}, LLAMA - {"q_proj"}, 6),
    ],
)
def test_layers_and_exclusions_narrow_it(options: dict[str, Any], kinds: set[str], count: int):
    for method in ("lora", "vera", "ia3", "oft"):
        taken = {key: value for key, value in options.items() if key in METHOD_FACTS[method].options}
        if taken == options:
            given = {"target_modules": "all-linear", **options}
            check = zoo.attached(zoo.make("llama"), method=method, **given)
            carrying = attach_adapter.adapted_layers(check)
            assert {name.rpartition(".")[2] for name in carrying} == kinds, method
            assert len(carrying) == count, method


def test_ranks_and_alphas_of_their_own():
    model = zoo.attached(
        zoo.make("llama"),
        rank_pattern={"down_proj": 2, r"layers\.0\..*q_proj": 6},
        alpha_pattern={"down_proj": 1.0},
    )
    layers = {name.removeprefix("base_model.model.model."): layer for name, layer in model.named_modules()}
    found = {name: layers[name].r["default"] for name in ("layers.0.mlp.down_proj", "layers.0.self_attn.q_proj")}
    assert found == {"layers.0.mlp.down_proj": 2, "layers.0.self_attn.q_proj": 6}
    assert layers["layers.1.self_attn.q_proj"].r["default"] == 4
    assert layers["layers.1.mlp.down_proj"].scaling["default"] == 1.0 / 2
    assert layers["layers.1.mlp.up_proj"].scaling["default"] == 8.0 / 4


@pytest.mark.parametrize(
    ("options", "said", "hinted"),
    [
        ({"layers": [1, 7]}, "adapter.layers: 7, but the model has layers 0 to 1", "numbers of layers"),
        ({"exclude_modules": ["q_porj"]}, "adapter.exclude_modules: q_porj matches no layer", "down_proj, gate_proj"),
        ({"exclude_modules": ".*proj"}, "adapter.exclude_modules: every layer is excluded", "its linear layers are"),
        ({"rank_pattern": {"q_porj": 3}}, "adapter.rank_pattern: q_porj matches no layer", "those are: down_proj"),
        ({"alpha_pattern": {"lm_head": 3.0}}, "adapter.alpha_pattern: lm_head matches no layer", "those are:"),
        ({"modules_to_save": ["lm_haed"]}, "adapter.modules_to_save: the model has no module lm_haed", "lm_head?"),
        ({"modules_to_save": ["x"]}, "the model has no module x", "its parts are: embed_tokens, layers, norm"),
        (
            {"target_modules": ["model.layers.1.mlp.up_proj"]},
            "only 1 of the 2 layers model.layers.*.mlp.up_proj match",
            "write adapter.layers: [1] and the kinds by name",
        ),
        (
            {"target_modules": r".*layers\.1\..*_proj"},
            "only 1 of the 2 layers model.layers.*.self_attn.q_proj match",
            "its linear layers are: down_proj",
        ),
        ({"trainable_tokens": ["two words"]}, "adapter.trainable_tokens: 'two words' is 2 tokens", "model.new_tokens"),
    ],
)
def test_what_is_left_over_is_refused(options: dict[str, Any], said: str, hinted: str):
    with pytest.raises(LoraError) as caught:
        zoo.attached(zoo.make("llama"), **options)
    assert said in caught.value.message
    assert hinted in str(caught.value.hint)


@pytest.mark.parametrize(
    ("build", "rank", "modules", "parameters"),
    [
        (("roberta", {"hidden_size": 768, "num_hidden_layers": 12, "vocab_size": 99}), 8, ["query", "value"], 294_912),
        (("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 99}), 4, ["c_attn"], 393_216),
        (
            # GPT-3 175B's dimensions: 96 layers of 12,288 (Brown et al., arXiv:2005.14165, table 2.1).
            (
                "opt",
                {
                    "hidden_size": 12_288,
                    "num_hidden_layers": 96,
                    "num_attention_heads": 96,
                    "ffn_dim": 49_152,
                    "vocab_size": 99,
                },
            ),
            4,
            ["q_proj", "v_proj"],
            18_874_368,
        ),
    ],
    ids=["RoBERTa-base", "GPT-2 medium", "GPT-3 175B"],
)
def test_trainable_parameters_are_those_of_the_lora_paper(build: Any, rank: int, modules: list[str], parameters: int):
    """Hu et al., arXiv:2106.09685, tables 2, 3 and 4, counted without weights."""
    kind, dimensions = build
    model = base_model.skeleton(AutoConfig.for_model(kind, **dimensions))
    adapted = attach_adapter.attach(model, AdapterSpec(rank=rank, target_modules=modules), seed=0)
    assert {p.device.type for p in adapted.parameters()} == {"meta"}
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == parameters


def test_an_adapter_of_rank_r_has_r_times_in_plus_out_parameters():
    model = zoo.make("llama")
    shapes = {name: layer.weight.shape for name, layer in target_modules.linear_layers(model).items()}
    carrying = attach_adapter.adapted_layers(zoo.adapted(model, rank=3))
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
        target_modules.resolve_target_modules(zoo.make("llama"), AdapterSpec(target_modules=wanted))
    assert said in caught.value.message
    assert hinted in str(caught.value.hint)


def test_a_layer_that_the_method_cannot_adapt_is_refused_in_one_line():
    spec = AdapterSpec(rank=4, target_modules=["input_layernorm"])
    with pytest.raises(LoraError, match="PEFT refuses it") as caught:
        attach_adapter.attach(zoo.make("llama"), spec, seed=0)
    assert "\n" not in caught.value.message


def test_a_model_without_linear_layers_says_so():
    model = zoo.make("llama")
    model.model.layers = nn.ModuleList()
    with pytest.raises(LoraError, match="no linear layers"):
        target_modules.resolve_target_modules(model, AdapterSpec())
