"""litgpt: configs of `litgpt finetune_lora`, and what their keys become. No torch."""

import os
from pathlib import Path

from lora_cli.convert.batches import carry_no_packing
from lora_cli.convert.config import as_number
from lora_cli.convert.draft import Draft
from lora_cli.convert.huggingface import carry_clipping, carry_output
from lora_cli.convert.sources import Source, write_sources
from lora_cli.convert.tables import CACHE, EVALUATION, HARDWARE, SHARDING, TRACKING, KeyTable, apply_table
from lora_cli.convert.torchtune import carry_betas
from lora_cli.convert.tracking import KEYS as TRACKING_KEYS
from lora_cli.convert.tracking import carry_tracking
from lora_cli.convert.values import carry_dtype, carry_optimizer, carry_torch_decay, family_of, positive
from lora_cli.recipe.other_tool_values import asks_for_nothing

# Data modules: hub id or URL, format, columns.
DATASETS: dict[str, tuple[str, str, dict[str, str]]] = {
    "Alpaca": ("yahma/alpaca-cleaned", "alpaca", {}),
    "Alpaca2k": ("mhenrichsen/alpaca_2k_test", "alpaca", {}),
    "AlpacaGPT4": ("vicgalle/alpaca-gpt4", "alpaca", {}),
    "Dolly": ("databricks/databricks-dolly-15k", "alpaca", {"input": "context", "output": "response"}),
    "Deita": ("HuggingFaceH4/deita-10k-v0-sft", "messages", {}),
    "JSON": ("", "alpaca", {}),
}
VAL_FRACTIONS = {"Alpaca": 0.03865, "Alpaca2k": 0.05, "AlpacaGPT4": 0.03847, "Dolly": 0.1, "LongForm": 0.0, "FLAN": 0.0}
PARTS = {"lora_query": "q", "lora_key": "k", "lora_value": "v", "lora_projection": "o"}
PART_DEFAULTS = {"lora_query": True, "lora_value": True}
TABLE = KeyTable(
    no_effect={
        HARDWARE: "num_nodes compiler",
        SHARDING: "tensor_parallel strategy",
        TRACKING: "log",
        EVALUATION: "eval.max_new_tokens eval.max_iters eval.initial_validation eval.final_validation "
        "eval.evaluate_example",
        CACHE: "data.init_args.num_workers data.init_args.download_dir "
        "data.init_args.file_url data.init_args.file_name data.num_workers",
        "files of the hub": "access_token model_name",
        "settings of GaLore, which is off": "galore.galore_8bit galore.galore_r galore.galore_update_proj_gap "
        "galore.galore_scale galore.galore_proj_type",
        "settings of LongLoRA, which is off": "longlora.n_groups longlora.context_length longlora.trainable_params",
        "for pretraining": "train.tie_embeddings resume",
        "training.seed sets which rows are held out": "data.init_args.seed",
    },
    not_offered={
        "-100 is the label of tokens without loss; accepted: -100": "data.init_args.ignore_index=-100",
        "GaLore trains every weight; accepted: the adapter": "galore.use_galore",
        "LongLoRA's shifted attention; accepted: full attention": "longlora.use_longlora",
        "a run is counted in steps or epochs; accepted: epochs": "train.max_tokens train.max_time",
        "the warmup is a fraction of all steps, not of an epoch; accepted: none": "train.lr_warmup_fraction",
        "AdamW's epsilon is 1e-8; accepted: 1e-8": "optimizer.init_args.eps=1e-8 optimizer.init_args.amsgrad",
        "rows are read as they are; accepted: so": "data.init_args.include_multiturn_conversations "
        "data.init_args.repo_id data.init_args.subsets",
        "the chat template writes the text; accepted: the tokenizer's own": "data.init_args.prompt_style",
    },
    handled="checkpoint_dir out_dir precision quantize devices lora_r lora_alpha lora_dropout lora_query lora_key "
    "lora_value lora_projection lora_mlp lora_head data data.class_path data.init_args.mask_prompt "
    "data.init_args.val_split_fraction data.init_args.prompt_style data.init_args.json_path train.save_interval "
    "train.log_interval train.global_batch_size train.micro_batch_size train.lr_warmup_steps train.epochs "
    "train.max_steps train.max_seq_length train.learning_rate train.weight_decay train.beta1 train.beta2 "
    "train.max_norm train.min_lr eval.interval optimizer optimizer.class_path optimizer.init_args.lr "
    "optimizer.init_args.weight_decay optimizer.init_args.betas seed galore longlora train eval log.project log.run "
    f"log.group log.teamspace log.metadata log.log_model log.save_logs log.checkpoint_name {TRACKING_KEYS}",
)


