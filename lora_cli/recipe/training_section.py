"""Recipe schema of the training section: steps, learning rate, optimizer, evaluation, checkpoints. No torch."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lora_cli.recipe.field_types import Count, Section, Seed, Switch, parse_integer

OptimizerName = Literal[
    "adamw",
    "adamw-8bit",
    "paged-adamw",
    "paged-adamw-8bit",
    "lion",
    "lion-8bit",
    "paged-lion",
    "paged-lion-8bit",
    "adafactor",
    "muon",
    "schedule-free-adamw",
]


class TrainingSpec(Section):
    """Optimization: steps, batches, learning rate, optimizer, evaluation and checkpoints."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows; fractions are allowed. Above 0. Default 1. Not together with max_steps."""
    max_steps: Count | None = None
    """Optimizer steps to train for, instead of epochs. At least 1."""
    tokens_per_batch: Literal["auto"] | Count | None = None
    """With packing: tokens per device batch. At least data.max_length, which is the default. auto: all tokens of a step
    on a device in one batch, in as few parts as memory allows: gradient_accumulation times data.max_length, or its
    share of tokens_per_step."""
    batch_size: Count | None = None
    """Without packing: rows per device batch. At least 1. Default 4."""
    gradient_accumulation: Count = 1
    """Batches per optimizer step on each device, which tokens_per_batch: auto joins; the loss is the mean over the
    supervised tokens of all devices. At least 1. Default 1."""
    tokens_per_step: Count | None = None
    """With packing: tokens per optimizer step, over all devices, in place of gradient_accumulation: a step has the same
    rows for any number of devices. A multiple of tokens_per_batch. Default null: a step grows with the devices."""
    rows_per_step: Count | None = None
    """Without packing: rows per optimizer step, over all devices, in place of gradient_accumulation. A multiple of
    batch_size. Default null: a step grows with the devices."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 2e-4
    """Peak learning rate. Above 0, at most 10. Default 2e-4. Usual for LoRA: adamw, muon, adafactor 1e-4 to 5e-4; lion
    2e-5 to 1e-4; schedule-free-adamw 2e-4 to 2e-3."""
    min_learning_rate: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Learning rate that the decay ends at, absolute (not a fraction of learning_rate). At least 0. Default 0."""
    schedule: Literal["constant", "linear", "cosine", "cosine-with-restarts", "wsd"] = "cosine"
    """Learning rate after the warmup: constant, linear or cosine (default) decay, cosine-with-restarts (`cycles` decays
    in a row), or wsd (constant, then linear `decay`). schedule-free-adamw: constant."""
    cycles: Annotated[int, Field(ge=2), BeforeValidator(parse_integer)] | None = None
    """cosine-with-restarts: number of cosine decays, each from learning_rate. At least 2. Default 2."""
    decay: Annotated[float, Field(gt=0)] | None = None
    """wsd: length of the decay at the end: a fraction of all steps if below 1, else a number of steps. Above 0.
    Default 0.1."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Linear warmup of the learning rate from 0: a fraction of all steps if below 1, else a number of steps.
    At least 0. Default 0.03."""
    optimizer: Literal["auto"] | OptimizerName = "adamw"
    """adamw (default, and auto): torch's fused AdamW; -8bit: moments in 8 bits; paged-: moments that move to CPU memory
    when the GPU is full; muon: for LoRA's matrices, adamw for the rest; schedule-free-adamw: saves the average of the
    weights."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay rate of the first moment (mean of the gradients). From 0 to below 1. Default 0.9."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's decay rate of the second moment (mean of the squared gradients). From 0 to below 1. Default 0.999."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay of the trained parameters: per step, learning rate times this. From 0 to 1. Default 0."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradient clipping: a gradient with a larger L2 norm is scaled down to this norm. Above 0; null disables it.
    Default 1."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each label's probability spread over all classes, in training only. From 0 to below 1. Default 0."""
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """NEFTune (arXiv:2310.05914): uniform noise of size alpha/sqrt(tokens·hidden size) on the embeddings of each row,
    in training only. Above 0. Default null: no noise."""
    gradient_checkpointing: Literal["auto"] | Switch = "auto"
    """Recompute activations in the backward pass: less memory, half as much time again. auto (default): of as few
    layers as memory requires, tried on a GPU before the first step; true: of every layer; false: of none."""
    on_spike: Literal["warn", "skip"] = "warn"
    """A step whose loss is more than 6 standard deviations above the mean of the last 128 steps: warn (default), or
    skip: its gradients are not used, the step counts. skip also skips a loss or gradient that is not finite, which is
    an error otherwise; more than 8 skipped steps in a row are an error."""
    seed: Seed = 42
    """Seed of adapter initialization, dropout, row order and held-out rows. From 0 to 4294967295. Default 42."""
    eval_every: Count | None = 100
    """Optimizer steps between evaluations. One before the first and one after the last step always run; null: only
    these. At least 1. Default 100."""
    save_every: Count | None = 100
    """Optimizer steps between checkpoints. The last step is always saved; null: only the last step.
    At least 1. Default 100."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep; older ones are deleted. At least 1. Default 2."""
    keep: Literal["last", "best"] = "last"
    """Step whose adapter is the result: the last (default), or the best: that of the lowest evaluation loss, whose
    checkpoint is saved when it is measured and never deleted."""
    stop_after: Count | None = None
    """Stop early after this many evaluations in a row without a lower evaluation loss. At least 1. Default null: never.
    The learning rate schedule is still that of all steps."""
    answer_every: Count | None = None
    """Optimizer steps between greedy answers to held-out prompts, written to answers.jsonl; also before the first and
    after the last step. At least 1. Default null: none."""
    answer_prompts: Count = 4
    """Number of held-out prompts that answer_every answers: the first ones. At least 1. Default 4."""
    log_every: Count = 1
    """Optimizer steps between progress lines; metrics.jsonl records every step. At least 1. Default 1."""

    @model_validator(mode="before")
    @classmethod
    def _fill_steps_and_schedule(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        filled = dict(values)
        if filled.get("epochs") is None and filled.get("max_steps") is None:
            filled["epochs"] = 1.0
        if filled.get("optimizer") == "schedule-free-adamw":
            filled.setdefault("schedule", "constant")
        if filled.get("schedule") == "cosine-with-restarts" and filled.get("cycles") is None:
            filled["cycles"] = 2
        if filled.get("schedule") == "wsd" and filled.get("decay") is None:
            filled["decay"] = 0.1
        return filled
