"""torchtune: recipes with `_component_` keys, and what they become. No torch."""

import re

from lora_cli.convert.batches import Batches, carry_batches, carry_no_packing
from lora_cli.convert.config import as_list, as_number, known_values, show
from lora_cli.convert.draft import Draft
from lora_cli.convert.huggingface import carry_clipping, carry_output, carry_steps
from lora_cli.convert.sources import NO_PATH, Source, carry_split, write_sources
from lora_cli.convert.tables import (
    CODE,
    EVALUATION,
    HARDWARE,
    LOGGING,
    OWN_TOKENIZER,
    RESUME,
    SHARDING,
    TRACKING,
    KeyTable,
    apply_table,
)
from lora_cli.convert.torchtune_text import COMPONENT, carry_text, plain_family
from lora_cli.convert.tracking import KEYS as TRACKING_KEYS
from lora_cli.convert.values import DTYPES, carry_optimizer, carry_torch_decay, family_of, positive

# Dataset builders: hub id, format, columns, and whether the prompt carries loss by default.
DATASETS: dict[str, tuple[str, str, dict[str, str], bool]] = {
    "alpaca_dataset": ("tatsu-lab/alpaca", "alpaca", {}, True),
    "alpaca_cleaned_dataset": ("yahma/alpaca-cleaned", "alpaca", {}, True),
    "grammar_dataset": ("liweili/c4_200m", "query-response", {"query": "input", "response": "output"}, False),
    "samsum_dataset": ("Samsung/samsum", "query-response", {"query": "dialogue", "response": "summary"}, False),
    "slimorca_dataset": ("Open-Orca/SlimOrca-Dedup", "sharegpt", {}, False),
    "chat_dataset": ("", "sharegpt", {}, False),
    "instruct_dataset": ("", "query-response", {"query": "input", "response": "output"}, False),
    "text_completion_dataset": ("", "text", {}, True),
    "cnn_dailymail_articles_dataset": ("ccdv/cnn_dailymail", "text", {"text": "article"}, True),
    "wikitext_dataset": ("EleutherAI/wikitext_document_level", "text", {"text": "page"}, True),
}
NO_DATASET: tuple[str, str, dict[str, str], bool] = ("", "", {}, False)  # of this name
# With tokenizers that add no chat template, the text of a pair is the prompt and its answer.
PLAIN = {"query": "prompt", "response": "completion"}
LOSSES = ("all", "assistant", "last-turn")
TABLE = KeyTable(
    no_effect={
        HARDWARE: "compile enable_activation_checkpointing enable_activation_offloading optimizer_in_bwd "
        "optimizer.fused optimizer.foreach activation_checkpointing activation_offloading_use_streams "
        "custom_sharded_layers low_cpu_ram dataset.num_workers dataloader.num_workers dataloader.pin_memory "
        "dataloader.prefetch_factor dataloader.parallel_method loss.num_output_chunks loss.chunk_size "
        "loss.tiling_strategy use_loss_parallel_ctx_manager "
        "dataloader.persistent_workers dataloader.collate_fn collate_fn keep_last_n_checkpoints",
        SHARDING: "fsdp_cpu_offload fsdp_reshard_after_forward data_parallel_shard_dim data_parallel_replicate_dim "
        "tensor_parallel_dim context_parallel_dim tensor_parallel_plan parallelize_plan device process_group_backend "
        "memory_efficient_fsdp_wrap fsdp_sharding_strategy",
        LOGGING: "log_level log_peak_memory_stats profiler name",
        TRACKING: "metric_logger",
        RESUME: "resume_from_checkpoint should_load_recipe_state",
        CODE: "cudnn_deterministic_mode epochs_to_save checkpointer.output_dir checkpointer.checkpoint_files "
        "checkpointer.model_type checkpointer.recipe_checkpoint checkpointer.safe_serialization "
        "checkpointer.keep_last_n_checkpoints save_every_epoch",
        "the adapter alone is saved": "save_adapter_weights_only save_last_epoch_only",
        OWN_TOKENIZER: "tokenizer.path tokenizer.merges_file tokenizer.special_tokens_path tokenizer._component_ "
        "tokenizer.special_tokens tokenizer.tokenizer_json_path tokenizer.tokenizer_config_json_path",
        EVALUATION: "eval_batch_size",
    },
    same={
        "the base's own layers": "model.max_seq_len model.tie_word_embeddings",
    },
    not_offered={
        "8-bit floats; accepted: 16 bits": "enable_fp8_training fp8_recipe_name",
        "an image model: `lora train` trains text models": "model.image_size tokenizer.image_size "
        "model.decoder_trainable model.encoder_trainable model.fusion_trainable",
        "the chat template is the tokenizer's; accepted: that one": "tokenizer.prompt_template tokenizer.chat_template",
        "-100 is the label of tokens without loss; accepted: -100": "loss.ignore_index=-100",
        "rows are chosen by code: write them to a file; accepted: all rows": "dataset.filter_fn",
        "AdamW's epsilon is 1e-8; accepted: 1e-8": "optimizer.eps=1e-8 optimizer.amsgrad",
        "the decay goes to 0; accepted: so": "lr_scheduler.num_cycles=0.5 lr_scheduler.last_epoch=-1",
        "quantization-aware training; accepted: without it": "quantizer",
        "a teacher is another task; accepted: without it": "kd_ratio kd_loss teacher_model teacher_checkpointer",
    },
    handled="output_dir model model._component_ model.lora_attn_modules model.apply_lora_to_mlp "
    "model.apply_lora_to_output model.lora_rank model.lora_alpha model.lora_dropout model.use_dora model.quantize_base "
    "checkpointer._component_ checkpointer.checkpoint_dir checkpointer.adapter_checkpoint tokenizer.max_seq_len "
    "dataset dataset._component_ dataset.packed dataset.source dataset.split dataset.train_on_input dataset.column "
    "dataset.masking_strategy "
    "dataset.column_map dataset.conversation_column dataset.conversation_style dataset.data_files dataset.name "
    "dataset.new_system_prompt dataset.add_eos dataset.max_rows dataset.split_across_pack dataset.max_seq_len "
    "dataset_val run_val_every_n_steps dataset.partition datasets dataloader seed shuffle epochs max_steps_per_epoch "
    "batch_size gradient_accumulation_steps optimizer optimizer._component_ optimizer.lr optimizer.weight_decay "
    "optimizer.betas lr_scheduler lr_scheduler._component_ lr_scheduler.num_warmup_steps loss loss._component_ "
    "clip_grad_norm dtype log_every_n_steps save_every_n_steps checkpointer dataset.dataset dataloader.shuffle "
    f"dataloader.packed tokenizer metric_logger._component_ {TRACKING_KEYS}",
)


