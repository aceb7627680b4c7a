"""Every field of a recipe: its type, unit, default and range. Frozen, closed, no torch."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MethodName = Literal["lora", "rslora", "dora"]
FormatName = Literal["messages", "sharegpt", "alpaca", "prompt-completion", "text", "tokens"]


def _switch(value: object) -> object:
    # YAML 1.1 made `no` and `off` booleans everywhere; here they are words unless a boolean is due.
    words = {"yes": True, "on": True, "no": False, "off": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def _whole(value: object) -> object:
    # `1e3` is a float to YAML and a whole number to whoever wrote it.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Switch = Annotated[bool, BeforeValidator(_switch)]
Count = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1), BeforeValidator(_whole)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A part of a recipe: unknown keys, loose types, NaN and infinity are all refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSpec(Section):
    """The base model that the adapter is trained on."""

    path: str = Field(min_length=1)
    """Hub id, local folder, or a `.gguf` file (loaded dequantised)."""
    revision: str | None = None
    """Branch, tag or commit that pins a hub model; default: the hub's main branch."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of base weights and compute; auto: bfloat16 where the device computes in it, else float32."""
    attention: str = "auto"
    """auto, sdpa, eager, flash_attention_2, ...; auto: the fastest one that keeps packed rows apart here."""
    trust_remote_code: Switch = False
    """Run Python code that the model's repository ships. Only for repositories you have read."""


class QuantizationSpec(Section):
    """How the frozen base is held in memory (QLoRA). Leave the section out for plain 16-bit LoRA."""

    bits: Literal[4, 8] = 4
    """Bits per weight of the frozen linear layers: 4 or 8."""
    type: Literal["nf4", "fp4"] | None = None
    """4-bit code: nf4 (default; fits normally distributed weights) or fp4. Not for 8 bits."""
    double_quant: Switch | None = None
    """Quantise the 4-bit scales too: about 0.4 bits a parameter less. Default true. Not for 8 bits."""
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype that weights are dequantised to for each matrix product."""

    @model_validator(mode="before")
    @classmethod
    def _fill_four_bit(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("bits", 4) == 4:
            filled = {key: value for key, value in given.items() if value is not None}
            return {"type": "nf4", "double_quant": True, **filled}
        return given


class AdapterSpec(Section):
    """The trainable part."""

    method: MethodName = "lora"
    """lora: W + alpha/rank·BA; rslora: alpha/sqrt(rank) instead; dora: magnitude and direction apart."""
    rank: Count = 16
    """Inner dimension r of B·A. Adapter size and memory grow linearly with it. At least 1."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Numerator of the scale alpha/rank that the update is multiplied with. Above 0."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of the adapter's inputs that is zeroed at each training step. From 0 to below 1."""
    target_modules: str | list[str] = "all-linear"
    """all-linear (every linear layer but the output head), a list of names, or a regex over full names."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases of the base that are trained too. Other than none, switching the adapter off is not the base."""


class SourceSpec(Section):
    """One source of rows."""

    path: str = Field(min_length=1)
    """File (.jsonl .json .csv .parquet .txt), folder of them or saved by `datasets`, or hub dataset id."""
    split: str | None = None
    """Split of a hub or saved dataset; default: train (for data.eval: validation, test or train)."""
    format: Literal["auto"] | FormatName | None = None
    """Row format of this source; default: data.format."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Times each row is seen per epoch: 2 repeats every row, 0.5 takes a seeded half of them."""
    columns: dict[str, str] = {}
    """Renames: {prompt: question} reads the format's `prompt` from `question`. Adds to data.columns."""


