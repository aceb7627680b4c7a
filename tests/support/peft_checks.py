"""Checks of what lora_cli needs from undocumented names of PEFT, on a tiny model.

Each check fails if a name is missing or behaves differently. `tests/laws/test_library_internals.py` lists the names.
"""

from typing import Any

import peft
import torch
import transformers
from peft import get_peft_model, get_peft_model_state_dict
from peft.config import PromptLearningConfig
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.boft.layer import BOFTLayer, MultiplicativeDropoutLayer, get_fbd_cuda
from peft.tuners.loha import LoHaLayer
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer, corda, dora
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from peft.tuners.lora.config import CordaConfig, EvaConfig
from peft.tuners.oft import OFTLayer
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype, check_target_module_exists
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper, constants, integrations, merge_utils, other
from torch import nn

from tests.model import zoo
from tests.support.library_checks import IDS, four_bit


def adapted(family: str = "llama", *, kind: Any = peft.LoraConfig, **options: Any) -> Any:
    """Attach an adapter by plain PEFT, by default LoRA on q_proj."""
    targets = {} if issubclass(kind, PromptLearningConfig) else {"target_modules": ["q_proj"]}
    return get_peft_model(zoo.make(family), kind(task_type="CAUSAL_LM", **{**targets, **options}))


def q_proj(model: Any) -> Any:
    return model.get_base_model().model.layers[0].self_attn.q_proj


def custom_layers() -> None:
    class Own(peft.tuners.lora.Linear):
        pass

    def no_layer(target: nn.Module, adapter_name: str, *, config: Any, **options: Any) -> None:
        calls.append(target)  # it returns None: PEFT chooses the layer

    calls: list[nn.Module] = []
    for mapping, expected in (
        ({nn.Linear: Own}, Own),
        ({nn.Linear: no_layer, nn.Module: Own}, peft.tuners.lora.Linear),
    ):
        config = peft.LoraConfig(target_modules=["q_proj"])
        config._register_custom_module(mapping)
        assert type(q_proj(get_peft_model(zoo.make("llama"), config))) is expected
    assert len(calls) == 2


def lora_layer() -> None:
    layer = q_proj(adapted(lora_dropout=0.1, r=4, lora_alpha=8))
    assert isinstance(layer, LoraLayer)
    assert isinstance(layer, BaseTunerLayer)
    assert (layer.r, layer.lora_alpha, layer.scaling) == ({"default": 4}, {"default": 8}, {"default": 2.0})
    assert (layer.active_adapters, layer.merged, layer.disable_adapters) == (["default"], False, False)
    assert (layer.lora_bias["default"], layer.fan_in_fan_out, dict(layer.lora_variant)) == (False, False, {})
    assert isinstance(layer.lora_dropout["default"], nn.Dropout)
    assert layer.base_layer is layer.get_base_layer()
    assert (layer.lora_A["default"].weight.shape, layer.lora_B["default"].weight.shape) == ((4, 64), (64, 4))
    layer.merge(safe_merge=True)
    assert layer.merged


def lora_embedding() -> None:
    embedding = adapted(target_modules=["embed_tokens"], r=4).get_base_model().model.embed_tokens
    assert type(embedding) is peft.tuners.lora.Embedding
    assert embedding.lora_embedding_A["default"].shape == (4, zoo.VOCABULARY)
    assert embedding.lora_embedding_B["default"].shape == (64, 4)


def dora_variant() -> None:
    layer = q_proj(adapted(use_dora=True))
    assert "default" in layer.lora_variant
    magnitude = layer.lora_magnitude_vector["default"]
    assert type(magnitude) is dora.DoraLinearLayer
    assert magnitude.weight.shape == (64,)


def lora_on_a_4_bit_layer() -> None:
    model, calls = nn.ModuleDict({"q_proj": four_bit()}), []
    model.is_loaded_in_4bit = True  # as transformers sets it
    config = peft.LoraConfig(target_modules=["q_proj"])
    config._register_custom_module({nn.Module: lambda *args, **options: calls.append(options)})
    assert type(get_peft_model(model, config).base_model.model["q_proj"]) is LoraLinear4bit
    assert calls[0]["loaded_in_4bit"]


def param_wrapper() -> None:
    layer = q_proj(adapted(target_modules=[], target_parameters=["q_proj.weight"]))
    assert type(layer).__name__ == "ParamWrapper"
    assert "default" in layer.lora_A


