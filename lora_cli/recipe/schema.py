"""Recipe schema: the type, unit, range and default of every field, as frozen pydantic models. No torch."""

from typing import Annotated, Any, Literal, Self, cast

from pydantic import BeforeValidator, Field, model_validator

from lora_cli.recipe.field_types import Count, Fraction, LayerNumber, Section, Switch, parse_integer
from lora_cli.recipe.methods import METHOD_FACTS, MethodName
from lora_cli.recipe.source_adapter import is_same_method, source_keys
from lora_cli.recipe.tasks import FormatName, TaskName
from lora_cli.recipe.tracking_section import TrackingSpec
from lora_cli.recipe.training_section import TrainingSpec


class ModelSpec(Section):
    """The base model that the adapter is trained on."""

    path: str = Field(min_length=1)
    """Hub id, local folder, or a `.gguf` file."""
    revision: str | None = None
    """Branch, tag or commit of a hub model. Default null: the main branch. Not for local models."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of the base weights and of the computation. auto: bfloat16 if the device computes in it, else
    float16 on a GPU (with a loss scale), float32 on a CPU."""
    attention: str = "auto"
    """Attention implementation of transformers: sdpa, eager, flash_attention_2, ... auto: the fastest that works for
    the model; with packing, the fastest without attention between packed rows."""
    trust_remote_code: Switch = False
    """Run the Python code of the model's repository. Read the code first. Default false."""
    gguf: Literal["auto", "packed", "dequantized"] = "auto"
    """How a `.gguf` base is stored in memory: packed as in the file, or dequantized to `dtype`. auto: packed if it can
    be trained on this device. Not for other models."""
    new_tokens: list[str] = []
    """Special tokens to add to the tokenizer. List them in adapter.trainable_tokens to train their embeddings."""


