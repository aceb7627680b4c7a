"""Put the adapter on the base: a table from methods to PEFT configurations, and what is trained besides."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.boft.layer import get_fbd_cuda
from peft.tuners.lora.config import EvaConfig
from peft.tuners.oft import OFTLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.errors import LoraError
from lora_cli.model import gguf, initialise, targets
from lora_cli.model.setting import Setting
from lora_cli.model.targets import Targets
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.methods import METHOD_FACTS, MethodName
from lora_cli.recipe.schema import AdapterSpec

FEWEST_STEPS = 3  # of AdaLoRA: one to score components by, one to drop some, one to train the others
OTHERWISE = "choose other adapter.target_modules or another adapter.method"


class Method(NamedTuple):
    """One entry: the configuration of PEFT, and what is done to the layers once they are there."""

    config: Callable[[AdapterSpec, Targets, Setting], PeftConfig]
    extend: Callable[[PeftModel], None] | None = None  # parameters that PEFT does not have
    start: Callable[[PeftModel, AdapterSpec, Setting], None] | None = None
    before: Callable[[PreTrainedModel, PeftConfig, Setting], None] | None = None  # on the bare base


def _reach(spec: AdapterSpec, reach: Targets, setting: Setting) -> dict[str, Any]:
    """Where the adapter goes, as all methods of layers take it."""
    return {
        "task_type": TASKS[setting.task].peft,
        "target_modules": reach.modules,
        "modules_to_save": [*setting.heads, *(spec.modules_to_save or ())] or None,
    }


def _lora(spec: AdapterSpec, reach: Targets, setting: Setting, **options: Any) -> LoraConfig:
    return LoraConfig(**_lora_options(spec, reach, setting), **options)


def _lora_options(spec: AdapterSpec, reach: Targets, setting: Setting) -> dict[str, Any]:
    return {
        **_reach(spec, reach, setting),
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "bias": spec.bias,
        "rank_pattern": dict(spec.rank_pattern or {}),
        "alpha_pattern": dict(spec.alpha_pattern or {}),
        "trainable_token_indices": reach.tokens,
        "target_parameters": list(reach.parameters) or None,
    }


def _rslora(spec: AdapterSpec, reach: Targets, setting: Setting) -> LoraConfig:
    return _lora(spec, reach, setting, use_rslora=True)


def _dora(spec: AdapterSpec, reach: Targets, setting: Setting) -> LoraConfig:
    return _lora(spec, reach, setting, use_dora=True)


def _eva(spec: AdapterSpec, reach: Targets, setting: Setting) -> LoraConfig:
    if setting.plan is None:  # only shapes count: PEFT warns of an initialisation that does not follow
        return _lora(spec, reach, setting)
    return _lora(spec, reach, setting, init_lora_weights="eva", eva_config=EvaConfig())


def _adalora(spec: AdapterSpec, reach: Targets, setting: Setting) -> AdaLoraConfig:
    assert spec.rank is not None
    options = _lora_options(spec, reach, setting)
    for absent in ("r", "rank_pattern", "alpha_pattern", "trainable_token_indices", "target_parameters"):
        del options[absent]
    if 0 < setting.total_steps < FEWEST_STEPS:
        raise LoraError(
            f"adapter.method: adalora drops ranks step by step, and this run has {setting.total_steps}",
            hint=f"raise training.max_steps or epochs to {FEWEST_STEPS} steps or more, or write another method",
        )
    # A tenth of the steps at full rank, and half of them at the final one, as in about the paper's runs on GLUE.
    steps = setting.total_steps
    return AdaLoraConfig(
        **options,
        init_r=spec.rank,
        target_r=spec.final_rank,
        tinit=steps // 10,
        tfinal=steps // 2,
        deltaT=max(1, steps // 100),
        total_step=max(1, steps),
    )


def _vera(spec: AdapterSpec, reach: Targets, setting: Setting) -> VeraConfig:
    # The projections are saved with the adapter: another torch may draw others from the same key.
    bias = "vera_only" if spec.bias == "lora_only" else spec.bias
    return VeraConfig(
        **_reach(spec, reach, setting), r=spec.rank, vera_dropout=spec.dropout, bias=bias, save_projection=True
    )


def _loha(spec: AdapterSpec, reach: Targets, setting: Setting) -> LoHaConfig:
    return LoHaConfig(**_reach(spec, reach, setting), r=spec.rank, alpha=spec.alpha, rank_dropout=spec.dropout)


def _lokr(spec: AdapterSpec, reach: Targets, setting: Setting) -> LoKrConfig:
    return LoKrConfig(**_reach(spec, reach, setting), r=spec.rank, alpha=spec.alpha, rank_dropout=spec.dropout)


def _ia3(spec: AdapterSpec, reach: Targets, setting: Setting) -> IA3Config:
    forward = list(spec.feedforward_modules or ())
    if spec.target_modules is None:
        return IA3Config(**{**_reach(spec, reach, setting), "target_modules": None})  # PEFT's table by architecture
    return IA3Config(**_reach(spec, reach, setting), feedforward_modules=forward)


def _oft(spec: AdapterSpec, reach: Targets, setting: Setting) -> OFTConfig:
    bias = "oft_only" if spec.bias == "lora_only" else spec.bias
    return OFTConfig(
        **_reach(spec, reach, setting), r=0, oft_block_size=spec.rotation_size, module_dropout=spec.dropout, bias=bias
    )


def _boft(spec: AdapterSpec, reach: Targets, setting: Setting) -> BOFTConfig:
    if spec.butterflies and spec.butterflies > 1 and get_fbd_cuda() is None:
        raise LoraError(
            "adapter.butterflies: PEFT's extension for more than one does not load here: it needs a GPU and a compiler",
            hint="write butterflies: 1, which PEFT would silently take",
        )
    return BOFTConfig(
        **_reach(spec, reach, setting),
        boft_block_size=spec.rotation_size,
        boft_n_butterfly_factor=spec.butterflies,
        boft_dropout=spec.dropout,
        bias="boft_only" if spec.bias == "lora_only" else spec.bias,
    )


def _virtual(spec: AdapterSpec, setting: Setting) -> dict[str, Any]:
    return {
        "task_type": TASKS[setting.task].peft,
        "num_virtual_tokens": spec.virtual_tokens,
        "modules_to_save": list(setting.heads) or None,
    }


def _prefix(spec: AdapterSpec, _: Targets, setting: Setting) -> PrefixTuningConfig:
    return PrefixTuningConfig(**_virtual(spec, setting))


def _prompt(spec: AdapterSpec, _: Targets, setting: Setting) -> PromptTuningConfig:
    return PromptTuningConfig(**_virtual(spec, setting), prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB)


def _p_tuning(spec: AdapterSpec, _: Targets, setting: Setting) -> PromptEncoderConfig:
    return PromptEncoderConfig(**_virtual(spec, setting), encoder_hidden_size=spec.hidden_size)


METHODS: dict[MethodName, Method] = {
    "lora": Method(_lora),
    "rslora": Method(_rslora),
    "dora": Method(_dora, extend=initialise.dora),
    "lora+": Method(_lora),  # its learning rates are the optimizer's
    "scaled": Method(_lora, extend=initialise.scaled),
    "pissa": Method(_lora, start=initialise.pissa),
    "olora": Method(_lora, start=initialise.olora),
    "corda": Method(_lora, start=initialise.corda, before=initialise.corda_statistics),
    "eva": Method(_eva, start=initialise.eva),
    "loftq": Method(_lora, start=initialise.loftq),
    "adalora": Method(_adalora),
    "vera": Method(_vera),
    "loha": Method(_loha),
    "lokr": Method(_lokr),
    "ia3": Method(_ia3),
    "oft": Method(_oft),
    "boft": Method(_boft),
    "prefix": Method(_prefix),
    "prompt": Method(_prompt, start=initialise.prompt),
    "p-tuning": Method(_p_tuning),
}


def attach(model: PreTrainedModel, spec: AdapterSpec, *, seed: int, setting: Setting | None = None) -> PeftModel:
    """Freeze `model` and add the trainable adapter that `spec` describes, drawn from `seed`.

    With B = 0, and with what is neutral in other methods, the model is what it was; pissa, olora and corda are so but
    for rounding; loftq, prefix, prompt and p-tuning are not by design.

    Raises:
        LoraError: target modules that match no layer or only some of those that are alike, patterns and modules that
            match nothing, or a kind of layer that the method cannot adapt.
    """
    setting = setting or Setting()
    method, facts = METHODS[spec.method], METHOD_FACTS[spec.method]
    heads = list(dict.fromkeys([*setting.heads, *targets.find_modules(model, spec.modules_to_save or ())]))
    reach = Targets([])
    if "target_modules" in facts.options and spec.target_modules is not None:
        reach = targets.resolve(model, spec, heads=heads)
    tokens = _token_ids(spec.trainable_tokens or (), setting)
    reach = reach._replace(tokens=targets.token_rows(model, tokens, whole=heads))
    _refuse_untrainable(model, heads)
    _refuse_unknown_to_peft(model, spec, setting)
    config = method.config(spec, reach, setting)
    if config.is_prompt_learning:
        _tell_sizes(config, model)
    if isinstance(config, LoraConfig):
        gguf.teach(config)
    if method.before and setting.plan is not None:
        method.before(model, config, setting)
    torch.manual_seed(seed)
    try:
        # fp32 master weights: AdamW's small updates would be rounded away in bf16.
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    except (ValueError, TypeError) as reason:
        first = _in_one_line(str(reason)) or type(reason).__name__
        hint = OTHERWISE
        if "lora_dropout" in first:  # experts whose weights are one parameter
            hint = "set adapter.dropout: 0, or choose other adapter.target_modules"
        elif "Mamba" in first:  # its kernels multiply with the bare weights, past any adapter
            hint = "leave it out: adapter.exclude_modules: [out_proj, conv1d]"
        raise LoraError(f"adapter: PEFT refuses it: {first}", hint=hint) from reason
    targets.check_patterns(spec, adapted_layers(adapted))
    _refuse_changed_sizes(adapted, spec)
    if spec.method in ("pissa", "olora", "corda", "loftq", "eva"):
        _refuse_large_ranks(adapted, spec)
    if method.extend:
        method.extend(adapted)
    if method.start and setting.plan is not None:
        method.start(adapted, spec, setting)
        if isinstance(config, LoraConfig):  # EVA's new ranks come in the base's dtype
            adapted.base_model._cast_adapter_dtype(initialise.NAME)
    if spec.freeze_a:  # LoRA-FA (Zhang et al., arXiv:2308.03303): the update stays in the space that A spans
        _freeze(adapted, ".lora_A.", ".lora_embedding_A.")
    # A divisor that PEFT's cast to fp32 makes trainable, and that is not saved: set by the rank, it stays what it is.
    _freeze(adapted, ".ranknum.")
    return adapted


def _refuse_unknown_to_peft(model: PreTrainedModel, spec: AdapterSpec, setting: Setting) -> None:
    """What PEFT would only find when it is too late, or say in words that no recipe has."""
    kind = model.config.model_type
    known = kind in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    if spec.method == "ia3" and spec.target_modules is None and not known:
        raise LoraError(
            f"adapter.target_modules: for ia3 PEFT has no default on {kind}",
            hint=f"list them, and the MLP's last ones in feedforward_modules too; {targets.listed(model)}",
        )
    parts = (model, model.base_model)
    if spec.method == "prefix" and not any("past_key_values" in signature(p.forward).parameters for p in parts):
        raise LoraError(
            f"adapter.method: a {kind} model takes no keys and values from before, which prefix is",
            hint="write method: prompt or lora",
        )
    virtual = "virtual_tokens" in METHOD_FACTS[spec.method].options
    if virtual and model.config.is_encoder_decoder and TASKS[setting.task].classes:
        raise LoraError(
            f"adapter.method: a {kind} model that classifies takes no virtual tokens, which {spec.method} is",
            hint="write method: lora",
        )


def _tell_sizes(config: PeftConfig, model: PreTrainedModel) -> None:
    """The sizes of models whose configuration has them under names that PEFT does not look for."""
    if not {"hidden_size", "n_embd", "d_model"} & model.config.to_dict().keys():
        config.token_dim = model.config.hidden_size
        config.num_layers = model.config.num_hidden_layers
        config.num_attention_heads = model.config.num_attention_heads


def _in_one_line(text: str) -> str:
    """What PEFT says of a layer that it prints whole, without the print."""
    lines = text.splitlines()
    if len(lines) > 1 and lines[0].endswith("("):
        return f"{lines[0].removesuffix('(')} is not supported"
    return lines[0] if lines else ""


def _refuse_changed_sizes(model: PeftModel, spec: AdapterSpec) -> None:
    """PEFT takes the next block that fits, and keeps what was written in the adapter's configuration."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, OFTLayer) and module.in_features % (spec.rotation_size or 1):
            raise LoraError(
                f"adapter.rotation_size: {spec.rotation_size} does not divide the {module.in_features} inputs of "
                f"{name}",
                hint="write a divisor of all layers' inputs, such as 32",
            )


