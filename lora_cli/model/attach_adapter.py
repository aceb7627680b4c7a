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
from lora_cli.model import gguf_base, init_adapter, target_modules
from lora_cli.model.adapter_context import AdapterContext
from lora_cli.model.target_modules import Targets
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.methods import METHOD_FACTS, MethodName
from lora_cli.recipe.schema import AdapterSpec

MIN_ADALORA_STEPS = 3  # of AdaLoRA: one to score components by, one to drop some, one to train the others
OTHER_TARGETS = "choose other adapter.target_modules or another adapter.method"


class Method(NamedTuple):
    """One entry: the configuration of PEFT, and what is done to the layers once they are there."""

    config: Callable[[AdapterSpec, Targets, AdapterContext], PeftConfig]
    post_attach: Callable[[PeftModel], None] | None = None  # parameters that PEFT does not have
    init: Callable[[PeftModel, AdapterSpec, AdapterContext], None] | None = None
    pre_init: Callable[[PreTrainedModel, PeftConfig, AdapterContext], None] | None = None  # on the bare base


def _target_kwargs(spec: AdapterSpec, reach: Targets, context: AdapterContext) -> dict[str, Any]:
    """Where the adapter goes, as all methods of layers take it."""
    return {
        "task_type": TASKS[context.task].peft,
        "target_modules": reach.modules,
        "modules_to_save": [*context.heads, *(spec.modules_to_save or ())] or None,
    }


def _lora(spec: AdapterSpec, reach: Targets, context: AdapterContext, **options: Any) -> LoraConfig:
    return LoraConfig(**_lora_options(spec, reach, context), **options)


def _lora_options(spec: AdapterSpec, reach: Targets, context: AdapterContext) -> dict[str, Any]:
    return {
        **_target_kwargs(spec, reach, context),
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "bias": spec.bias,
        "rank_pattern": dict(spec.rank_pattern or {}),
        "alpha_pattern": dict(spec.alpha_pattern or {}),
        "trainable_token_indices": reach.tokens,
        "target_parameters": list(reach.parameters) or None,
    }


def _rslora(spec: AdapterSpec, reach: Targets, context: AdapterContext) -> LoraConfig:
    return _lora(spec, reach, context, use_rslora=True)


def _dora(spec: AdapterSpec, reach: Targets, context: AdapterContext) -> LoraConfig:
    return _lora(spec, reach, context, use_dora=True)


def _eva(spec: AdapterSpec, reach: Targets, context: AdapterContext) -> LoraConfig:
    if context.plan is None:  # only shapes count: PEFT warns of an initialisation that does not follow
        return _lora(spec, reach, context)
    return _lora(spec, reach, context, init_lora_weights="eva", eva_config=EvaConfig())


