"""Target modules must match layers of the model; the layers with an adapter are counted correctly."""

from typing import Any

import pytest
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from lora_cli.errors import LoraError
from lora_cli.model import attach_adapter, target_modules
from lora_cli.recipe.methods import METHOD_FACTS
from lora_cli.recipe.schema import AdapterSpec
from tests.model import zoo
from tests.support import checkpoints

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
def test_all_linear_is_every_linear_layer_except_the_head(family: str, kinds: set[str]):
    model = zoo.make(family)
    layers = target_modules.linear_layers(model)
    assert {name.rpartition(".")[2] for name in layers} == kinds
    adapted = zoo.adapted(model)
    assert attach_adapter.adapted_layers(adapted).keys() == layers.keys()
    for row in attach_adapter.coverage(adapted, layers):
        assert row.matched == row.layers > 0


def check_adapted_layers(model: PreTrainedModel, kinds: set[str], count: int, **spec: Any) -> None:
    """Attach an adapter; its layers must be `count` layers of these `kinds`."""
    layers = target_modules.linear_layers(model)
    adapted = zoo.attached(model, **spec)
    adapted_layers = attach_adapter.adapted_layers(adapted)
    assert len(adapted_layers) == count
    assert {name.rpartition(".")[2] for name in adapted_layers} == kinds
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    rows = attach_adapter.coverage(adapted, layers)
    assert sum(row.parameters for row in rows) == sum(adapted_layers.values()) == trainable
    assert sum(row.matched for row in rows) == count
    # PEFT itself has adapted the same layers.
    assert {n.removeprefix("base_model.model.") for n in adapted.targeted_module_names} == adapted_layers.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("requested", "kinds", "count"),
    [
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}, 4),
        ("q_proj", {"q_proj"}, 2),
        ([f"model.layers.{n}.mlp.up_proj" for n in (0, 1)], {"up_proj"}, 2),
        (r".*\.(q|k)_proj", {"q_proj", "k_proj"}, 4),
        (r".*\.layers\.\d+\..*_proj", LLAMA, 14),
    ],
)
@pytest.mark.parametrize("method", [name for name in zoo.LAYERED if name not in ("eva", "vera")])
def test_names_and_regexes_match_layers(requested: str | list[str], kinds: set[str], count: int, method: str):
    check_adapted_layers(zoo.make("llama"), kinds, count, target_modules=requested, method=method)


def test_the_head_may_be_a_target_module():
    check_adapted_layers(zoo.make("llama"), {"q_proj", "lm_head"}, 3, target_modules=["q_proj", "lm_head"])


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
def test_layers_and_exclude_modules_narrow_the_targets(options: dict[str, Any], kinds: set[str], count: int):
    for method in ("lora", "vera", "ia3", "oft"):
        if options.keys() <= set(METHOD_FACTS[method].options):
            adapted = zoo.attached(zoo.make("llama"), method=method, **{"target_modules": "all-linear", **options})
            adapted_layers = attach_adapter.adapted_layers(adapted)
            assert {name.rpartition(".")[2] for name in adapted_layers} == kinds, method
            assert len(adapted_layers) == count, method