def _refuse_large_ranks(model: PeftModel, spec: AdapterSpec) -> None:
    """A start from a layer's components needs as many of them as the rank; EVA looks for more, to choose from."""
    looked_for = EvaConfig().rho if spec.method == "eva" else 1
    for name, layer in initialise.lora_layers(model):
        most = min(layer.out_features, int(layer.in_features / looked_for))
        rank = layer.r[initialise.NAME]
        if rank > most:
            raise LoraError(
                f"adapter.rank: {rank} is more than {name} has components for",
                hint=f"at most {most}, or leave such layers out of adapter.target_modules",
            )


def refuse_bypassed(model: PeftModel, loss: Callable[[], Tensor]) -> None:
    """Every adapted layer has to get a gradient from `loss()`: some models use a layer's weight and not the layer.

    Raises:
        LoraError: layers that would never learn.
    """
    loss().backward()
    dead = []
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer):
            trained = [p for p in module.parameters() if p.requires_grad]
            if trained and all(p.grad is None for p in trained):
                dead.append(name.rpartition(".")[2])
    model.zero_grad(set_to_none=True)
    if dead:
        kinds = ", ".join(sorted(set(dead)))
        raise LoraError(
            f"adapter.target_modules: no gradient reaches {kinds}: the model takes the weights past their layers",
            hint=f"leave them out: adapter.exclude_modules: [{kinds}]",
        )


