"""axolotl: its configs, and what their keys become. No torch."""

from lora_cli.convert.adapters import carry_lora_variant
from lora_cli.convert.axolotl_data import Kind, carry_datasets
from lora_cli.convert.axolotl_keys import TABLE
from lora_cli.convert.batches import Batches, carry_batches, carry_no_packing
from lora_cli.convert.config import as_list
from lora_cli.convert.draft import Draft
from lora_cli.convert.huggingface import (
    carry_checkpoints,
    carry_clipping,
    carry_eval_fraction,
    carry_output,
    carry_revision,
    carry_steps,
    texts,
)
from lora_cli.convert.schedules import carry_schedule, carry_warmup, rounded
from lora_cli.convert.tables import HARDWARE, PADDING, apply_table
from lora_cli.convert.tracking import carry_tracking
from lora_cli.convert.values import (
    carry_optimizer,
    carry_precision,
    carry_targets,
    family_of,
    peft_targets,
    positive,
)

KNOWN_PLUGINS = ("cut_cross_entropy", "liger", "spectrum", "llm_compressor", "kernels")


def convert(draft: Draft) -> None:
    """Convert a config of axolotl."""
    config = draft.config
    if config.text("rl"):
        reason = f"{config.text('rl')} is another task: `lora train` does supervised fine-tuning on good answers"
        draft.other_task("rl", reason)
    _carry_model(draft)
    _carry_adapter(draft)
    _carry_quantization(draft)
    _carry_rows(draft)
    _carry_training(draft)
    apply_table(draft, TABLE)


def _carry_model(draft: Draft) -> None:
    config = draft.config
    if path := config.text("base_model"):
        draft.carry("base_model", "model.path", path)
    else:
        draft.missing("base_model", "the config names no base; accepted: a placeholder in model.path")
    carry_revision(draft, "revision_of_model" if config.has("revision_of_model") else "model_revision")
    carry_precision(draft)
    if config.switch("trust_remote_code"):
        draft.no_effect(
            "trust_remote_code", "code of the model's repository: write model.trust_remote_code if it needs it"
        )
    if config.text("tokenizer_config"):
        if config.text("tokenizer_config") == config.text("base_model"):
            draft.same("tokenizer_config", "the tokenizer of the base is used")
        draft.refuse("tokenizer_config", "the tokenizer of the base is used; accepted: that one")
    _carry_special_tokens(draft)
    own = [name for name in texts(config, "plugins") if not any(part in name for part in KNOWN_PLUGINS)]
    if own:
        draft.refuse("plugins", f"{', '.join(own)}: runs code of its own; accepted: without it")
    elif config.get("plugins"):
        draft.no_effect("plugins", HARDWARE)


def _carry_special_tokens(draft: Draft) -> None:
    config = draft.config
    own = family_of(config.text("base_model")).tokens
    draft.no_effect("special_tokens.pad_token", PADDING)
    for name in ("bos_token", "eos_token", "unk_token"):
        value = config.text(f"special_tokens.{name}")
        if value is not None and value in own.values():
            draft.same(f"special_tokens.{name}", "the tokenizer's own")
        draft.refuse(f"special_tokens.{name}", "the tokenizer's own is used; accept this if it is the same")
    tokens = [*texts(config, "tokens"), *texts(config, "special_tokens.additional_special_tokens")]
    if tokens:
        draft.put("model.new_tokens", tokens, "tokens")
        for key in ("tokens", "special_tokens.additional_special_tokens"):
            draft.carried(key, "model.new_tokens", tokens)
        if not config.get("lora_modules_to_save"):
            draft.put("adapter.trainable_tokens", tokens, "tokens: their embeddings are trained")


def _carry_adapter(draft: Draft) -> None:
    config = draft.config
    adapter = config.text("adapter")
    if adapter is None:
        draft.other_task("adapter", "is not set: every weight is trained, and here only adapters")
    elif adapter not in ("lora", "qlora"):
        draft.refuse("adapter", f"{adapter} is not offered; accepted: lora")
    else:
        draft.same("adapter", "lora is the default" if adapter == "lora" else "lora on a base of 4 bits")
    carry_lora_variant(
        draft,
        rslora="peft_use_rslora",
        dora="peft_use_dora",
        plus="loraplus_lr_ratio",
        initialization="peft_init_lora_weights",
    )
    if config.get("peft.loftq_config"):
        draft.carry("peft.loftq_config", "adapter.method", "loftq")
        draft.put("quantization.bits", 4, "peft.loftq_config")
    for key, to, default in (("lora_r", "adapter.rank", 8), ("lora_alpha", "adapter.alpha", 8.0)):
        value = config.whole(key) if to == "adapter.rank" else config.number(key)
        if value is None:
            draft.assume(to, default, "PEFT's default")
        else:
            draft.carry(key, to, value)
    if (dropout := config.number("lora_dropout")) is None:
        draft.assume("adapter.dropout", 0.0)
    else:
        draft.carry("lora_dropout", "adapter.dropout", float(dropout))
    if config.switch("lora_target_linear"):
        draft.carry("lora_target_linear", "adapter.target_modules", "all-linear")
        extra = [name for name in texts(config, "lora_target_modules") if name in ("lm_head", "embed_tokens")]
        if extra:
            draft.refuse("lora_target_modules", f"all-linear leaves out {', '.join(extra)}; accepted: without it")
        draft.same("lora_target_modules", "all-linear has these, too")
        return
    draft.same("lora_target_linear", "asks for nothing")
    targets = peft_targets(config.text("base_model"))
    carry_targets(draft, "lora_target_modules", default=targets, why="PEFT's, for most architectures")


