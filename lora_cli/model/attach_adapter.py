"""Attach the trainable adapter to the base model with PEFT, and check that every adapted layer can learn."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from inspect import signature

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import EvaConfig
from peft.tuners.oft import OFTLayer
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.errors import LoraError
from lora_cli.model import expert_targets, experts, init_adapter, multimodal, sharding, target_modules
from lora_cli.model.adapter_context import AdapterContext
from lora_cli.model.fused_lora import register_custom_layers
from lora_cli.model.fused_mlp import fuse_mlps
from lora_cli.model.peft_config import METHODS
from lora_cli.model.peft_waits import remove_waits
from lora_cli.model.shared_input import share_inputs
from lora_cli.model.target_modules import Targets
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.methods import METHOD_FACTS
from lora_cli.recipe.schema import AdapterSpec

OTHER_TARGETS = "choose other adapter.target_modules or another adapter.method"


def attach(model: PreTrainedModel, spec: AdapterSpec, *, seed: int, context: AdapterContext | None = None) -> PeftModel:
    """Freeze `model` and add the trainable adapter that `spec` describes, initialized from `seed`.

    A fresh adapter does not change the outputs (B = 0, or the neutral values of other methods); with pissa, olora and
    corda this holds within rounding; loftq, prefix, prompt and p-tuning change them by design.

    Raises:
        LoraError: target modules that match no layer or only some of the layers of their kind, patterns and modules
            that match nothing, or a kind of layer that the method cannot adapt.
    """
    context = context or AdapterContext()
    method, facts = METHODS[spec.method], METHOD_FACTS[spec.method]
    heads = list(dict.fromkeys([*context.heads, *target_modules.find_modules(model, spec.modules_to_save or ())]))
    targets = Targets([])
    if "target_modules" in facts.options and spec.target_modules is not None:
        targets = target_modules.resolve_target_modules(model, spec, heads=heads)
    if targets.parameters:
        spec = spec.model_copy(update={"dropout": expert_targets.expert_dropout(spec)})
    tokens = _token_ids(spec.trainable_tokens or (), context)
    targets = targets._replace(tokens=target_modules.resolve_trainable_tokens(model, tokens, modules_to_save=heads))
    _check_trainable(model, heads)
    _check_method_supported(model, spec, context)
    config = method.config(spec, targets, context)
    if config.is_prompt_learning:
        _set_model_sizes(config, model)
    if isinstance(config, LoraConfig):
        register_custom_layers(config)
        fuse_mlps(model)
    if method.pre_init and context.plan is not None:
        method.pre_init(model, config, context)
    torch.manual_seed(seed)
    try:
        # fp32 master weights: AdamW's small updates would be rounded away in bf16.
        with experts.placeholders(model), sharding.placeholders(model):
            adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    except (ValueError, TypeError) as reason:
        first = _first_line(str(reason)) or type(reason).__name__
        hint = OTHER_TARGETS
        if "Mamba" in first:  # its kernels multiply with the weights directly and bypass the adapter
            hint = "leave it out: adapter.exclude_modules: [out_proj, conv1d]"
        raise LoraError(f"adapter: PEFT rejects it: {first}", hint=hint) from reason
    target_modules.check_patterns(spec, adapted_layers(adapted))
    _check_rotation_size(adapted, spec)
    if spec.method in ("pissa", "olora", "corda", "loftq", "eva"):
        _check_rank(adapted, spec)
    if method.post_attach:
        method.post_attach(adapted)
    if method.init and context.plan is not None:
        method.init(adapted, spec, context)
        if isinstance(config, LoraConfig):  # EVA creates layers of a new rank in the base's dtype
            cast_adapter_dtype(adapted.base_model, init_adapter.ADAPTER_NAME)
    if spec.freeze_a:  # LoRA-FA (Zhang et al., arXiv:2308.03303): the update stays in the space that A spans
        _freeze(adapted, ".lora_A.", ".lora_embedding_A.")
    # AdaLoRA's divisor: PEFT's cast to fp32 makes it trainable, but it is not saved. It is the rank, a constant.
    _freeze(adapted, ".ranknum.")
    # `bias: all` of PEFT includes the biases of towers that text does not pass through.
    _freeze(adapted, *(f".{part.name}." for part in multimodal.outside_text(adapted.get_base_model())))
    if isinstance(config, LoraConfig):
        share_inputs(adapted.get_base_model())
    remove_waits(adapted)
    return adapted


def _check_method_supported(model: PreTrainedModel, spec: AdapterSpec, context: AdapterContext) -> None:
    """Raise a LoraError for combinations that PEFT would report late, or in terms that are not keys of a recipe."""
    model_type = model.config.model_type
    known = model_type in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    if spec.method == "ia3" and spec.target_modules is None and not known:
        raise LoraError(
            f"adapter.target_modules: PEFT has no default of ia3 for {model_type}",
            hint="list them, and the last layers of the MLP in feedforward_modules too; "
            f"{target_modules.describe_linear_layers(model)}",
        )
    parts = (model, model.base_model)
    if spec.method == "prefix" and not any("past_key_values" in signature(p.forward).parameters for p in parts):
        raise LoraError(
            f"adapter.method: prefix tuning needs a key/value cache, which {model_type} models do not have",
            hint="write method: prompt or lora",
        )
    virtual = "virtual_tokens" in METHOD_FACTS[spec.method].options
    if virtual and model.config.is_encoder_decoder and TASKS[context.task].is_classification:
        raise LoraError(
            f"adapter.method: {spec.method} adds virtual tokens, which {model_type} classifiers do not accept",
            hint="write method: lora",
        )


def _set_model_sizes(config: PeftConfig, model: PreTrainedModel) -> None:
    """Set the sizes in `config` if the model's own config has them under names that PEFT does not read."""
    text_config = model.config.get_text_config()
    if not {"hidden_size", "n_embd", "d_model"} & model.config.to_dict().keys():
        config.token_dim = text_config.hidden_size
        config.num_layers = text_config.num_hidden_layers
        config.num_attention_heads = text_config.num_attention_heads