def _freeze(model: PeftModel, *parts: str) -> None:
    for name, parameter in model.named_parameters():
        if any(part in name for part in parts):
            parameter.requires_grad = False


def _refuse_untrainable(model: PreTrainedModel, modules: Sequence[str]) -> None:
    for name in modules:
        for parameter in model.get_submodule(name).parameters():
            if not parameter.is_floating_point() or hasattr(parameter, "quant_state"):  # codes may be stored as floats
                raise LoraError(
                    f"adapter.modules_to_save: {name} is quantised, and such weights take no gradient",
                    hint="adapt it in target_modules instead",
                )


def _token_ids(tokens: Sequence[str], setting: Setting) -> list[int]:
    """The id of each of `tokens`.

    Raises:
        LoraError: a text that the tokenizer does not know as one token.
    """
    found = []
    for token in tokens:
        ids = setting.encode(token) if setting.encode else []
        if len(ids) != 1:
            raise LoraError(
                f"adapter.trainable_tokens: {token!r} is {len(ids)} tokens to this tokenizer, not one",
                hint="list it in model.new_tokens too, so that it becomes one, or write one of its tokens",
            )
        found += ids
    return found


def adapted_layers(model: PeftModel) -> dict[str, int]:
    """Full name of each layer that carries the adapter, as in the base model → its trainable parameters."""
    counts: Counter[str] = Counter()
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer):
            # Experts with two adapted parameters are a wrapper in a wrapper: one layer, each parameter counted once.
            inner = (m for m in module.modules() if m is not module and isinstance(m, BaseTunerLayer))
            others = {id(p) for m in inner for p in m.parameters()}
            own = sum(p.numel() for p in module.parameters() if p.requires_grad and id(p) not in others)
            counts[re.sub(r"(\.base_layer)+$", "", name)] += own
    return dict(counts)


def coverage(model: PeftModel, layers: dict[str, nn.Module]) -> list[targets.Coverage]:
    """How much of each kind of the base's linear `layers` (taken before `attach`) carries the adapter."""
    return targets.coverage(layers, adapted_layers(model))