def convert(draft: Draft) -> None:
    """Convert a config of torchtune."""
    config = draft.config
    component = str(config.get(f"model.{COMPONENT}") or "")
    builder = component.rpartition(".")[2]
    if not re.search(r"(q?lora|dora)_", builder):
        reason = f"{builder or 'the model'} trains every weight, and here only adapters: its LoRA config is converted"
        draft.other_task(f"model.{COMPONENT}", reason)
    loss = str(config.get(f"loss.{COMPONENT}") or "")
    if re.search(r"rlhf|DPO|PPO|GRPO|RSO|SimPO|KL", loss):
        draft.other_task(f"loss.{COMPONENT}", "another task: `lora train` does supervised fine-tuning")
    if re.search(r"CrossEntropy|CEWith", loss):
        draft.same(f"loss.{COMPONENT}", "cross-entropy")
    draft.refuse(f"loss.{COMPONENT}", "another loss; accepted: cross-entropy")
    _carry_model(draft, builder)
    _carry_training(draft)
    _carry_rows(draft)
    apply_table(draft, TABLE)


def _carry_model(draft: Draft, builder: str) -> None:
    config = draft.config
    folder = config.text("checkpointer.checkpoint_dir")
    checkpointer = str(config.get(f"checkpointer.{COMPONENT}") or "")
    if folder:
        draft.carry("checkpointer.checkpoint_dir", "model.path", folder.rstrip("/"))
    else:
        draft.missing("checkpointer.checkpoint_dir", "the config names no base; accepted: a placeholder in model.path")
    if "HF" in checkpointer or not checkpointer:
        draft.same(f"checkpointer.{COMPONENT}", "the base is a folder in Hugging Face's format")
    draft.refuse(f"checkpointer.{COMPONENT}", "the base must be in Hugging Face's format; accepted: it is")
    if config.text("checkpointer.adapter_checkpoint"):
        draft.carry("checkpointer.adapter_checkpoint", "adapter.from", config.text("checkpointer.adapter_checkpoint"))
    family = family_of(f"{folder} {builder}")
    if config.switch("model.use_dora") or builder.startswith(("dora_", "qdora_")):
        draft.carry("model.use_dora", "adapter.method", "dora")
        draft.put("adapter.method", "dora", "model")
    draft.same("model.use_dora", "asks for nothing")
    draft.carried(
        f"model.{COMPONENT}",
        "quantization.bits" if builder.startswith("q") else "adapter.method",
        4 if "qlora" in builder else "lora",
    )
    if re.match(r"q(lora|dora)_", builder) or config.switch("model.quantize_base"):
        draft.put("quantization.bits", 4, f"model: {builder}, with torchao's nf4")
        draft.carried("model.quantize_base", "quantization.bits", 4)
    draft.same("model.quantize_base", "asks for nothing")
    names = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "output_proj": "o"}
    written = [str(name) for name in as_list(config.get("model.lora_attn_modules"))]
    modules = [family.attention.get(names.get(name, ""), name) for name in written]
    if len(set(modules)) < len(modules) or (modules and "qkv" in modules[0] and len(written) < 4):
        note = "the base has one module for queries, keys and values: all of it is adapted"
        draft.refuse("model.lora_attn_modules", f"{note}; accepted: so")
    modules += family.mlp if config.switch("model.apply_lora_to_mlp") else ()
    modules += ["lm_head"] if config.switch("model.apply_lora_to_output") else []
    targets = list(dict.fromkeys(modules))
    if not targets and "lora" in builder:
        reason = "names no part that is adapted, which torchtune refuses; accepted: every linear layer"
        draft.missing("model.lora_attn_modules", reason)
    draft.put("adapter.target_modules", targets or "all-linear", "model.lora_attn_modules")
    for key in ("lora_attn_modules", "apply_lora_to_mlp", "apply_lora_to_output"):
        draft.carried(f"model.{key}", "adapter.target_modules", targets)
    for key, to, default in (
        ("lora_rank", "adapter.rank", 8),
        ("lora_alpha", "adapter.alpha", 16.0),
        ("lora_dropout", "adapter.dropout", 0.0),
    ):
        value = config.number(f"model.{key}")
        if value is None:
            draft.assume(to, default)
        else:
            draft.carry(f"model.{key}", to, value if key == "lora_rank" else float(value))
    dtype = config.text("dtype")
    if dtype in DTYPES:
        draft.carry(
            "dtype", "model.dtype", DTYPES[dtype], "the adapter is trained in float32" if dtype != "fp32" else ""
        )
    carry_output(draft, "output_dir")