def convert(draft: Draft) -> None:
    """Convert a config of litgpt."""
    config = draft.config
    if not any(config.has(key) for key in ("lora_r", "lora_alpha", *PARTS)):
        reason = "is not set: litgpt's finetune_full trains every weight, and here only adapters are trained"
        draft.other_task("lora_r", reason)
    _carry_model(draft)
    _carry_adapter(draft)
    _carry_rows(draft)
    _carry_training(draft)
    carry_output(draft, "out_dir")
    carry_tracking(draft)
    apply_table(draft, TABLE)


def _carry_model(draft: Draft) -> None:
    config = draft.config
    folder = config.text("checkpoint_dir")
    if folder is None:
        draft.missing("checkpoint_dir", "the config names no base; accepted: a placeholder in model.path")
    else:
        parts = Path(folder).parts
        local = os.path.isfile(Path(folder) / "config.json")
        path = folder if local or len(parts) < 2 else "/".join(parts[-2:])
        note = "" if path == folder else "litgpt's checkpoints have a format of their own: the id on the hub"
        draft.carry("checkpoint_dir", "model.path", path, note)
    if config.has("precision"):
        carry_dtype(draft, "precision")
    quantize = config.text("quantize")
    if quantize is None or asks_for_nothing(quantize):
        draft.same("quantize", "asks for nothing")
    elif quantize.startswith("bnb.int8"):
        draft.put("quantization.bits", 8, "quantize")
        draft.carried("quantize", "quantization.bits", 8)
    elif quantize in ("bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq"):
        kind, _, double = quantize.removeprefix("bnb.").partition("-")
        draft.put("quantization.bits", 4, "quantize")
        draft.put("quantization.type", kind, "quantize")
        draft.put("quantization.double_quant", bool(double), "quantize")
        draft.carried("quantize", "quantization", quantize)
    else:
        draft.refuse("quantize", "a base is quantized by bitsandbytes; accepted: 4 bits")
        draft.put("quantization.bits", 4, "quantize")
    devices = _devices(draft)
    if devices > 1:
        draft.carry("devices", "distributed.processes", devices)
    else:
        draft.no_effect("devices", "distributed.processes: auto is one process per GPU")


def _carry_adapter(draft: Draft) -> None:
    config = draft.config
    for key, to, default in (
        ("lora_r", "adapter.rank", 8),
        ("lora_alpha", "adapter.alpha", 16.0),
        ("lora_dropout", "adapter.dropout", 0.05),
    ):
        value = config.number(key)
        if value is None:
            draft.assume(to, default)
        else:
            draft.carry(key, to, value if key == "lora_r" else float(value))
    family = family_of(config.text("checkpoint_dir"))
    wanted = {key: config.switch(key, default=PART_DEFAULTS.get(key, False)) for key in PARTS}
    modules = [family.attention[part] for key, part in PARTS.items() if wanted[key]]
    if family.attention["q"] == family.attention["v"] and len({wanted[key] for key in list(PARTS)[:3]}) > 1:
        reason = f"the base has one module for queries, keys and values; accepted: all of {family.attention['q']}"
        if key := next((key for key in list(PARTS)[:3] if config.has(key)), ""):
            draft.refuse(key, reason, always=True)
        else:
            draft.missing("lora_query", f"litgpt's default adapts queries and values, and {reason}")
    modules += family.mlp if config.switch("lora_mlp") else ()
    modules += ["lm_head"] if config.switch("lora_head") else []
    targets = list(dict.fromkeys(modules))
    if not targets:
        draft.missing("lora_query", "no part is adapted, and litgpt trains nothing; accepted: every linear layer")
    draft.put("adapter.target_modules", targets or "all-linear", "lora_query, lora_key, lora_value, ...")
    for key in (*PARTS, "lora_mlp", "lora_head"):
        draft.carried(key, "adapter.target_modules", targets)