class DataSpec(Section):
    """Rows, and how they become token ids and labels."""

    train: str | list[SourceSpec]
    """Rows to train on: a path or hub dataset id, or a list of sources."""
    eval: str | Annotated[float, Field(gt=0.0, lt=1.0)] | list[SourceSpec] | None = 0.05
    """Rows to evaluate on: a path, a list of sources, a fraction held out of train, or null for none."""
    format: Literal["auto"] | FormatName = "auto"
    """Row format; auto looks at the columns, says what it found, and refuses when rows disagree."""
    columns: dict[str, str] = {}
    """Renames for every source: {prompt: question} reads the format's `prompt` from column `question`."""
    chat_template: str | None = None
    """Named template (chatml, ...), path or inline Jinja, for a model without. Default: the tokenizer's."""
    loss_on: Literal["assistant", "last-turn", "all"] = "assistant"
    """Tokens that carry loss: every assistant turn, only the last one, or every token of the row."""
    max_length: Count = 1024
    """Longest row in tokens."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """What to do with longer rows: stop, leave them out, or cut their end. Counted and shown in any case."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with rows that cannot be read: stop and list them, or leave them out, counted and shown."""
    max_loss: Fraction | None = None
    """Largest share of rows that may be lost. Default: 0 with overlong and on_bad_row at error, else 0.1."""
    packing: Switch = True
    """Fill each batch with whole rows end to end, attention confined to the row, instead of padding."""


class TrainingSpec(Section):
    """The optimisation."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows, fractions allowed. Default 1. Not together with max_steps."""
    max_steps: Count | None = None
    """Optimizer steps to train for, instead of epochs."""
    tokens_per_batch: Count | None = None
    """With packing: tokens in one device batch. Default: data.max_length. At least that."""
    batch_size: Count | None = None
    """Without packing: rows in one device batch. Default 4."""
    gradient_accumulation: Count = 1
    """Device batches per optimizer step. The loss stays the mean over all their supervised tokens."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 2e-4
    """Peak learning rate of AdamW. Above 0."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warmup: constant, or linear or cosine decay to 0."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Steps in which the rate rises from 0: a fraction of all steps if below 1, else a number of steps."""
    optimizer: Literal["adamw"] = "adamw"
    """adamw: torch's AdamW, with betas 0.9 and 0.999, over the adapter's fp32 weights."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay of the adapter per step, times the learning rate."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this L2 norm where theirs is larger; null switches it off."""
    gradient_checkpointing: Literal["auto"] | Switch = "auto"
    """Recompute activations in the backward pass: less memory, a third more time. auto: only if needed."""
    seed: Seed = 42
    """Seed of adapter initialisation, dropout, row order and held-out rows."""
    eval_every: Count | None = 100
    """Optimizer steps between evaluations; before the first and after the last step there is always one."""
    save_every: Count | None = 100
    """Optimizer steps between checkpoints; there is always one at the end."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept; older ones are deleted."""
    log_every: Count = 1
    """Optimizer steps between progress lines; metrics.jsonl has every step."""

    @model_validator(mode="before")
    @classmethod
    def _fill_epochs(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("epochs") is None and given.get("max_steps") is None:
            return {**given, "epochs": 1.0}
        return given


class DistributedSpec(Section):
    """How a run spreads over processes. Leave the section out: all GPUs of this machine, else the CPU."""

    strategy: Literal["ddp"] = "ddp"
    """ddp: every process holds the whole model and an equal share of each step's batches."""
    processes: Literal["auto"] | Count = "auto"
    """Processes on this machine; auto: one per GPU, or one on the CPU."""


class Recipe(Section):
    """A whole run of `lora train`."""

    model: ModelSpec
    """The base model that the adapter is trained on."""
    task: Literal["causal-lm"] = "causal-lm"
    """causal-lm: predict the next token."""
    quantization: QuantizationSpec | None = None
    """How the frozen base is held in memory (QLoRA). Leave it out for plain 16-bit LoRA."""
    adapter: AdapterSpec = AdapterSpec()
    """The trainable part."""
    data: DataSpec
    """Rows, and how they become token ids and labels."""
    training: TrainingSpec = TrainingSpec.model_validate({})
    """The optimisation."""
    distributed: DistributedSpec = DistributedSpec()
    """How a run spreads over processes."""
    output: str = Field(default="runs/lora", min_length=1)
    """Folder of the run: recipe, manifest, metrics, checkpoints and adapter."""

    @model_validator(mode="after")
    def _fill_batch(self) -> Self:
        """Fill the one batch size that packing leaves in use, so that a resolved recipe shows it."""
        training = self.training
        if self.data.packing and training.tokens_per_batch is None:
            training = training.model_copy(update={"tokens_per_batch": self.data.max_length})
        if not self.data.packing and training.batch_size is None:
            training = training.model_copy(update={"batch_size": 4})
        # Frozen for everyone else: the recipe is still being built here.
        object.__setattr__(self, "training", training)
        return self