def test_rank_pattern_and_alpha_pattern():
    model = zoo.attached(
        zoo.make("llama"),
        rank_pattern={"down_proj": 2, r"layers\.0\..*q_proj": 6},
        alpha_pattern={"down_proj": 1.0},
    )
    layers = {name.removeprefix("base_model.model.model."): layer for name, layer in model.named_modules()}
    ranks = {name: layers[name].r["default"] for name in ("layers.0.mlp.down_proj", "layers.0.self_attn.q_proj")}
    assert ranks == {"layers.0.mlp.down_proj": 2, "layers.0.self_attn.q_proj": 6}
    assert layers["layers.1.self_attn.q_proj"].r["default"] == 4
    assert layers["layers.1.mlp.down_proj"].scaling["default"] == 1.0 / 2
    assert layers["layers.1.mlp.up_proj"].scaling["default"] == 8.0 / 4


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"layers": [1, 7]}, "adapter.layers: 7, but the model has layers 0 to 1", "layer numbers that exist"),
        ({"exclude_modules": ["q_porj"]}, "adapter.exclude_modules: q_porj matches no layer", "down_proj, gate_proj"),
        ({"exclude_modules": ".*proj"}, "adapter.exclude_modules: every layer is excluded", "its linear layers are"),
        ({"rank_pattern": {"q_porj": 3}}, "adapter.rank_pattern: q_porj matches no layer", "an adapter are: down_proj"),
        ({"alpha_pattern": {"lm_head": 3.0}}, "adapter.alpha_pattern: lm_head matches no layer", "an adapter are:"),
        ({"modules_to_save": ["lm_haed"]}, "adapter.modules_to_save: the model has no module lm_haed", "lm_head?"),
        ({"modules_to_save": ["x"]}, "the model has no module x", "its modules are: embed_tokens, layers, norm"),
        (
            {"target_modules": ["model.layers.1.mlp.up_proj"]},
            "only 1 of the 2 layers model.layers.*.mlp.up_proj match",
            "set adapter.layers: [1] and target_modules without numbers",
        ),
        (
            {"target_modules": r".*layers\.1\..*_proj"},
            "only 1 of the 2 layers model.layers.*.self_attn.q_proj match",
            "its linear layers are: down_proj",
        ),
        ({"trainable_tokens": ["two words"]}, "adapter.trainable_tokens: 'two words' is 2 tokens", "model.new_tokens"),
    ],
)
def test_options_that_match_nothing_raise(options: dict[str, Any], message: str, hint: str):
    with pytest.raises(LoraError) as caught:
        zoo.attached(zoo.make("llama"), **options)
    assert message in caught.value.message
    assert hint in str(caught.value.hint)


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
def test_trainable_parameters_equal_those_of_the_lora_paper(build: Any, rank: int, modules: list[str], parameters: int):
    """Hu et al., arXiv:2106.09685, tables 2, 3 and 4, counted on the meta device."""
    kind, dimensions = build
    model = checkpoints.skeleton_of(AutoConfig.for_model(kind, **dimensions))
    adapted = attach_adapter.attach(model, AdapterSpec(rank=rank, target_modules=modules), seed=0)
    assert {p.device.type for p in adapted.parameters()} == {"meta"}
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == parameters


def test_an_adapter_of_rank_r_has_r_times_in_plus_out_parameters():
    model = zoo.make("llama")
    shapes = {name: layer.weight.shape for name, layer in target_modules.linear_layers(model).items()}
    adapted_layers = attach_adapter.adapted_layers(zoo.adapted(model, rank=3))
    assert adapted_layers == {name: 3 * sum(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("requested", "message", "hint"),
    [
        (["q_proj", "q_porj"], "q_porj matches no layer", "did you mean q_proj?"),
        (["query_key_value"], "query_key_value matches no layer", "its linear layers are: down_proj, gate_proj"),
        (["q_prj", "v_prj"], "q_prj, v_prj match no layer", "did you mean q_proj, v_proj?"),
        (r".*\.attention\..*", "the regex '.*\\\\.attention\\\\..*' matches no layer", "its linear layers are:"),
        ("q_porj", "q_porj matches no layer", "did you mean q_proj?"),
        (r"q_proj|v_proj", "matches no layer", "its linear layers are:"),  # PEFT matches the full name
        (["proj"], "proj matches no layer", "its linear layers are:"),  # a part of a module's name does not match
    ],
)
def test_target_modules_that_match_nothing_raise(requested: str | list[str], message: str, hint: str):
    with pytest.raises(LoraError) as caught:
        target_modules.resolve_target_modules(zoo.make("llama"), AdapterSpec(target_modules=requested))
    assert message in caught.value.message
    assert hint in str(caught.value.hint)


def test_a_layer_that_the_method_does_not_support_raises_in_one_line():
    spec = AdapterSpec(rank=4, target_modules=["input_layernorm"])
    with pytest.raises(LoraError, match="PEFT rejects it") as caught:
        attach_adapter.attach(zoo.make("llama"), spec, seed=0)
    assert "\n" not in caught.value.message


def test_a_model_without_linear_layers_raises():
    model = zoo.make("llama")
    model.model.layers = nn.ModuleList()
    with pytest.raises(LoraError, match="no linear layers"):
        target_modules.resolve_target_modules(model, AdapterSpec())


@pytest.mark.parametrize("requested", [["in_proj", "dt_proj"], r".*\.(in|dt)_proj"])
def test_a_named_layer_that_the_model_is_known_to_bypass_raises_on_the_modules_alone(requested: str | list[str]):
    """`lora check` has the modules without weights, and finds what `lora train` would find by the gradients."""
    model = zoo.make("mamba", state_size=8)
    with pytest.raises(LoraError, match=r"dt_proj of a mamba model cannot have an adapter") as refused:
        target_modules.resolve_target_modules(model, zoo.spec_of(target_modules=requested))
    assert refused.value.hint == "remove it, or leave it out: adapter.exclude_modules: [dt_proj]"