def _carry_training(draft: Draft) -> None:
    config = draft.config
    per_epoch = positive(config.number("max_steps_per_epoch"))
    epochs = config.number("epochs") or 1
    if per_epoch:
        steps = max(1, int(per_epoch * epochs))
        note = f"in {show(epochs)} epochs, each of which has as many steps or more"
        draft.carry("max_steps_per_epoch", "training.max_steps", steps, note)
        draft.same("epochs", "max_steps has them")
    else:
        draft.same("max_steps_per_epoch", "asks for nothing")
        carry_steps(draft, epochs="epochs", max_steps="max_steps", default=1.0)
    rate = config.number("optimizer.lr")
    if rate is None:
        draft.assume("training.learning_rate", 1e-3, "of the optimizer")
    else:
        draft.carry("optimizer.lr", "training.learning_rate", float(rate))
    carry_optimizer(draft, f"optimizer.{COMPONENT}", default="adamw")
    carry_torch_decay(draft, "optimizer.weight_decay", str(config.get(f"optimizer.{COMPONENT}") or "AdamW"))
    carry_betas(draft, "optimizer.betas")
    scheduler = str(config.get(f"lr_scheduler.{COMPONENT}") or "")
    if not config.get("lr_scheduler"):
        draft.assume("training.schedule", "constant", "no lr_scheduler")
        draft.assume("training.warmup", 0, "no lr_scheduler")
    else:
        if "cosine" not in scheduler:
            draft.refuse(f"lr_scheduler.{COMPONENT}", f"there is no schedule {scheduler}; accepted: cosine")
        draft.carry(f"lr_scheduler.{COMPONENT}", "training.schedule", "cosine")
        warmup = config.number("lr_scheduler.num_warmup_steps") or 0
        draft.put("training.warmup", warmup, "lr_scheduler.num_warmup_steps")
        draft.carried("lr_scheduler.num_warmup_steps", "training.warmup", warmup)
    carry_clipping(draft, "clip_grad_norm", default=None)
    if config.whole("seed") is None:
        draft.same("seed", "null is a random seed: here training.seed is 42")
    else:
        draft.carry("seed", "training.seed", config.whole("seed"))
    for key in ("shuffle", "dataloader.shuffle"):
        if config.switch(key):
            draft.same(key, "rows are shuffled")
        draft.refuse(key, "rows are always shuffled; accepted: shuffled", always=True)
    every = positive(config.number("log_every_n_steps"))
    if every:
        draft.carry("log_every_n_steps", "training.log_every", int(every))
    if saved := positive(config.number("save_every_n_steps")):
        draft.carry("save_every_n_steps", "training.save_every", int(saved))