def _carry_quantization(draft: Draft) -> None:
    config = draft.config
    four, eight = config.switch("load_in_4bit"), config.switch("load_in_8bit")
    dtype = (config.text("peft.weight_dtype") or "").lower()
    if four or (not eight and config.text("adapter") == "qlora") or dtype in ("nf4", "int4"):
        draft.put("quantization.bits", 4, "load_in_4bit")
        draft.carried("load_in_4bit", "quantization.bits", 4)
        draft.refuse("load_in_8bit", "a base has 4 bits or 8, and both are set; accepted: 4")
    elif eight or dtype == "int8":
        draft.put("quantization.bits", 8, "load_in_8bit")
        draft.carried("load_in_8bit", "quantization.bits", 8)
    for key in ("load_in_4bit", "load_in_8bit"):
        draft.same(key, "no quantization is the default")
    if dtype:
        draft.carried("peft.weight_dtype", "quantization.bits", draft.values.get("quantization.bits"))
    if config.text("peft.backend") == "torchao":
        draft.refuse("peft.backend", "bitsandbytes quantizes the base; accepted: that")
    draft.same("peft.backend", "bitsandbytes quantizes the base")
    draft.refuse("peft.group_size", "bitsandbytes has blocks of 64 weights; accepted: so")


def _carry_rows(draft: Draft) -> None:
    config = draft.config
    kinds = carry_datasets(draft)
    packing = config.switch("sample_packing") or bool(config.get("pretraining_dataset"))
    if packing and draft.values.get("quantization.bits") == 8:
        packing = False
        reason = "8-bit weights mix the rows of a batch, so rows are not packed; accepted: single rows"
        draft.refuse("sample_packing", reason)
    length = config.whole("sequence_len")
    if length is None:
        draft.assume("data.max_length", 512)
    else:
        draft.carry("sequence_len", "data.max_length", length)
    _carry_overlong(draft, kinds)
    if packing:
        attention = any(config.get(key) for key in ("flash_attention", "flex_attention", "attn_implementation"))
        leaks = "" if attention else "without attention between packed rows, unlike there without flash attention"
        if config.switch("sample_packing"):
            draft.carry("sample_packing", "data.packing", True, leaks)
        else:
            draft.put("data.packing", True, "pretraining_dataset")
            draft.same("sample_packing", "pretraining_dataset packs")
    else:
        carry_no_packing(draft, "sample_packing")
    if config.switch("pretrain_multipack_attn", default=True):
        draft.same("pretrain_multipack_attn", "packed rows do not attend to each other")
    draft.refuse("pretrain_multipack_attn", "packed rows do not attend to each other; accepted: so", always=True)
    _carry_batches(draft, packing=packing, length=length or 512)
    if config.get("test_datasets"):
        draft.same("val_set_size", "test_datasets are used")
    else:
        carry_eval_fraction(draft, "val_set_size")
    if config.switch("dataset_exact_deduplication"):
        draft.carry("dataset_exact_deduplication", "data.dedup", "exact")
    else:
        draft.same("dataset_exact_deduplication", "asks for nothing")
    if config.has("shuffle_merged_datasets") and config.switch("shuffle_merged_datasets", default=True):
        draft.same("shuffle_merged_datasets", "rows are shuffled over all sources")
    draft.refuse("shuffle_merged_datasets", "rows are shuffled over all sources; accepted: shuffled", always=True)


def _carry_overlong(draft: Draft, kinds: list[Kind]) -> None:
    """Carry what is done with rows that are too long: documents are cut into pieces, whatever the strategy."""
    config = draft.config
    key, to = "excess_length_strategy", "data.overlong"
    documents = [kind for kind in kinds if kind.is_document]
    if documents and documents == kinds:
        overlap = ", which share 256 tokens there and none here" if documents[0].name == "pretrain" else ""
        draft.assume(to, "split", f"type {documents[0].name}: long documents are cut into pieces{overlap}")
        draft.no_effect(key, "documents are split")
        return
    if documents:
        reason = "long documents are split there, and beside other sources they are not here; accepted: as other rows"
        draft.missing(f"datasets: long rows of type {documents[0].name}", reason)
    strategy = config.text(key) or "drop"
    ours = {"drop": "drop", "truncate": "truncate", "raise": "error"}.get(strategy)
    if ours is None:
        draft.refuse(key, "rows are dropped, truncated or an error; accepted: dropped")
        draft.put(to, "drop", key)
    elif config.get(key) is not None:
        draft.carry(key, to, ours)
    else:
        draft.assume(to, "drop", "longer rows are dropped")