def modules_to_save_wrapper() -> None:
    model = adapted(modules_to_save=["lm_head"])
    head = model.get_base_model().lm_head
    assert isinstance(head, ModulesToSaveWrapper)
    assert isinstance(head, other.AuxiliaryTrainingWrapper)
    assert isinstance(head.original_module, nn.Linear)
    assert isinstance(head.modules_to_save[head.active_adapters[0]], nn.Linear)
    # PEFT calls the instance's attribute, with the state dict of the wrapper alone.
    states: list[dict[str, Any]] = []
    head.adapter_state_dict = lambda adapter_name, state: states.append(state) or {"weight": torch.tensor([7.0])}
    assert get_peft_model_state_dict(model)["base_model.model.lm_head.weight"].item() == 7
    assert "modules_to_save.default.weight" in states[0]


def trainable_tokens_wrapper() -> None:
    for family, tied in (("llama", [False]), ("llama-tied", [False, True])):
        model = adapted(family, trainable_token_indices=[3, 4])
        wrappers = [m for m in model.modules() if isinstance(m, TrainableTokensWrapper)]
        assert all(isinstance(wrapper, other.AuxiliaryTrainingWrapper) for wrapper in wrappers)
        assert [wrapper.token_adapter.tied_adapter is not None for wrapper in wrappers] == tied


def adalora_allocator() -> None:
    options = {"init_r": 4, "target_r": 1, "tinit": 0, "tfinal": 1, "deltaT": 1, "total_step": 3}
    model = adapted(kind=peft.AdaLoraConfig, **options)
    layer, config, allocator = q_proj(model), model.peft_config["default"], model.base_model.rankallocator
    assert isinstance(layer, AdaLoraLayer)
    assert layer.ranknum["default"].numel() == 1
    model(IDS, labels=IDS).loss.backward()
    model.base_model.update_and_allocate(1)
    names = {name for name, _ in model.base_model.model.named_parameters() if ".lora_" in name}
    assert allocator.init_bgt == 8  # the ranks of both layers
    assert [allocator.budget_schedule(step) for step in (1, 2)] == [(2, True), (2, True)]
    assert allocator.ipt.keys() == allocator.exp_avg_ipt.keys() == allocator.exp_avg_unc.keys() == names
    model.base_model.update_and_allocate(2)  # the first of the last `tfinal` steps sets the final ranks
    kept = {name: sum(mask) for name, mask in config.rank_pattern.items()}
    assert all(".lora_E" in name for name in kept)
    assert sum(kept.values()) == 2  # target_r for each of two layers
    model.base_model.resize_modules_by_rank_pattern(config.rank_pattern, "default")
    for name, rank in kept.items():
        layer = model.base_model.model.get_submodule(name.partition(".lora_E")[0])
        factors = (layer.lora_A["default"], layer.lora_B["default"], layer.lora_E["default"])
        assert [factor.shape for factor in factors] == [(rank, 64), (64, rank), (rank, 1)]


def cast_to_fp32() -> None:
    base, config = zoo.make("llama", dtype=torch.bfloat16), peft.LoraConfig(target_modules=["q_proj"])
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    assert q_proj(model).lora_A["default"].weight.dtype == torch.bfloat16
    cast_adapter_dtype(model.base_model, "default")
    assert q_proj(model).lora_A["default"].weight.dtype == torch.float32


def corda_decomposition() -> None:
    model = zoo.make("llama")
    config = peft.LoraConfig(target_modules=["down_proj"], r=4, corda_config=CordaConfig(corda_method="ipm"))
    corda.preprocess_corda(model, config, run_model=lambda: model(IDS))
    found = model.model.layers[0].mlp.down_proj.eigens
    assert [found.U_WC.shape, found.S_WC.shape, found.V_WC.shape] == [(64, 4), (4,), (128, 4)]


def eva_factor() -> None:
    assert EvaConfig().rho == 2


def oft_layer() -> None:
    layer = q_proj(adapted(kind=peft.OFTConfig, r=0, oft_block_size=8))
    assert isinstance(layer, OFTLayer)
    assert layer.in_features == 64
    # The method has no adapter.dropout, because PEFT does not apply it.
    model = adapted(kind=peft.OFTConfig, r=0, oft_block_size=8, module_dropout=0.9, init_weights=False).train()
    assert torch.equal(model(IDS).logits, model.eval()(IDS).logits)