def carry_betas(draft: Draft, key: str, default: tuple[float, float] = (0.9, 0.999)) -> None:
    """Carry the two betas of AdamW from one list."""
    values = [as_number(each) for each in as_list(draft.config.get(key))] or list(default)
    if len(values) != 2 or None in values:
        raise draft.config.error(key, "not two numbers")
    for to, value in zip(("training.adam_beta1", "training.adam_beta2"), values, strict=True):
        if draft.config.has(key):
            draft.put(to, value, key)
        else:
            draft.assume(to, value)
    draft.carried(key, "training.adam_beta1 and adam_beta2", values)


def _carry_rows(draft: Draft) -> None:
    config = draft.config
    length = config.whole("tokenizer.max_seq_len")
    packing = config.switch("dataset.packed") or config.switch("dataloader.packed")
    if length:
        draft.carry("tokenizer.max_seq_len", "data.max_length", length)
        draft.assume("data.overlong", "truncate", "the end of longer rows is cut")
    else:
        why = "no limit; here a longer row is an error"
        draft.put("data.max_length", 8192, f"torchtune's default: {why}")
        draft.carried("tokenizer.max_seq_len", "data.max_length", 8192, why)
    if packing:
        draft.carry("dataset.packed", "data.packing", True)
        draft.carried("dataloader.packed", "data.packing", True)
    else:
        draft.same("dataloader.packed", "asks for nothing")
        carry_no_packing(draft, "dataset.packed")
    batches = Batches(
        "batch_size",
        config.count("batch_size", 1),
        "gradient_accumulation_steps",
        config.count("gradient_accumulation_steps", 1),
        length or 8192,
    )
    carry_batches(draft, batches, packing=packing)
    if isinstance(config.get("datasets"), list):
        _carry_mixture(draft)
        draft.assume("data.eval", None, "no rows are held out")
        return
    listed = config.get("dataset")
    prefixes = [f"dataset[{index}]" for index in range(len(listed))] if isinstance(listed, list) else ["dataset"]
    names = {prefix: _builder(draft, prefix) for prefix in prefixes}
    carry_text(draft, {prefix: name for prefix, name in names.items() if DATASETS.get(name, NO_DATASET)[1] != "text"})
    sources = [_source(draft, prefix) for prefix in prefixes]
    write_sources(draft, "data.train", [source for source, _ in sources])
    losses = {loss for source, loss in sources if source.values.get("format") != "text"}
    if losses:
        loss_on = min(losses, key=LOSSES.index)
        for prefix, (_, loss) in zip(prefixes, sources, strict=True):
            for key in ("train_on_input", "masking_strategy"):
                if loss != loss_on:
                    draft.refuse(f"{prefix}.{key}", f"loss_on is for all sources; accepted: {loss_on}", always=True)
                draft.carried(f"{prefix}.{key}", "data.loss_on", loss)
        written = any(
            config.has(f"{prefix}.{key}") for prefix in prefixes for key in ("train_on_input", "masking_strategy")
        )
        if written:
            draft.put("data.loss_on", loss_on, "dataset.train_on_input or masking_strategy")
        else:
            draft.assume("data.loss_on", loss_on, "of this dataset")
    if config.get("dataset_val"):
        held_out, _ = _source(draft, "dataset_val")
        write_sources(draft, "data.eval", [held_out])
    else:
        draft.assume("data.eval", None, "no rows are held out")
    if every := positive(config.number("run_val_every_n_steps")):
        draft.carry("run_val_every_n_steps", "training.eval_every", int(every))
    draft.same("run_val_every_n_steps", "asks for nothing")


def _builder(draft: Draft, prefix: str) -> str:
    """Return the name of a dataset builder, without its module."""
    return str(draft.config.get(f"{prefix}.{COMPONENT}") or "").rpartition(".")[2]