def _adalora(spec: AdapterSpec, reach: Targets, context: AdapterContext) -> AdaLoraConfig:
    assert spec.rank is not None
    options = _lora_options(spec, reach, context)
    for absent in ("r", "rank_pattern", "alpha_pattern", "trainable_token_indices", "target_parameters"):
        del options[absent]
    if 0 < context.total_steps < MIN_ADALORA_STEPS:
        raise LoraError(
            f"adapter.method: adalora drops ranks step by step, and this run has {context.total_steps}",
            hint=f"raise training.max_steps or epochs to {MIN_ADALORA_STEPS} steps or more, or write another method",
        )
    # A tenth of the steps at full rank, and half of them at the final one, as in about the paper's runs on GLUE.
    steps = context.total_steps
    return AdaLoraConfig(
        **options,
        init_r=spec.rank,
        target_r=spec.final_rank,
        tinit=steps // 10,
        tfinal=steps // 2,
        deltaT=max(1, steps // 100),
        total_step=max(1, steps),
    )


def _vera(spec: AdapterSpec, reach: Targets, context: AdapterContext) -> VeraConfig:
    # The projections are saved with the adapter: another torch may draw others from the same key.
    bias = "vera_only" if spec.bias == "lora_only" else spec.bias
    return VeraConfig(
        **_target_kwargs(spec, reach, context), r=spec.rank, vera_dropout=spec.dropout, bias=bias, save_projection=True
    )


def _loha(spec: AdapterSpec, reach: Targets, context: AdapterContext) -> LoHaConfig:
    return LoHaConfig(**_target_kwargs(spec, reach, context), r=spec.rank, alpha=spec.alpha, rank_dropout=spec.dropout)


def _lokr(spec: AdapterSpec, reach: Targets, context: AdapterContext) -> LoKrConfig:
    return LoKrConfig(**_target_kwargs(spec, reach, context), r=spec.rank, alpha=spec.alpha, rank_dropout=spec.dropout)


def _ia3(spec: AdapterSpec, reach: Targets, context: AdapterContext) -> IA3Config:
    forward = list(spec.feedforward_modules or ())
    if spec.target_modules is None:
        return IA3Config(
            **{**_target_kwargs(spec, reach, context), "target_modules": None}
        )  # PEFT's table by architecture
    return IA3Config(**_target_kwargs(spec, reach, context), feedforward_modules=forward)


def _oft(spec: AdapterSpec, reach: Targets, context: AdapterContext) -> OFTConfig:
    bias = "oft_only" if spec.bias == "lora_only" else spec.bias
    return OFTConfig(
        **_target_kwargs(spec, reach, context),
        r=0,
        oft_block_size=spec.rotation_size,
        module_dropout=spec.dropout,
        bias=bias,
    )


def _boft(spec: AdapterSpec, reach: Targets, context: AdapterContext) -> BOFTConfig:
    if spec.butterflies and spec.butterflies > 1 and get_fbd_cuda() is None:
        raise LoraError(
            "adapter.butterflies: PEFT's extension for more than one does not load here: it needs a GPU and a compiler",
            hint="write butterflies: 1, which PEFT would silently take",
        )
    return BOFTConfig(
        **_target_kwargs(spec, reach, context),
        boft_block_size=spec.rotation_size,
        boft_n_butterfly_factor=spec.butterflies,
        boft_dropout=spec.dropout,
        bias="boft_only" if spec.bias == "lora_only" else spec.bias,
    )


def _virtual(spec: AdapterSpec, context: AdapterContext) -> dict[str, Any]:
    return {
        "task_type": TASKS[context.task].peft,
        "num_virtual_tokens": spec.virtual_tokens,
        "modules_to_save": list(context.heads) or None,
    }


def _prefix(spec: AdapterSpec, _: Targets, context: AdapterContext) -> PrefixTuningConfig:
    return PrefixTuningConfig(**_virtual(spec, context))


def _prompt(spec: AdapterSpec, _: Targets, context: AdapterContext) -> PromptTuningConfig:
    return PromptTuningConfig(**_virtual(spec, context), prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB)


def _p_tuning(spec: AdapterSpec, _: Targets, context: AdapterContext) -> PromptEncoderConfig:
    return PromptEncoderConfig(**_virtual(spec, context), encoder_hidden_size=spec.hidden_size)


METHODS: dict[MethodName, Method] = {
    "lora": Method(_lora),
    "rslora": Method(_rslora),
    "dora": Method(_dora, post_attach=init_adapter.init_dora_magnitudes),
    "lora+": Method(_lora),  # its learning rates are the optimizer's
    "scaled": Method(_lora, post_attach=init_adapter.add_row_scale),
    "pissa": Method(_lora, init=init_adapter.init_pissa),
    "olora": Method(_lora, init=init_adapter.init_olora),
    "corda": Method(_lora, init=init_adapter.init_corda, pre_init=init_adapter.collect_corda_statistics),
    "eva": Method(_eva, init=init_adapter.init_eva),
    "loftq": Method(_lora, init=init_adapter.init_loftq),
    "adalora": Method(_adalora),
    "vera": Method(_vera),
    "loha": Method(_loha),
    "lokr": Method(_lokr),
    "ia3": Method(_ia3),
    "oft": Method(_oft),
    "boft": Method(_boft),
    "prefix": Method(_prefix),
    "prompt": Method(_prompt, init=init_adapter.init_prompt),
    "p-tuning": Method(_p_tuning),
}


def attach(model: PreTrainedModel, spec: AdapterSpec, *, seed: int, context: AdapterContext | None = None) -> PeftModel:
    """Freeze `model` and add the trainable adapter that `spec` describes, drawn from `seed`.

    With B = 0, and with what is neutral in other methods, the model is what it was; pissa, olora and corda are so but
    for rounding; loftq, prefix, prompt and p-tuning are not by design.

    Raises:
        LoraError: target modules that match no layer or only some of those that are alike, patterns and modules that
            match nothing, or a kind of layer that the method cannot adapt.
    """
    context = context or AdapterContext()
    method, facts = METHODS[spec.method], METHOD_FACTS[spec.method]
    heads = list(dict.fromkeys([*context.heads, *target_modules.find_modules(model, spec.modules_to_save or ())]))
    reach = Targets([])
    if "target_modules" in facts.options and spec.target_modules is not None:
        reach = target_modules.resolve_target_modules(model, spec, heads=heads)
    tokens = _token_ids(spec.trainable_tokens or (), context)
    reach = reach._replace(tokens=target_modules.resolve_trainable_tokens(model, tokens, whole=heads))
    _refuse_untrainable(model, heads)
    _refuse_unknown_to_peft(model, spec, context)
    config = method.config(spec, reach, context)
    if config.is_prompt_learning:
        _tell_sizes(config, model)
    if isinstance(config, LoraConfig):
        gguf_base.register_packed_lora(config)
    if method.pre_init and context.plan is not None:
        method.pre_init(model, config, context)
    torch.manual_seed(seed)
    try:
        # fp32 master weights: AdamW's small updates would be rounded away in bf16.
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    except (ValueError, TypeError) as reason:
        first = _in_one_line(str(reason)) or type(reason).__name__
        hint = OTHER_TARGETS
        if "lora_dropout" in first:  # experts whose weights are one parameter
            hint = "set adapter.dropout: 0, or choose other adapter.target_modules"
        elif "Mamba" in first:  # its kernels multiply with the bare weights, past any adapter
            hint = "leave it out: adapter.exclude_modules: [out_proj, conv1d]"
        raise LoraError(f"adapter: PEFT refuses it: {first}", hint=hint) from reason
    target_modules.check_patterns(spec, adapted_layers(adapted))
    _refuse_changed_sizes(adapted, spec)
    if spec.method in ("pissa", "olora", "corda", "loftq", "eva"):
        _refuse_large_ranks(adapted, spec)
    if method.post_attach:
        method.post_attach(adapted)
    if method.init and context.plan is not None:
        method.init(adapted, spec, context)
        if isinstance(config, LoraConfig):  # EVA's new ranks come in the base's dtype
            adapted.base_model._cast_adapter_dtype(init_adapter.ADAPTER_NAME)
    if spec.freeze_a:  # LoRA-FA (Zhang et al., arXiv:2308.03303): the update stays in the space that A spans
        _freeze(adapted, ".lora_A.", ".lora_embedding_A.")
    # A divisor that PEFT's cast to fp32 makes trainable, and that is not saved: set by the rank, it stays what it is.
    _freeze(adapted, ".ranknum.")
    return adapted


def _refuse_unknown_to_peft(model: PreTrainedModel, spec: AdapterSpec, context: AdapterContext) -> None:
    """What PEFT would only find when it is too late, or say in words that no recipe has."""
    kind = model.config.model_type
    known = kind in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    if spec.method == "ia3" and spec.target_modules is None and not known:
        raise LoraError(
            f"adapter.target_modules: for ia3 PEFT has no default on {kind}",
            hint="list them, and the MLP's last ones in feedforward_modules too; "
            f"{target_modules.describe_linear_layers(model)}",
        )
    parts = (model, model.base_model)
    if spec.method == "prefix" and not any("past_key_values" in signature(p.forward).parameters for p in parts):
        raise LoraError(
            f"adapter.method: a {kind} model takes no keys and values from before, which prefix is",
            hint="write method: prompt or lora",
        )
    virtual = "virtual_tokens" in METHOD_FACTS[spec.method].options
    if virtual and model.config.is_encoder_decoder and TASKS[context.task].classes:
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
    for name, layer in init_adapter.lora_layers(model):
        most = min(layer.out_features, int(layer.in_features / looked_for))
        rank = layer.r[init_adapter.ADAPTER_NAME]
        if rank > most:
            raise LoraError(
                f"adapter.rank: {rank} is more than {name} has components for",
                hint=f"at most {most}, or leave such layers out of adapter.target_modules",
            )


def check_gradients_reach(model: PeftModel, loss: Callable[[], Tensor]) -> None:
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


def _token_ids(tokens: Sequence[str], context: AdapterContext) -> list[int]:
    """The id of each of `tokens`.

    Raises:
        LoraError: a text that the tokenizer does not know as one token.
    """
    found = []
    for token in tokens:
        ids = context.encode(token) if context.encode else []
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


def coverage(model: PeftModel, layers: dict[str, nn.Module]) -> list[target_modules.Coverage]:
    """How much of each kind of the base's linear `layers` (taken before `attach`) carries the adapter."""
    return target_modules.coverage(layers, adapted_layers(model))