def _carry_rows(draft: Draft) -> None:
    config = draft.config
    name = str(config.get("data.class_path") or config.get("data") or "Alpaca").rpartition(".")[2]
    path, kind, columns = DATASETS.get(name, ("", "", {}))
    source = Source({"path": config.text("data.init_args.json_path") or path or "data/train.jsonl"}, f"data: {name}")
    folder = Path(source.values["path"]) if name == "JSON" else Path("rows.json")
    if not folder.suffix:  # a folder with train.json and val.json
        source.values["path"] = f"{folder}/train.json"
    if kind == "messages":
        reason = "writes the first question and answer in its prompt style; accepted: every turn, in the chat template"
        draft.refuse("data.class_path" if config.has("data.class_path") else "data", reason)
    if kind:
        source.values["format"] = kind
        source.columns(**columns)
        draft.carried("data.class_path", "data.train", source.values["path"])
        if config.get("data.class_path") is None:
            draft.carried("data", "data.train", source.values["path"])
    else:
        draft.refuse("data.class_path", f"there is no dataset {name} here; accepted: data/train.jsonl")
    draft.carried("data.init_args.json_path", "data.train", source.values["path"])
    if name == "JSON" and config.text("data.init_args.json_path") is None:
        draft.missing("data.init_args.json_path", "names no file; accepted: data/train.jsonl")
    fraction = config.number("data.init_args.val_split_fraction")
    if not folder.suffix:
        held_out = Source({**source.values, "path": f"{folder}/val.json"}, source.comment)
        write_sources(draft, "data.eval", [held_out])
    write_sources(draft, "data.train", [source])
    if "data.eval" in draft.values:
        draft.refuse("data.init_args.val_split_fraction", "the folder has rows to evaluate; accepted: those")
    elif fraction is None:
        default = VAL_FRACTIONS.get(name, 0.05)
        draft.assume("data.eval", default or None)
    else:
        draft.carry("data.init_args.val_split_fraction", "data.eval", float(fraction) or None)
    if config.switch("data.init_args.mask_prompt"):
        draft.carry("data.init_args.mask_prompt", "data.loss_on", "assistant")
    elif config.has("data.init_args.mask_prompt"):
        draft.carry("data.init_args.mask_prompt", "data.loss_on", "all")
    else:
        draft.assume("data.loss_on", "all", "mask_prompt is false")
    style = (config.text("data.init_args.prompt_style") or "alpaca").lower().rpartition(".")[2]
    if style == "alpaca" and kind == "alpaca":
        key = "data.init_args.prompt_style"
        draft.put("data.chat_template", "alpaca", key if config.has(key) else "litgpt's default: prompt_style: alpaca")
        note = "an input follows the instruction, without a heading of its own"
        draft.carried(key, "data.chat_template", "alpaca", note)
    length = config.whole("train.max_seq_length")
    if length:
        draft.carry("train.max_seq_length", "data.max_length", length)
        draft.assume("data.overlong", "truncate", "the end of longer rows is cut")
    else:
        why = "no limit; here a longer row is an error"
        draft.put("data.max_length", 8192, f"litgpt's default: {why}")
        draft.carried("train.max_seq_length", "data.max_length", 8192, why)
    carry_no_packing(draft, "packing")