def ia3_table() -> None:
    assert "llama" in constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING


def boft_extension() -> None:
    assert get_fbd_cuda() is None or torch.cuda.is_available()


def dequantized_matrix() -> None:
    layer = nn.Linear(64, 32)
    assert torch.equal(integrations.dequantize_module_weight(layer), layer.weight)
    assert integrations.dequantize_module_weight(four_bit()).shape == (32, 64)


def combined_updates() -> None:
    update, weights = torch.randn(6, 5), torch.tensor([0.5, 0.25])
    assert torch.allclose(merge_utils.dare_linear([update, update], weights, 1.0), 0.75 * update)
    assert merge_utils.ties([update, update], weights, 1.0).shape == (6, 5)


def pattern_keys() -> None:
    assert other.get_pattern_key(["up_proj", "q_proj"], "model.layers.0.self_attn.q_proj") == "q_proj"
    assert other.get_pattern_key(["up_proj"], "model.q_proj") == "model.q_proj"


def targeted_modules() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], exclude_modules=["1.q_proj"], modules_to_save=["head"])
    names = ["layers.0.q_proj", "layers.1.q_proj", "head.q_proj", "layers.0.k_proj"]
    assert [bool(check_target_module_exists(config, name)) for name in names] == [True, False, False, False]
    config = peft.LoraConfig(target_modules=r".*\.k_proj")
    assert check_target_module_exists(config, "layers.0.k_proj")
    assert not check_target_module_exists(config, "layers.0.q_proj")


def replaced_methods() -> None:
    model = adapted("llama", kind=peft.BOFTConfig, boft_block_size=4, boft_dropout=0.25)
    layer = q_proj(model)
    assert isinstance(layer, BOFTLayer)
    assert isinstance(layer.boft_dropout["default"], MultiplicativeDropoutLayer)
    assert layer.boft_dropout["default"].p == 0.25
    called: list[tuple[int, ...]] = []
    layer.__dict__["cayley_batch"] = lambda data: called.append(data.shape) or data
    model(IDS)
    assert called == [(16, 4, 4)]
    for kind, base in ((peft.LoHaConfig, LoHaLayer), (peft.LoKrConfig, LoKrLayer)):
        model = adapted(kind=kind, r=4, rank_dropout=0.5)
        layer, options = q_proj(model), list[dict[str, Any]]()
        assert isinstance(layer, base)
        assert layer.rank_dropout == {"default": 0.5}
        whole = layer.get_delta_weight("default")
        layer.__dict__["get_delta_weight"] = lambda name, seen=options, whole=whole, **given: (
            seen.append(given) or whole
        )
        for training in (True, False):
            model.train(training)(IDS)
        assert options == [{"apply_rank_dropout": True}, {"apply_rank_dropout": False}]
    assert layer.rank_dropout_scale == {"default": False}


def prefix_below_a_head() -> None:
    config = transformers.BertConfig(vocab_size=97, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    for task, kind in (("TOKEN_CLS", "Token"), ("SEQ_CLS", "Sequence")):
        base = getattr(transformers, f"BertFor{kind}Classification")(config)
        model: Any = get_peft_model(base, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3)).eval()
        assert model.cls_layer_name == "classifier"
        mask = torch.ones(1, IDS.shape[1] + 3)
        found = model._prefix_tuning_forward(input_ids=IDS, attention_mask=mask, return_dict=True)
        assert torch.equal(found.logits, model(input_ids=IDS, attention_mask=mask[:, 3:]).logits)
    causal = adapted("gpt2", kind=peft.PrefixTuningConfig, num_virtual_tokens=3)
    assert not hasattr(causal, "cls_layer_name")


def prompt_learning() -> None:
    model = adapted("gpt2", kind=peft.PromptTuningConfig, num_virtual_tokens=3)
    assert model.prompt_tokens["default"].tolist() == [0, 1, 2]
    assert model.word_embeddings is model.get_base_model().get_input_embeddings()
    assert model.prompt_encoder["default"].embedding.weight.shape == (3, 64)
    assert "generation_config" not in vars(model)
    model.generation_config = transformers.GenerationConfig(max_new_tokens=2, pad_token_id=0)
    model.generate(input_ids=IDS)
    assert model.get_base_model().generation_config is model.generation_config