class QuantizationSpec(Section):
    """Quantization of the frozen base in memory (QLoRA). Leave the section out for LoRA on 16-bit weights."""

    bits: Literal[4, 8] = 4
    """Bits per weight of the frozen linear layers: 4 (default) or 8."""
    type: Literal["nf4", "fp4"] | None = None
    """4-bit data type: nf4 (default; made for normally distributed weights) or fp4. Not for 8 bits."""
    double_quant: Switch | None = None
    """Quantize the scales of the 4-bit weights too; saves about 0.4 bits per weight. Default true. Not for 8 bits."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype that 4-bit weights are dequantized to for each matrix product: auto (default; model.dtype), bfloat16,
    float16 or float32. No effect with 8 bits."""
    storage_dtype: Literal["uint8", "bfloat16", "float16", "float32"] | None = None
    """Dtype of the tensors that store the packed 4-bit weights (default uint8). FSDP shards floating-point dtypes only.
    Not for 8 bits."""

    @model_validator(mode="before")
    @classmethod
    def _fill_four_bit(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("bits", 4) == 4:
            set_values = {key: value for key, value in values.items() if value is not None}
            return {"type": "nf4", "double_quant": True, "storage_dtype": "uint8", **set_values}
        return values


class AdapterSpec(Section):
    """The adapter and other trainable parameters. Each method supports some of these keys; the others are null."""

    method: MethodName = "lora"
    """Adapter method: lora, rslora, dora, lora+, pissa, adalora, ...; `lora methods` describes each with its keys."""
    source: str | None = Field(default=None, alias="from", min_length=1)
    """Adapter to go on training: its folder, written by any tool that uses PEFT, or a run folder. Keys of this section
    that are left out are read from it, the others must agree with it. Default null: a new adapter."""
    rank: Count | None = None
    """Inner dimension r of B·A. At least 1. Default 16 (vera: 256). Adapter size and memory grow linearly with it."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The update is multiplied by alpha/rank (rslora: alpha/sqrt(rank)). Above 0. Default 32."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Dropout probability in training: of the adapter's inputs (default 0.05; vera: 0), of the rows of the update
    (loha, lokr: 0), or of the rotation blocks (boft: 0). From 0 to below 1."""
    target_modules: str | list[str] | None = None
    """Modules to adapt: all-linear (every linear layer except the output head), a list of module names, or a regex that
    matches full module names. Default all-linear (ia3: PEFT's defaults for the architecture)."""
    exclude_modules: str | list[str] | None = None
    """Modules to leave out of target_modules: a list of names, or a regex that matches full names. Default: none."""
    layers: list[LayerNumber] | None = None
    """Indices of the transformer layers to adapt, from 0. Default: all layers."""
    rank_pattern: dict[str, Count] | None = None
    """Ranks that differ from `rank`, by module name or regex: {down_proj: 32}. At least 1. Default: none."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """Alphas that differ from `alpha`, by module name or regex: {down_proj: 64}. Above 0. Default: none."""
    bias: Literal["none", "all", "lora_only"] | None = None
    """Biases of the base to train too: none (default), all, or lora_only (those of adapted layers). With trained
    biases, the model with the adapter disabled differs from the base."""
    modules_to_save: list[str] | None = None
    """Modules to train fully and save with the adapter: [lm_head]. The new head of a task is always included."""
    trainable_tokens: list[str] | None = None
    """Tokens whose embedding rows are trained and saved with the adapter: ["<|im_end|>"]. Default: none."""
    freeze_a: Switch | None = None
    """LoRA-FA (arXiv:2308.03303): train B only and keep A at its random initial value, which saves the memory of the
    layers' inputs. Default false."""
    lr_ratio: Annotated[float, Field(ge=1)] | None = None
    """lora+: learning rate of B divided by that of A. At least 1. Default 16."""
    final_rank: Count | None = None
    """adalora: mean rank at the end of training; training starts at `rank`. From 1 to `rank`. Default 8."""
    feedforward_modules: list[str] | None = None
    """ia3: those of target_modules whose inputs are scaled instead of their outputs. Default: none."""
    rotation_size: Count | None = None
    """oft (default 32), boft (default 4): size of the rotation blocks; must divide the layers' input dimension."""
    butterflies: Count | None = None
    """boft: number of butterfly factors in the product of rotations; each doubles the number of inputs that mix. At
    least 1. Default 1."""
    virtual_tokens: Count | None = None
    """prefix, prompt, p-tuning: number of virtual tokens before the first token. At least 1. Default 20."""
    init_text: str | None = None
    """prompt: text whose token embeddings initialize the virtual tokens. Default: random tokens."""
    hidden_size: Count | None = None
    """p-tuning: hidden size of the network that computes the embeddings. At least 1. Default 128."""

    @model_validator(mode="before")
    @classmethod
    def _fill_options(cls, values: Any) -> Any:
        """Fill in the keys of the adapter to train on, then the defaults of the method.

        Keys that the method does not support stay null (adapter_rules.py).
        """
        if isinstance(values, dict) and isinstance(values.get("from"), str):
            found = source_keys(values["from"])
            if found and is_same_method(values.get("method", found["method"]), found["method"]):
                values = {**found, **{key: value for key, value in values.items() if value is not None}}
        method = values.get("method", "lora") if isinstance(values, dict) else None
        if isinstance(method, str) and (facts := METHOD_FACTS.get(cast(MethodName, method))):
            set_values = {key: value for key, value in values.items() if value is not None or key not in facts.options}
            return {**facts.options, **set_values}
        return values


class SourceSpec(Section):
    """One dataset source."""

    path: str = Field(min_length=1)
    """File (.jsonl .json .csv .tsv .parquet .txt; text also .gz ...), folder, DIR/*.jsonl, URL, or hub dataset id."""
    subset: str | None = None
    """Subset (configuration) of a hub dataset that has several: `cola` of `nyu-mll/glue`."""
    split: str | None = None
    """Split of a dataset, or of a folder whose file names tell splits. Default: train; for data.eval, validation, else
    test, else train."""
    format: Literal["auto"] | FormatName | None = None
    """Row format of this source. Default: data.format."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Times that each row is used per epoch: 2 repeats every row, 0.5 uses a random half. Above 0, at most 1000."""
    max_rows: Count | None = None
    """Read only the first rows of the source, this many. At least 1. Default null: all rows."""
    delimiter: str | None = None
    """Character between the cells of a .csv or .tsv file: ";". Default: a comma, in .tsv a tab."""
    columns: dict[str, str | None] = {}
    """Column mapping: {prompt: question} reads the format's `prompt` from column `question`. Added to data.columns."""
    message_fields: dict[str, str] = {}
    """Keys of messages: {role: from, content: value}. Added to data.message_fields."""
    roles: dict[str, str] = {}
    """Roles of messages: {narrator: user}. Added to data.roles."""
    template_variables: dict[str, Any] = {}
    """Variables of the chat template for the rows of this source. Added to data.template_variables."""


class DataSpec(Section):
    """Datasets, and how their rows are converted to token ids and labels."""

    train: Annotated[str, Field(min_length=1)] | list[SourceSpec]
    """Path or hub dataset id of the training rows, or a list of sources."""
    eval: Annotated[str, Field(min_length=1)] | Annotated[float, Field(gt=0.0, lt=1.0)] | list[SourceSpec] | None = 0.05
    """Path or hub dataset id of the evaluation rows, a list of sources, a fraction (above 0, below 1) held out of
    train, or null for none. Default 0.05."""
    format: Literal["auto"] | FormatName = "auto"
    """Row format. auto: detected from the columns and printed; rows of different formats are an error."""
    columns: dict[str, str | None] = {}
    """Column mapping for every source: {prompt: question} reads the format's `prompt` from column `question`.
    {images: null} leaves out a column of the file on purpose, for example one that would change a row's meaning."""
    message_fields: dict[str, str] = {}
    """Keys of messages: {role: from, content: value} reads the role from `from`. Common names need no mapping."""
    roles: dict[str, str] = {}
    """Roles of messages: {narrator: user} reads the role narrator as user. Common names need no mapping."""
    chat_template: str | None = None
    """Chat template: a named template (chatml, ...), a path, or inline Jinja. Default: the tokenizer's own."""
    template_variables: dict[str, Any] = {}
    """Variables that the chat template reads: {enable_thinking: false}. Also the defaults of the saved template; a
    row's `chat_template_kwargs` take precedence."""
    template_date: str | None = None
    """Date that a chat template writes which asks for today's, as 2026-01-31. Default: the day on which the run starts,
    also if it is resumed."""
    loss_on: Literal["assistant", "last-turn", "all"] = "assistant"
    """Tokens with loss (label mask): all assistant turns (default), the last assistant turn, or the full row. Flags in
    the rows (weight: 0, train: false, ... of a turn or content part) only take loss away from these tokens."""
    max_length: Count = 1024
    """Longest row, in tokens. At least 1. Default 1024."""
    overlong: Literal["error", "drop", "truncate", "split"] = "error"
    """Rows longer than max_length: stop with an error (default), drop them, truncate their end, or split them (format
    text only) into rows in which every token carries loss once. They are always counted and reported."""
    stride: Annotated[int, Field(ge=0), BeforeValidator(parse_integer)] = 0
    """overlong: split only: tokens at the end of a chunk that the next one repeats as context, without loss. From 0 to
    below max_length. Default 0."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Rows that cannot be parsed: stop with an error that lists them (default), or skip them, counted and reported.
    skip also cuts conversations that end with another turn to their last answer."""
    merge_turns: Switch = False
    """Join consecutive turns of one role, with an empty line between them, and count them. Default false: such rows are
    bad."""
    dedup: Literal["exact"] | None = None
    """exact: of rows with the same tokens and labels (64-bit hashes), train and eval each keep the first over all
    sources; the others are counted. Default null: all rows."""
    max_loss: Fraction | None = None
    """Largest share of rows that may be lost, from 0 to 1. Default 0 if overlong and on_bad_row are error, else 0.1."""
    packing: Switch | None = None
    """Concatenate several rows in one sequence instead of padding, without attention between rows. Default: true for
    causal-lm, except with 8-bit quantization, or an adapter method or a base that does not support it."""
    labels: Literal["auto", "regression"] | list[str] = "auto"
    """seq-cls and token-cls: the label names in the order of their ids. auto: collected from the training rows.
    regression (seq-cls): the rows have numbers as targets, and the loss is the mean squared error."""


class GenerationSpec(Section):
    """Decoding of the answers that `lora eval` generates."""

    num_beams: Count = 1
    """Number of beams of the beam search. At least 1. Default 1: no beam search."""
    length_penalty: float | None = None
    """Beam search only: log-probabilities are divided by length to this power; above 0 favors longer answers.
    Default 1."""
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    """0 (default): the most likely token at each position. Above 0, at most 10: sample from the logits divided by this,
    with training.seed."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample only from the most likely tokens with this total probability. Above 0, at most 1. Default 1."""
    no_repeat_ngram: Count | None = None
    """Sequences of this many tokens occur at most once in an answer. At least 1. Default null: no limit."""
    max_new_tokens: Count | None = None
    """Longest answer, in tokens. At least 1. Default null: twice the longest reference, at most 200."""

    @model_validator(mode="before")
    @classmethod
    def _fill_penalty(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("num_beams", 1) != 1 and values.get("length_penalty") is None:
            return {**values, "length_penalty": 1.0}
        return values


class DistributedSpec(Section):
    """Data parallelism over processes. Leave the section out to use all GPUs of this machine, else the CPU."""

    strategy: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """ddp: every process has the full model and computes an equal share of each step. fsdp: the same, with the base
    sharded over the processes, which gather one layer at a time. hsdp: sharded over those of each machine, so that no
    layer crosses the network. auto: fsdp where the full model does not fit."""
    cpu_offload: Switch = False
    """With strategy fsdp or hsdp, the decoder layers wait in host memory and are copied to the GPU when they are
    gathered: for a base whose shards the GPUs cannot hold. Each layer crosses PCIe twice in a batch. Default false."""
    processes: Literal["auto"] | Count = "auto"
    """Number of processes on this machine. At least 1. auto: one per GPU, or one on the CPU."""
    timeout_minutes: Count = 10
    """Longest time in a step that processes wait for one that does not answer, in minutes; then the run ends with an
    error. While one process prepares files for all, they wait longer. At least 1. Default 10."""


class PerformanceSpec(Section):
    """Switches of speed. Leave the section out: each is chosen for model and device, and printed."""

    kernels: Literal["auto", "none", "liger"] = "auto"
    """Kernels of norms, rotary embeddings and gated MLPs. liger: those of the package liger-kernel, on a GPU; compared
    with the model's own before training. auto: liger where it is installed and has the architecture; none."""
    compile: Literal["auto"] | Switch = "auto"
    """torch.compile of each decoder layer: a start of minutes, then faster steps. auto: on a GPU, for runs of 1,000
    batches or more without adapter.dropout; not on the CPU, where it gains little."""
    deterministic: Switch = False
    """On a GPU, only operations that give the same bits each time, so that a resumed run equals an uninterrupted one
    exactly; slower. On the CPU that is always so. Default false."""


class Recipe(Section):
    """The full configuration of a `lora train` run."""

    model: ModelSpec
    """The base model that the adapter is trained on."""
    task: TaskName = "causal-lm"
    """causal-lm: next-token prediction; seq-cls: labels or a number per row; token-cls: a label per word; seq2seq-lm:
    text to text, with an encoder and a decoder."""
    quantization: QuantizationSpec | None = None
    """Quantization of the frozen base in memory (QLoRA). Default null: LoRA on 16-bit weights."""
    adapter: AdapterSpec = AdapterSpec.model_validate({})
    """The adapter and other trainable parameters."""
    data: DataSpec
    """Datasets, and how their rows are converted to token ids and labels."""
    training: TrainingSpec = TrainingSpec.model_validate({})
    """Optimization: steps, batches, learning rate, optimizer, evaluation and checkpoints."""
    generation: GenerationSpec = GenerationSpec.model_validate({})
    """Decoding of the answers that `lora eval` generates."""
    distributed: DistributedSpec = DistributedSpec()
    """Data parallelism over processes."""
    performance: PerformanceSpec = PerformanceSpec()
    """Switches of speed."""
    tracking: TrackingSpec | None = None
    """Experiment trackers that get every step and evaluation. Default null: nothing but the run folder."""
    output: str = Field(default="runs/lora", min_length=1)
    """Run folder: recipe, manifest, metrics, checkpoints and adapter. Default runs/lora."""

    @model_validator(mode="after")
    def _fill_batch(self) -> Self:
        """Fill in packing where it does not depend on the base, and the batch size: a written recipe shows them.

        Packing stays null where only the base can tell whether it is possible: `with_packing` fills it in.
        """
        packing, tokens = self.data.packing, self.training.tokens_per_batch
        if packing is None:
            # LLM.int8 chooses outlier columns over the full batch, so packed rows would change each other's results.
            int8 = self.quantization is not None and self.quantization.bits == 8
            possible = self.task == "causal-lm" and METHOD_FACTS[self.adapter.method].supports_packing and not int8
            wanted = tokens is not None or self.training.tokens_per_step is not None
            packing = possible if wanted or not possible else None
        if packing is not None:
            filled = self.with_packing(packing)
            # The model is frozen, but validation is still building it here.
            object.__setattr__(self, "data", filled.data)
            object.__setattr__(self, "training", filled.training)
        return self

    def with_compute_dtype(self, dtype: str) -> Self:
        """Return the recipe with the dtype that 4-bit weights are dequantized to, if it leaves it open."""
        spec = self.quantization
        if spec is None or spec.bits != 4 or spec.compute_dtype != "auto":
            return self
        return self.model_copy(update={"quantization": spec.model_copy(update={"compute_dtype": dtype})})

    def with_packing(self, packing: bool) -> Self:
        """Return the recipe with this packing, and the batch size that applies with or without it."""
        training = self.training
        if packing and training.tokens_per_batch is None:
            training = training.model_copy(update={"tokens_per_batch": self.data.max_length})
        if not packing and training.batch_size is None:
            rows = training.rows_per_step or 4
            size = max(count for count in range(1, 5) if rows % count == 0)
            training = training.model_copy(update={"batch_size": size})
        data = self.data.model_copy(update={"packing": packing})
        return self.model_copy(update={"data": data, "training": training})