def _source(draft: Draft, prefix: str) -> tuple[Source, str]:
    """Return a source, and the tokens of it that carry loss, in the words of data.loss_on."""
    config, name, plain = draft.config, _builder(draft, prefix), plain_family(draft)
    path, kind, columns, on_input = DATASETS.get(name, NO_DATASET)
    if kind == "query-response" and plain:
        kind = "prompt-completion"
        columns = {PLAIN[ours]: column for ours, column in columns.items()}
    source = Source({}, f"{prefix}: {name}")
    if not kind:
        draft.refuse(f"{prefix}.{COMPONENT}", f"there is no dataset {show(name)} here; accepted: data/train.jsonl")
    path = config.text(f"{prefix}.source") or path
    files = [str(each) for each in as_list(config.get(f"{prefix}.data_files"))]
    if path in ("json", "csv", "parquet", "text") and files:
        path = files[0]
    if kind and not path:
        draft.missing(f"{prefix}.source", NO_PATH)
    source.values["path"] = path or "data/train.jsonl"
    if kind:
        if config.text(f"{prefix}.conversation_style") == "openai":
            kind = "messages"
        source.values["format"] = kind
        note = (
            "in Alpaca's text; an input follows the instruction, without a heading of its own"
            if name.startswith("alpaca")
            else ""
        )
        if kind == "prompt-completion" and plain and not plain.startswith("gemma"):
            note = "from version 0.3 on, [INST] is around prompts"
        draft.carried(f"{prefix}.{COMPONENT}", "format", kind, note)
    given = config.get(f"{prefix}.column_map")
    for theirs, column in (dict(given) if isinstance(given, dict) else {}).items():
        names = {"query-response": ("query", "response"), "prompt-completion": ("prompt", "completion")}.get(kind)
        ours = dict(zip(("input", "output"), names, strict=True)).get(theirs, theirs) if names else theirs
        columns = {**columns, ours: str(column)}
        draft.carried(f"{prefix}.column_map.{theirs}", f"columns.{ours}", column)
    for key, ours in (
        ("column", "text"),
        ("conversation_column", "messages" if kind == "messages" else "conversations"),
    ):
        if value := config.text(f"{prefix}.{key}"):
            columns = {**columns, ours: value}
            draft.carried(f"{prefix}.{key}", f"columns.{ours}", value)
    source.columns(**columns)
    for key in ("source", "data_files"):
        draft.carried(f"{prefix}.{key}", "path", source.values["path"])
    draft.carried(f"{prefix}.conversation_style", "format", kind)
    if subset := config.text(f"{prefix}.name"):
        source.values["subset"] = subset
        draft.carried(f"{prefix}.name", "subset", subset)
    if split := config.text(f"{prefix}.split"):
        if refused := carry_split(draft, f"{prefix}.split", source, split):
            draft.refuse(f"{prefix}.split", refused)
        draft.carried(f"{prefix}.split", "split", source.values.get("split"))
    draft.refuse(f"{prefix}.new_system_prompt", "the system message is the row's; accepted: the row's")
    draft.refuse(f"{prefix}.partition", "a part of the rows; accepted: all rows")
    if config.switch(f"{prefix}.add_eos", default=True):
        draft.same(f"{prefix}.add_eos", "texts end with EOS")
    draft.refuse(f"{prefix}.add_eos", "texts end with EOS; accepted: so", always=True)
    draft.refuse(f"{prefix}.split_across_pack", "rows are not cut at the end of a pack; accepted: whole")
    draft.same(f"{prefix}.packed", "as the training rows")
    strategy = config.text(f"{prefix}.masking_strategy")
    loss = {"train_on_all": "all", "train_on_assistant": "assistant", "train_on_last": "last-turn"}.get(strategy or "")
    if strategy and loss is None:
        draft.refuse(f"{prefix}.masking_strategy", "loss is on all, the answers or the last one; accepted: the answers")
    if strategy is None or config.has(f"{prefix}.train_on_input"):
        loss = "all" if config.switch(f"{prefix}.train_on_input", default=on_input) else "assistant"
    return source, loss or "assistant"


def _carry_mixture(draft: Draft) -> None:
    sources = []
    entries = [known_values(entry) for entry in draft.config.get("datasets") if isinstance(entry, dict)]
    for index, entry in enumerate(entries):
        prefix = f"datasets[{index}]"
        source = Source({"path": str(entry.get("source") or "data/train.jsonl")}, prefix)
        if not entry.get("source"):
            draft.missing(f"{prefix}.source", NO_PATH)
        draft.carried(f"{prefix}.source", "path", source.values["path"])
        for key in ("subset", "split", "weight"):
            if entry.get(key) is not None and not (key == "weight" and entry[key] == 1):
                source.values[key] = entry[key]
            draft.carried(f"{prefix}.{key}", key, entry.get(key))
        draft.refuse(f"{prefix}.transform", "rows are changed by code; accepted: as they are stored")
        sources.append(source)
    write_sources(draft, "data.train", sources)