def _first_line(text: str) -> str:
    """Return the first line of PEFT's message, without the layer that it may print over many lines."""
    lines = text.splitlines()
    if len(lines) > 1 and lines[0].endswith("("):
        return f"{lines[0].removesuffix('(')} is not supported"
    return lines[0] if lines else ""


def _check_rotation_size(model: PeftModel, spec: AdapterSpec) -> None:
    """Raise if the block size does not divide a layer's inputs: PEFT would use another size, and save this one."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, OFTLayer) and module.in_features % (spec.rotation_size or 1):
            raise LoraError(
                f"adapter.rotation_size: {spec.rotation_size} does not divide the {module.in_features} inputs of "
                f"{name}",
                hint="write a divisor of all layers' inputs, such as 32",
            )


def _check_rank(model: PeftModel, spec: AdapterSpec) -> None:
    """Raise if a layer has fewer components than the rank; EVA selects from more components than the rank."""
    factor = EvaConfig().rho if spec.method == "eva" else 1
    for name, layer in init_adapter.lora_layers(model):
        largest = min(layer.out_features, int(layer.in_features / factor))
        rank = layer.r[init_adapter.ADAPTER_NAME]
        if rank > largest:
            raise LoraError(
                f"adapter.rank: {rank} is more than the components that {name} has",
                hint=f"at most {largest}, or leave such layers out of adapter.target_modules",
            )


def check_gradients_reach(model: PeftModel, loss: Callable[[], Tensor]) -> None:
    """Check that every adapted layer gets a gradient: some models use a layer's weight and bypass the layer.

    Args:
        model: with the adapter.
        loss: computes a loss of `model`, a scalar fp32 tensor.

    Raises:
        LoraError: an adapted layer gets no gradient, so that it would not be trained.
    """
    loss().backward()
    bypassed = []
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer):
            trained = [p for p in module.parameters() if p.requires_grad]
            if trained and all(p.grad is None for p in trained):
                bypassed.append(name.rpartition(".")[2])
    model.zero_grad(set_to_none=True)
    if bypassed:
        kinds = ", ".join(sorted(set(bypassed)))
        raise LoraError(
            f"adapter.target_modules: no gradient reaches {kinds}: "
            "the model uses these weights directly and bypasses the adapter",
            hint=f"leave them out: adapter.exclude_modules: [{kinds}]",
        )


def _freeze(model: PeftModel, *parts: str) -> None:
    for name, parameter in model.named_parameters():
        if any(part in name for part in parts):
            parameter.requires_grad = False


def _check_trainable(model: PreTrainedModel, modules: Sequence[str]) -> None:
    for name in modules:
        for parameter in model.get_submodule(name).parameters():
            if not parameter.is_floating_point() or hasattr(parameter, "quant_state"):  # codes may be stored as floats
                raise LoraError(
                    f"adapter.modules_to_save: {name} is quantized, and quantized weights cannot be trained",
                    hint="adapt it in target_modules instead",
                )


def _token_ids(tokens: Sequence[str], context: AdapterContext) -> list[int]:
    """Return the id of each of `tokens`.

    Raises:
        LoraError: a text that is not one token of the tokenizer.
    """
    token_ids = []
    for token in tokens:
        ids = context.encode(token) if context.encode else []
        if len(ids) != 1:
            raise LoraError(
                f"adapter.trainable_tokens: {token!r} is {len(ids)} tokens to this tokenizer, not one",
                hint="list it in model.new_tokens too, so that it becomes one, or write one of its tokens",
            )
        token_ids += ids
    return token_ids


def adapted_layers(model: PeftModel) -> dict[str, int]:
    """Return the trainable parameters of each layer that carries the adapter, by its full name in the base model.

    A stacked weight of experts counts as a layer, with the full name of the parameter.
    """
    counts: Counter[str] = Counter()
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer):
            # Experts with two adapted parameters are a wrapper in a wrapper: each parameter counted once.
            inner = (m for m in module.modules() if m is not module and isinstance(m, BaseTunerLayer))
            others = {id(p) for m in inner for p in m.parameters()}
            own = sum(p.numel() for p in module.parameters() if p.requires_grad and id(p) not in others)
            layer = re.sub(r"(\.base_layer)+$", "", name)
            counts[f"{layer}.{module.parameter_name}" if hasattr(module, "parameter_name") else layer] += own
    return dict(counts)


def coverage(model: PeftModel, layers: dict[str, nn.Module]) -> list[target_modules.Coverage]:
    """Return how much of each kind of layer carries the adapter.

    Args:
        model: with the adapter.
        layers: the linear layers of the base by full name, listed before `attach`; experts and routers are added.
    """
    base = model.get_base_model()
    stacked = experts.expert_weights(base)
    kinds = {name: name.rpartition(".")[2] for name in layers}
    kinds |= {name: ".".join(name.split(".")[-2:]) for name in stacked}
    kinds |= {
        name: f"{name.removesuffix('.weight').rpartition('.')[2]} (router)" for name in experts.router_names(base)
    }
    return target_modules.coverage(kinds, adapted_layers(model), {name: w.shape[0] for name, w in stacked.items()})