def _carry_batches(draft: Draft, *, packing: bool, length: int) -> None:
    config = draft.config
    micro = config.count("micro_batch_size", 1)
    total = config.whole("batch_size")
    accumulation = config.whole("gradient_accumulation_steps")
    batches = Batches("micro_batch_size", micro, "gradient_accumulation_steps", accumulation or 1, length)
    if total and not accumulation:
        batches = batches._replace(accumulation_key="batch_size", accumulation=max(1, total // micro))
    carry_batches(draft, batches, packing=packing)
    draft.same("batch_size", "micro_batch_size and gradient_accumulation_steps have it")


def _carry_training(draft: Draft) -> None:
    config = draft.config
    carry_output(draft, "output_dir")
    shorter = "up to version 0.9, axolotl ends after num_epochs, if that is earlier"
    carry_steps(draft, epochs="num_epochs", max_steps="max_steps", default=1.0, note=shorter)
    rate = config.number("learning_rate")
    if rate is None:
        draft.missing("learning_rate", "is not set, and axolotl has no default; accepted: 2e-4")
    else:
        draft.carry("learning_rate", "training.learning_rate", float(rate))
    carry_optimizer(draft, "optimizer", default="adamw")
    carry_schedule(draft, "lr_scheduler", default="cosine")
    ratio = config.number("cosine_min_lr_ratio")
    if ratio and draft.values.get("training.schedule", "cosine") == "cosine":
        minimum = rounded(float(rate or 2e-4) * float(ratio))
        draft.carry("cosine_min_lr_ratio", "training.min_learning_rate", minimum)
    draft.no_effect("cosine_min_lr_ratio", "without a cosine schedule")
    name = (config.text("lr_scheduler") or "cosine").lower()
    carry_warmup(
        draft, steps="warmup_steps", ratio="warmup_ratio", schedule=name, default=0.03, why="at most 100 steps of it"
    )
    carry_clipping(draft, "max_grad_norm", null_is_off=False)
    for key in ("neftune_noise_alpha", "noisy_embedding_alpha"):
        if (alpha := positive(config.number(key))) is not None:
            draft.carry(key, "training.neftune_alpha", float(alpha))
    _carry_moments(draft)
    needed = carry_checkpoints(draft, best=_carry_best(draft))
    for key, to in (("evals_per_epoch", "training.eval_every"), ("saves_per_epoch", "training.save_every")):
        if config.get(key) is not None and not positive(config.get(key)):
            draft.carry(key, to, None)
        elif needed and "eval" in key:
            reason = f"evaluations decide which step is kept, and {to} counts steps: write it; accepted: every 100"
            draft.refuse(key, reason)
        else:
            draft.no_effect(key, f"{to} counts steps; its default is 100")
    carry_tracking(draft)
    if as_list(config.get("activation_offloading")):
        draft.no_effect("activation_offloading", HARDWARE)


def _carry_best(draft: Draft) -> bool:
    """Carry whether the best step is kept: only with rows to evaluate, at each step that is saved."""
    config, key = draft.config, "load_best_model_at_end"
    if not config.switch(key) and not positive(config.number("early_stopping_patience")):
        draft.same(key, "asks for nothing")
        return False
    rows = positive(config.number("val_set_size")) or config.get("test_datasets")
    saved, evaluated = (_share_or_steps(draft, event) for event in ("save", "eval"))
    if not rows or not saved or not evaluated or saved % evaluated:
        draft.no_effect(key, "axolotl keeps the last step, unless it evaluates rows at each step that it saves")
        return False
    if config.switch(key):
        note = "there only of the steps that are saved" if saved != evaluated else ""
        draft.carry(key, "training.keep", "best", note)
    else:
        draft.assume("training.keep", "best", "early_stopping_patience keeps the best step")
        draft.no_effect(key, "early_stopping_patience keeps the best step")
    return True


def _share_or_steps(draft: Draft, event: str) -> float | None:
    """Return the steps between saves or evaluations, or their share of the run, which axolotl makes of an epoch's."""
    per_epoch = positive(draft.config.number(f"{event}s_per_epoch"))
    if per_epoch is None:
        return positive(draft.config.number(f"{event}_steps"))
    share = 1.0 / (per_epoch * (draft.config.number("num_epochs") or 1))
    return share if share < 1 else None


def _carry_moments(draft: Draft) -> None:
    """axolotl passes the betas of AdamW on; other optimizers ignore them there, and refuse them here."""
    if draft.values.get("training.optimizer", "adamw").removeprefix("paged-").partition("-")[0] in (
        "lion",
        "adafactor",
    ):
        for key in ("adam_beta1", "adam_beta2"):
            draft.no_effect(key, "the optimizer has betas of its own")