def _carry_training(draft: Draft) -> None:
    config = draft.config
    steps = positive(config.number("train.max_steps"))
    if steps:
        written = config.get("train.epochs") is not None
        note = "" if written else "litgpt ends after 5 epochs, its default, if that is earlier"
        draft.carry("train.max_steps", "training.max_steps", int(steps), note)
        if written:
            draft.refuse("train.epochs", "the shorter of epochs and max_steps ends the run there; accepted: max_steps")
    else:
        draft.same("train.max_steps", "asks for nothing")
        epochs = config.number("train.epochs")
        if epochs is None:
            draft.assume("training.epochs", 5.0)
        else:
            draft.carry("train.epochs", "training.epochs", float(epochs))
    _carry_batch(draft)
    _carry_optimizer(draft)
    draft.no_effect("train.min_lr", "litgpt reads it in pretraining only: the cosine of fine-tuning ends at 0")
    warmup = config.whole("train.lr_warmup_steps")
    if warmup is None and not config.has("train.lr_warmup_steps"):
        draft.assume("training.warmup", 0 if config.get("train.lr_warmup_fraction") else 100)
    else:
        draft.carry("train.lr_warmup_steps", "training.warmup", warmup or 0)
    carry_clipping(draft, "train.max_norm", default=None)
    seed = config.whole("seed")
    if seed is None:
        draft.assume("training.seed", 1337)
    else:
        draft.carry("seed", "training.seed", seed)
    for key, to in (
        ("train.save_interval", "training.save_every"),
        ("eval.interval", "training.eval_every"),
        ("train.log_interval", "training.log_every"),
    ):
        if every := positive(config.number(key)):
            draft.carry(key, to, int(every))


def _devices(draft: Draft) -> int:
    """Return the number of devices of a machine; 1 if litgpt finds them out."""
    devices = as_number(draft.config.get("devices"))
    return int(devices) if devices is not None and devices > 0 else 1


def _carry_batch(draft: Draft) -> None:
    """Carry rows per step over all devices; what does not divide is left out there, so it is left out here."""
    config = draft.config
    total = config.count("train.global_batch_size", 16)
    micro = config.count("train.micro_batch_size", 1)
    count = _devices(draft) * config.count("num_nodes", 1)
    rows = max(1, total // count // micro) * micro * count
    note = (
        "" if rows == total else f"{total} is no multiple of {micro} rows on {count} device(s), and litgpt takes {rows}"
    )
    if config.has("train.micro_batch_size"):
        draft.carry("train.micro_batch_size", "training.batch_size", micro)
    else:
        draft.assume("training.batch_size", micro)
    if config.has("train.global_batch_size"):
        draft.carry("train.global_batch_size", "training.rows_per_step", rows, note)
    else:
        draft.assume("training.rows_per_step", rows)


def _carry_optimizer(draft: Draft) -> None:
    config = draft.config
    name = "optimizer" if isinstance(config.get("optimizer"), str) else "optimizer.class_path"
    carry_optimizer(draft, name, default="adamw")
    old = config.has("train.learning_rate")  # before litgpt had the section `optimizer`
    if not old:
        carry_torch_decay(draft, "optimizer.init_args.weight_decay", config.text(name) or "AdamW")
    elif config.get("train.weight_decay") is None:
        draft.assume("training.weight_decay", 0.02)
    else:
        draft.carry("train.weight_decay", "training.weight_decay", config.number("train.weight_decay"))
    for keys, to, default in (
        (("optimizer.init_args.lr", "train.learning_rate"), "training.learning_rate", 3e-4 if old else 1e-3),
        (("train.beta1",), "training.adam_beta1", 0.9),
        (("train.beta2",), "training.adam_beta2", 0.95 if old else 0.999),
    ):
        key = next((key for key in keys if config.get(key) is not None), "")
        if key:
            draft.carry(key, to, float(config.number(key) or 0))
        elif not (to.startswith("training.adam") and config.get("optimizer.init_args.betas")):
            draft.assume(to, default)
    if config.get("optimizer.init_args.betas"):
        carry_betas(draft, "optimizer.init_args.betas")
