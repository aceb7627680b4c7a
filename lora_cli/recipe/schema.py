"""Every field of a recipe: its type, unit, default and range. Frozen, closed, no torch."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lora_cli.recipe.methods import METHOD_FACTS, MethodName
from lora_cli.recipe.tasks import FormatName, TaskName


def _switch(value: object) -> object:
    # YAML 1.1 made `no` and `off` booleans everywhere; here they are words unless a boolean is due.
    words = {"yes": True, "on": True, "no": False, "off": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def _whole(value: object) -> object:
    # `1e3` is a float to YAML and a whole number to whoever wrote it.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Switch = Annotated[bool, BeforeValidator(_switch)]
Count = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
LayerNumber = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
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
    """Hub id, local folder, or a `.gguf` file."""
    revision: str | None = None
    """Branch, tag or commit that pins a hub model; default: the hub's main branch."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of base weights and compute; auto: bfloat16 where the device computes in it, else float32."""
    attention: str = "auto"
    """auto, sdpa, eager, flash_attention_2, ...; auto: the fastest one that keeps packed rows apart here."""
    trust_remote_code: Switch = False
    """Run Python code that the model's repository ships. Only for repositories you have read."""
    gguf: Literal["auto", "packed", "dequantized"] = "auto"
    """How a `.gguf` base is held: packed as it is, or dequantized to dtype; auto: packed where that can be trained."""
    new_tokens: list[str] = []
    """Tokens that are added to the tokenizer, as special ones; adapter.trainable_tokens teaches them."""


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
    storage_dtype: Literal["uint8", "bfloat16", "float16", "float32"] | None = None
    """Dtype that packed codes are stored as (default uint8); FSDP shards floating ones only. Not for 8 bits."""

    @model_validator(mode="before")
    @classmethod
    def _fill_four_bit(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("bits", 4) == 4:
            filled = {key: value for key, value in given.items() if value is not None}
            return {"type": "nf4", "double_quant": True, "storage_dtype": "uint8", **filled}
        return given


class AdapterSpec(Section):
    """The trainable part. Each method takes some of these keys; what it does not take is null."""

    method: MethodName = "lora"
    """How weights are adapted: lora, rslora, dora, lora+, pissa, adalora, ...; `lora methods` tells what each does."""
    rank: Count | None = None
    """Inner dimension r of B·A (default 16). Adapter size and memory grow linearly with it. At least 1."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Numerator of the scale alpha/rank that the update is multiplied with (default 32). Above 0."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Share that is zeroed at each training step: of the adapter's inputs (lora: default 0.05); of the update's rows
    (loha, lokr); of the rotations (oft, boft)."""
    target_modules: str | list[str] | None = None
    """all-linear (every linear layer but the output head), a list of names, or a regex over full names."""
    exclude_modules: str | list[str] | None = None
    """Names, or a regex over full names, of modules that target_modules would reach and must not."""
    layers: list[LayerNumber] | None = None
    """Numbers of the layers to adapt, from 0; default: all of them."""
    rank_pattern: dict[str, Count] | None = None
    """Ranks that differ from `rank`, by module name or regex: {down_proj: 32}."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """Alphas that differ from `alpha`, by module name or regex: {down_proj: 64}."""
    bias: Literal["none", "all", "lora_only"] | None = None
    """Biases of the base that are trained too. Other than none, switching the adapter off is not the base."""
    modules_to_save: list[str] | None = None
    """Modules that are trained whole and saved with the adapter: [lm_head]. A task's new head always is."""
    trainable_tokens: list[str] | None = None
    """Tokens whose embeddings are trained, each alone, and saved with the adapter: ["<|im_end|>"]."""
    freeze_a: Switch | None = None
    """LoRA-FA: A stays as drawn and only B learns, so that the inputs of the layers need not be kept."""
    lr_ratio: Annotated[float, Field(ge=1)] | None = None
    """lora+: how many times the learning rate of A the one of B is (default 16)."""
    final_rank: Count | None = None
    """adalora: mean rank that is left in the end (default 8); `rank` is the one it starts with."""
    feedforward_modules: list[str] | None = None
    """ia3: those of target_modules whose inputs are scaled, in place of their outputs."""
    rotation_size: Count | None = None
    """oft (default 32), boft (default 4): size of a rotation's blocks; it divides the layers' inputs."""
    butterflies: Count | None = None
    """boft: factors of the product of rotations (default 1); each lets twice as many inputs mix."""
    virtual_tokens: Count | None = None
    """prefix, prompt, p-tuning: trained positions before the first token (default 20)."""
    init_text: str | None = None
    """prompt: text whose embeddings the trained ones start from; default: those of words drawn by the seed."""
    hidden_size: Count | None = None
    """p-tuning: width of the network that makes the embeddings (default 128)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_options(cls, given: Any) -> Any:
        """Fill in the defaults of the method; what it does not take stays null, and is refused where it is set."""
        if isinstance(given, dict) and (facts := METHOD_FACTS.get(given.get("method", "lora"))):
            filled = {key: value for key, value in given.items() if value is not None or key not in facts.options}
            return {**facts.options, **filled}
        return given


class SourceSpec(Section):
    """One source of rows."""

    path: str = Field(min_length=1)
    """File (.jsonl .json .csv .parquet .txt), folder of them or saved by `datasets`, or hub dataset id."""
    subset: str | None = None
    """Configuration of a hub dataset that has several: `cola` of `nyu-mll/glue`."""
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
    packing: Switch | None = None
    """Fill each batch with whole rows end to end, attention confined to the row, instead of padding. Default: true
    for causal-lm, where adapter and base allow it."""
    labels: Literal["auto", "regression"] | list[str] = "auto"
    """Names of the labels in the order of their numbers, for seq-cls and token-cls; auto: found in the training rows;
    regression: rows have numbers to come near to."""


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
    optimizer: Literal["auto", "adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"] = "adamw"
    """adamw: torch's, fused; -8bit: moments in 8 bits; paged-: moments that may leave a full GPU; auto: says which."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay of the mean of gradients."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's decay of the mean of squared gradients."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay of the adapter per step, times the learning rate."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this L2 norm where theirs is larger; null switches it off."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each label's weight that is spread over all classes while training; evaluation has none."""
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """NEFTune (arXiv:2310.05914): uniform noise of alpha/sqrt(tokens·width) on a row's embeddings while training."""
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


class GenerationSpec(Section):
    """How `lora eval` has the model answer."""

    num_beams: Count = 1
    """Beams that are searched; 1: greedy."""
    length_penalty: float | None = None
    """Beam scores are divided by length to this power (default 1): above 0 longer answers gain. Only with beams."""
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    """0: always the most likely token; above: tokens are drawn, from logits divided by it, by training.seed."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Drawn are only the most likely tokens that have this much probability together."""
    no_repeat_ngram: Count | None = None
    """Runs of so many tokens occur at most once in an answer; default: no such limit."""
    max_new_tokens: Count | None = None
    """Longest answer in tokens; default: twice the longest reference, at most 200."""

    @model_validator(mode="before")
    @classmethod
    def _fill_penalty(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("num_beams", 1) != 1 and given.get("length_penalty") is None:
            return {**given, "length_penalty": 1.0}
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
    task: TaskName = "causal-lm"
    """causal-lm: next tokens; seq-cls: a label for the row; token-cls: one for each word; seq2seq-lm: another text."""
    quantization: QuantizationSpec | None = None
    """How the frozen base is held in memory (QLoRA). Leave it out for plain 16-bit LoRA."""
    adapter: AdapterSpec = AdapterSpec.model_validate({})
    """The trainable part."""
    data: DataSpec
    """Rows, and how they become token ids and labels."""
    training: TrainingSpec = TrainingSpec.model_validate({})
    """The optimisation."""
    generation: GenerationSpec = GenerationSpec.model_validate({})
    """How `lora eval` has the model answer."""
    distributed: DistributedSpec = DistributedSpec()
    """How a run spreads over processes."""
    output: str = Field(default="runs/lora", min_length=1)
    """Folder of the run: recipe, manifest, metrics, checkpoints and adapter."""

    @model_validator(mode="after")
    def _fill_batch(self) -> Self:
        """Fill packing, and the one batch size that it leaves in use, so that a resolved recipe shows them."""
        training = self.training
        if self.data.packing is None:
            # LLM.int8 picks its outlier columns over the whole batch: packed rows would change each other's results.
            int8 = self.quantization is not None and self.quantization.bits == 8
            packs = self.task == "causal-lm" and METHOD_FACTS[self.adapter.method].packs and not int8
            object.__setattr__(self, "data", self.data.model_copy(update={"packing": packs}))
        if self.data.packing and training.tokens_per_batch is None:
            training = training.model_copy(update={"tokens_per_batch": self.data.max_length})
        if not self.data.packing and training.batch_size is None:
            training = training.model_copy(update={"batch_size": 4})
        # Frozen for everyone else: the recipe is still being built here.
        object.__setattr__(self, "training", training)
        return self
