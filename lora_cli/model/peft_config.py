"""Build PEFT's configuration (LoraConfig and others) of each adapter method: the table METHODS."""

from collections.abc import Callable
from typing import Any, NamedTuple

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
)
from peft.tuners.boft.layer import get_fbd_cuda
from peft.tuners.lora.config import EvaConfig
from transformers import PreTrainedModel

from lora_cli.errors import LoraError
from lora_cli.model import init_adapter
from lora_cli.model.adapter_context import AdapterContext
from lora_cli.model.target_modules import Targets
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.methods import MethodName
from lora_cli.recipe.schema import AdapterSpec

MIN_ADALORA_STEPS = 3  # one to score components, one to drop some, one to train the others


class Method(NamedTuple):
    """One adapter method: its PEFT configuration, and the initialization of its layers."""

    config: Callable[[AdapterSpec, Targets, AdapterContext], PeftConfig]
    post_attach: Callable[[PeftModel], None] | None = None  # adds parameters that PEFT does not have
    init: Callable[[PeftModel, AdapterSpec, AdapterContext], None] | None = None  # needs training rows or weights
    pre_init: Callable[[PreTrainedModel, PeftConfig, AdapterContext], None] | None = None  # on the base, before attach


def _target_kwargs(spec: AdapterSpec, targets: Targets, context: AdapterContext) -> dict[str, Any]:
    """Return the keyword arguments that all methods over layers share: task, target modules, fully trained modules."""
    return {
        "task_type": TASKS[context.task].task_type,
        "target_modules": targets.modules,
        "modules_to_save": [*context.heads, *(spec.modules_to_save or ())] or None,
    }


def _lora(spec: AdapterSpec, targets: Targets, context: AdapterContext, **options: Any) -> LoraConfig:
    return LoraConfig(**_lora_options(spec, targets, context), **options)


def _lora_options(spec: AdapterSpec, targets: Targets, context: AdapterContext) -> dict[str, Any]:
    return {
        **_target_kwargs(spec, targets, context),
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "bias": spec.bias,
        "rank_pattern": dict(spec.rank_pattern or {}),
        "alpha_pattern": dict(spec.alpha_pattern or {}),
        "trainable_token_indices": targets.tokens,
        "target_parameters": list(targets.parameters) or None,
    }


def _rslora(spec: AdapterSpec, targets: Targets, context: AdapterContext) -> LoraConfig:
    return _lora(spec, targets, context, use_rslora=True)


def _dora(spec: AdapterSpec, targets: Targets, context: AdapterContext) -> LoraConfig:
    return _lora(spec, targets, context, use_dora=True)


def _eva(spec: AdapterSpec, targets: Targets, context: AdapterContext) -> LoraConfig:
    if context.plan is None:  # shapes only: PEFT would warn that no EVA initialization follows
        return _lora(spec, targets, context)
    return _lora(spec, targets, context, init_lora_weights="eva", eva_config=EvaConfig())


def _adalora(spec: AdapterSpec, targets: Targets, context: AdapterContext) -> AdaLoraConfig:
    assert spec.rank is not None
    options = _lora_options(spec, targets, context)
    for absent in ("r", "rank_pattern", "alpha_pattern", "trainable_token_indices", "target_parameters"):
        del options[absent]
    if 0 < context.total_steps < MIN_ADALORA_STEPS:
        raise LoraError(
            f"adapter.method: adalora drops ranks step by step, and this run has {context.total_steps}",
            hint=f"raise training.max_steps or epochs to {MIN_ADALORA_STEPS} steps or more, or choose another method",
        )
    # Full rank for a tenth of the steps, the final rank for the second half: as in the paper's GLUE runs.
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


def _vera(spec: AdapterSpec, targets: Targets, context: AdapterContext) -> VeraConfig:
    # The projections are saved with the adapter: another torch version may generate other numbers from the same seed.
    bias = "vera_only" if spec.bias == "lora_only" else spec.bias
    return VeraConfig(
        **_target_kwargs(spec, targets, context),
        r=spec.rank,
        vera_dropout=spec.dropout,
        bias=bias,
        save_projection=True,
    )


def _loha(spec: AdapterSpec, targets: Targets, context: AdapterContext) -> LoHaConfig:
    return LoHaConfig(
        **_target_kwargs(spec, targets, context), r=spec.rank, alpha=spec.alpha, rank_dropout=spec.dropout
    )


def _lokr(spec: AdapterSpec, targets: Targets, context: AdapterContext) -> LoKrConfig:
    return LoKrConfig(
        **_target_kwargs(spec, targets, context), r=spec.rank, alpha=spec.alpha, rank_dropout=spec.dropout
    )


def _ia3(spec: AdapterSpec, targets: Targets, context: AdapterContext) -> IA3Config:
    forward = list(spec.feedforward_modules or ())
    if spec.target_modules is None:
        return IA3Config(
            **{**_target_kwargs(spec, targets, context), "target_modules": None}
        )  # PEFT's table by architecture
    return IA3Config(**_target_kwargs(spec, targets, context), feedforward_modules=forward)


def _oft(spec: AdapterSpec, targets: Targets, context: AdapterContext) -> OFTConfig:
    bias = "oft_only" if spec.bias == "lora_only" else spec.bias
    return OFTConfig(
        **_target_kwargs(spec, targets, context),
        r=0,
        oft_block_size=spec.rotation_size,
        bias=bias,
    )


def _boft(spec: AdapterSpec, targets: Targets, context: AdapterContext) -> BOFTConfig:
    if spec.butterflies and spec.butterflies > 1 and get_fbd_cuda() is None:
        raise LoraError(
            "adapter.butterflies: PEFT's extension for more than one cannot be loaded: it needs a GPU and a compiler",
            hint="write butterflies: 1, which PEFT would use without a message",
        )
    return BOFTConfig(
        **_target_kwargs(spec, targets, context),
        boft_block_size=spec.rotation_size,
        boft_n_butterfly_factor=spec.butterflies,
        boft_dropout=spec.dropout,
        bias="boft_only" if spec.bias == "lora_only" else spec.bias,
    )


def _virtual(spec: AdapterSpec, context: AdapterContext) -> dict[str, Any]:
    return {
        "task_type": TASKS[context.task].task_type,
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
    "lora+": Method(_lora),  # the optimizer sets its two learning rates
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
