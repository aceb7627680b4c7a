"""TRL and unsloth: SFTConfig, ModelConfig, ScriptArguments, PEFT's LoraConfig, and what their keys become. No torch."""

import os
from pathlib import Path
from typing import Any

from lora_cli.convert.adapters import carry_lora_variant
from lora_cli.convert.batches import Batches, carry_batches, carry_no_packing
from lora_cli.convert.draft import Assumed, Draft
from lora_cli.convert.huggingface import (
    TRAINING_ARGUMENTS,
    TrainerDefaults,
    as_items,
    carry_revision,
    carry_training,
    section,
    text,
    texts,
)
from lora_cli.convert.script_calls import SCRIPT_KEYS, carry_collator, carry_script, carry_task
from lora_cli.convert.tables import (
    CACHE,
    CODE,
    EVALUATION,
    GENERATION,
    HARDWARE,
    LOGGING,
    OWN_TOKENIZER,
    PADDING,
    UPLOAD,
    KeyTable,
    apply_table,
    join,
)
from lora_cli.convert.templates import JINJA_FILES, OWN, carry_template
from lora_cli.convert.tracking import KEYS as TRACKING_KEYS
from lora_cli.convert.trl_data import DATA_KEYS, carry_rows
from lora_cli.convert.values import END_OF_TURN, carry_dtype, carry_targets, peft_targets

MODEL_KEYS = ("model_name_or_path", "model_name", "pretrained_model_name_or_path", "model_id")
# Arguments of from_pretrained that change nothing of what is learnt.
LOADING = (
    "attn_implementation",
    "use_cache",
    "device_map",
    "low_cpu_mem_usage",
    "use_safetensors",
    "cache_dir",
    "token",
)
UNSLOTH_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
UNSLOTH_CONFIGS = ("UnslothTrainingArguments", "TrainingArguments")
# unsloth replaces TRL's SFTConfig by one with these.
UNSLOTH_SFT_CONFIG = TrainerDefaults(
    batch_size=4, accumulation=2, optimizer="adamw-8bit", warmup=0.1, weight_decay=0.01, seed=3407
)

_OWN = KeyTable(
    carried={
        "lora_modules_to_save": ("adapter.modules_to_save", texts),
        "modules_to_save": ("adapter.modules_to_save", texts),
        "lora_bias": ("adapter.bias", text),
        "bias": ("adapter.bias", text),
        "layers_to_transform": ("adapter.layers", as_items),
        "rank_pattern": ("adapter.rank_pattern", section),
        "alpha_pattern": ("adapter.alpha_pattern", section),
        "exclude_modules": ("adapter.exclude_modules", texts),
        "chat_template_kwargs": ("data.template_variables", section),
    },
    no_effect={
        HARDWARE: "attn_implementation use_flash_attn use_flash_attention_2 device_map use_gradient_checkpointing "
        "use_reentrant low_cpu_mem_usage max_memory fast_inference gpu_memory_utilization float8_kv_cache "
        "enforce_eager unsloth_tiled_mlp offload_embedding use_exact_model_name padding_free "
        "loss_chunk_size use_unsloth embeddings_device rope_scaling_type tensor_parallel_size "
        "runtime_config megatron_config megatron_core",
        CACHE: "dataset_num_proc dataset_batch_size dataset_streaming num_proc streaming num_of_sequences "
        "chars_per_token trust_remote_code_datasets shuffle_dataset",
        CODE: "env gradient_checkpointing_use_reentrant ignore_bias_buffers train test_mode save_on_train_end",
        PADDING: "pad_token pad_to_multiple_of padding_side ",
        EVALUATION: "eval_packing do_bench_eval benchmarks compute_metrics preprocess_logits_for_metrics "
        "eval_on_train log_completions num_completions_to_print",
        UPLOAD: "hub_model_revision overwrite_hub_revision push_to_hub_revision token hf_token",
        OWN_TOKENIZER: "processing_class tokenizer fix_tokenizer use_fast legacy",
        LOGGING: "sanity_check log_with disable_log_stats project_kwargs",
        GENERATION: "inference_mode use_cache_in_generation max_new_tokens temperature top_p",
        "what peft reads from the model": "auto_mapping base_model_name_or_path peft_type revision "
        "fan_in_fan_out megatron peft_version",
        "the script's own objects": "model args peft_config train_dataset quantization_config ",
        "training.seed is the seed of the adapter, too": "random_state",
        "it is 6.0 in bitsandbytes": "llm_int8_threshold",
        "bitsandbytes keeps what LoRA does not adapt as it is": "llm_int8_skip_modules llm_int8_has_fp16_weight "
        "llm_int8_enable_fp32_cpu_offload",
    },
    same={
        "the end of an answer carries loss, and is that of the chat template": "append_concat_token add_eos_token "
        "dataset_kwargs.append_concat_token",
        "special tokens are those of the chat template": "add_special_tokens dataset_kwargs.add_special_tokens",
        "training.seed is the seed": "set_seed",
    },
    not_offered={
        "another loss; accepted: cross-entropy": "loss_type=nll loss_function compute_loss_func use_dft dft_alpha "
        "mtp_loss_weight num_mtp_layers mtp_num_layers mtp_enabled",
        "the router's loss is not added; accepted: so": "output_router_logits router_aux_loss_coef",
        "one learning rate for all; accepted: learning_rate": "embedding_learning_rate",
        "the end of a long row is cut; accepted: so": "truncation_mode=keep_start",
        "the base's own weights are trained on top of; accepted: without it": "train_from_scratch",
        "positions of the base are used; accepted: unchanged": "rope_scaling",
        "8-bit floats; accepted: 16 bits": "load_in_fp8 ",
        "other parameters than linear layers; accepted: without them": "target_parameters layer_replication "
        "lora_target_parameters",
        "each token has one adapter; accepted: so": "alora_invocation_tokens arrow_config corda_config eva_config "
        "loftq_config use_qalora qalora_group_size use_bdlora kasa_config monteclora_config "
        "lora_ga_config velora_config",
        "tokens are listed in adapter.trainable_tokens, not their ids; accepted: none": "trainable_token_indices",
        "tied weights are trained as one; accepted: so": "ensure_weight_tying",
        "layers are listed by their index; accepted: all": "layers_pattern",
        "the tokenizer of the base is used; accepted: that one": "tokenizer_name_or_path tokenizer_name",
        "rows are read as they are; accepted: so": "dataset_kwargs.skip_prepare_dataset",
        "the text of a row is made by code; accepted: the row's format": "formatting_func",
        "is called in training, and may change it; accepted: without it": "callbacks",
        "the model is built with more arguments; accepted: without them": "config_overrides",
        "the optimizer is the one of optim; accepted: that": "optimizers optimizer_cls_and_kwargs",
        "the system message is the row's; accepted: the row's": "system_prompt default_system_message",
        "teacher and student are another task; accepted: without it": "teacher_model_name_or_path",
    },
    handled=" ".join(MODEL_KEYS) + " model_init_kwargs dataset_kwargs "
    "model_revision r lora_r lora_alpha lora_dropout target_modules lora_target_modules use_rslora use_dora "
    "task_type lora_task_type data_collator "
    "init_lora_weights use_peft use_peft_lora full_finetuning load_in_4bit load_in_8bit use_4bit_quantization "
    "use_8bit_quantization "
    "bnb_4bit_quant_type use_bnb_nested_quant use_nested_quant bnb_4bit_use_double_quant bnb_4bit_quant_storage "
    "bnb_4bit_quant_storage_dtype bnb_4bit_compute_dtype torch_dtype dtype trust_remote_code max_length max_seq_length "
    "model_max_length packing packing_strategy assistant_only_loss completion_only_loss train_on_responses_only "
    f"eos_token chat_template chat_template_path chat_template_format adapter_path {DATA_KEYS} {SCRIPT_KEYS} "
    f"{TRACKING_KEYS}",
)
TABLE = join(_OWN, TRAINING_ARGUMENTS)


def convert(draft: Draft) -> None:
    """Convert a config, a command line or a script of TRL or unsloth."""
    config, unsloth = draft.config, draft.tool == "unsloth"
    carry_script(draft)
    carry_task(draft)
    for key in MODEL_KEYS:
        if path := config.text(key):
            draft.carry(key, "model.path", path)
            break
    if "model.path" not in draft.values and not any(config.is_written(key) for key in MODEL_KEYS):
        draft.missing("model_name_or_path", "the config names no base; accepted: a placeholder in model.path")
    carry_revision(draft, "model_revision")
    for key in ("torch_dtype", "dtype", "model_init_kwargs.torch_dtype", "model_init_kwargs.dtype"):
        if config.has(key):
            carry_dtype(draft, key)
    _carry_init_kwargs(draft)
    if config.has("trust_remote_code") and config.get("trust_remote_code"):
        draft.no_effect(
            "trust_remote_code", "code of the model's repository: write model.trust_remote_code if it needs it"
        )
    _carry_adapter(draft, unsloth=unsloth)
    _carry_quantization(draft, default=unsloth and _is_loaded_by_unsloth(draft))
    defaults = _defaults(draft)
    carry_training(draft, defaults)
    _carry_lengths(draft, defaults, unsloth=unsloth)
    carry_rows(draft)
    _carry_template_path(draft)
    for key in ("chat_template", "chat_template_format"):
        carry_template(draft, key, model=draft.values.get("model.path"))
    eos = config.get("eos_token")
    if eos in END_OF_TURN:
        draft.no_effect("eos_token", "the chat template ends an answer with it, and it carries loss")
    draft.refuse("eos_token", "the tokenizer's own ends texts; accepted: that one")
    apply_table(draft, TABLE)


def _carry_template_path(draft: Draft) -> None:
    """Carry the Jinja file whose template is trained with; a tokenizer has one of its own."""
    key = "chat_template_path"
    if not (path := draft.config.text(key)):
        return
    inside = Path(path) / "chat_template.jinja"
    if path.endswith(JINJA_FILES) or os.path.isfile(inside):
        draft.carry(key, "data.chat_template", str(inside) if os.path.isfile(inside) else path)
    elif path == draft.values.get("model.path"):
        draft.same(key, OWN)
    reason = f"the template of the tokenizer {path}: write its chat_template.jinja as data.chat_template"
    draft.refuse(key, f"{reason}; accepted: {OWN}")


def _carry_init_kwargs(draft: Draft) -> None:
    """Add the lines of arguments that SFTTrainer loads the base with; its dtype is carried."""
    if not isinstance(options := draft.config.get("model_init_kwargs"), dict):
        return
    for option in options:
        key = f"model_init_kwargs.{option}"
        if option in LOADING:
            draft.no_effect(key, HARDWARE)
        draft.refuse(key, "the model is loaded with more arguments; accepted: without it", always=True)


def _defaults(draft: Draft) -> TrainerDefaults:
    """Return SFTConfig's defaults, or those of transformers where a script uses TrainingArguments."""
    plain = any(name in draft.config.values for name in UNSLOTH_CONFIGS) and "SFTConfig" not in draft.config.values
    if draft.tool == "unsloth" and "SFTConfig" in draft.config.values:
        return UNSLOTH_SFT_CONFIG
    return TrainerDefaults() if plain else TrainerDefaults(learning_rate=2e-5)


def _is_loaded_by_unsloth(draft: Draft) -> bool:
    """Return whether FastLanguageModel loads the base, which it does in 4 bits; its old command line does not."""
    if draft.config.kind == "script":
        return any(draft.config.is_written(key) for key in MODEL_KEYS)
    return draft.config.has("model_name")


def _carry_adapter(draft: Draft, *, unsloth: bool) -> None:
    config = draft.config
    if config.kind == "script" and not unsloth and "LoraConfig" not in config.values:
        draft.other_task("LoraConfig", "the script has none, so every weight is trained, and here only adapters")
    elif config.kind != "script":
        switch = next((key for key in ("use_peft", "use_peft_lora") if config.has(key)), "use_peft")
        if not config.switch(switch):
            reason = (
                "is not set, so every weight is trained, and here only adapters: for LoRA, add use_peft: true first"
            )
            draft.other_task(switch, reason)
        draft.same(switch, "an adapter is always trained")
    if config.switch("full_finetuning"):
        draft.other_task("full_finetuning", "every weight is trained, and here only adapters")
    draft.same("full_finetuning", "only adapters are trained")
    carry_lora_variant(draft, rslora="use_rslora", dora="use_dora", initialization="init_lora_weights")
    plain = config.kind == "script" and not unsloth  # PEFT's LoraConfig, not TRL's ModelConfig
    rank, alpha, dropout = (8, 8.0, 0.0) if plain else (16, 16.0, 0.0) if unsloth else (16, 32.0, 0.05)
    whose = "PEFT's default" if plain else ""
    for keys, to, default in (
        (("r", "lora_r"), "adapter.rank", rank),
        (("lora_alpha",), "adapter.alpha", alpha),
        (("lora_dropout",), "adapter.dropout", dropout),
    ):
        key = next((key for key in keys if config.has(key)), "")
        value = config.number(key) if key else None
        if value is None:
            draft.assume(to, default, whose)
        else:
            draft.carry(key, to, value if to.endswith("rank") else float(value))
    key = "lora_target_modules" if config.has("lora_target_modules") else "target_modules"
    targets: Any = UNSLOTH_TARGETS if unsloth else peft_targets(draft.values.get("model.path"))
    carry_targets(draft, key, default=targets, why="" if unsloth else "PEFT's, for most architectures")


def _carry_quantization(draft: Draft, *, default: bool) -> None:
    config = draft.config
    four = next((key for key in ("load_in_4bit", "use_4bit_quantization") if config.has(key)), "")
    eight = next((key for key in ("load_in_8bit", "use_8bit_quantization") if config.has(key)), "")
    bits = 0
    if eight and config.switch(eight):
        bits = 8
    elif four:
        bits = 4 * config.switch(four)
    elif default and not eight:
        bits = 4
        draft.assumed.append(Assumed("quantization.bits", 4, "unsloth's default: load_in_4bit"))
    names = ("bnb_4bit_quant_type", "bnb_4bit_compute_dtype")
    nested = ("use_bnb_nested_quant", "use_nested_quant", "bnb_4bit_use_double_quant")
    storage = ("bnb_4bit_quant_storage", "bnb_4bit_quant_storage_dtype")
    if bits:
        draft.put("quantization.bits", bits, four if bits == 4 and four else eight or "unsloth's default: load_in_4bit")
        draft.carried(four if bits == 4 else eight, "quantization.bits", bits)
        if four and bits == 8 and config.switch(four):
            draft.refuse(four, "a base has 4 bits or 8, and both are set; accepted: 8")
    for key in (four, eight):
        if key:
            draft.same(key, "no quantization is the default")
    if bits != 4:
        for key in (*names, *nested, *storage):
            draft.no_effect(key, "without 4-bit quantization")
        return
    if kind := config.text("bnb_4bit_quant_type"):
        draft.carry("bnb_4bit_quant_type", "quantization.type", kind)
    elif draft.tool != "unsloth":
        # TRL's ModelConfig has nf4, bitsandbytes' own config fp4.
        draft.assume("quantization.type", "fp4" if config.kind == "script" else "nf4", "bitsandbytes' own")
    key = next((key for key in nested if config.has(key)), "")
    if key:
        draft.carry(key, "quantization.double_quant", config.switch(key))
    elif draft.tool != "unsloth":
        draft.assume("quantization.double_quant", False)
    for key in storage:
        if value := config.text(key):
            draft.carry(key, "quantization.storage_dtype", value.removeprefix("torch."))
    draft.no_effect("bnb_4bit_compute_dtype", "quantization.compute_dtype: auto is the dtype of the base")


def _carry_lengths(draft: Draft, defaults: TrainerDefaults, *, unsloth: bool) -> None:
    """Carry the length of rows, what is done with longer ones, packing and batches."""
    config = draft.config
    key = next((key for key in ("max_length", "max_seq_length", "model_max_length") if config.has(key)), "")
    length = config.whole(key) if key else None
    if length:
        draft.carry(key, "data.max_length", length)
        draft.assume("data.overlong", "truncate", "the end of longer rows is cut")
    elif key and config.get(key) is None:
        draft.put("data.max_length", 8192, f"{key}: null is no limit; here a longer row is an error")
        draft.carried(key, "data.max_length", 8192, "null is no limit; here a longer row is an error")
        length = 8192
    else:
        length = 2048 if unsloth else 1024
        draft.assume("data.max_length", length)
        draft.assume("data.overlong", "truncate", "the end of longer rows is cut")
    for other in ("max_length", "max_seq_length", "model_max_length"):
        draft.same(other, f"{key} is used")
    strategy = (config.text("packing_strategy") or "bfd").lower()
    packing = config.switch("packing")
    if packing and draft.values.get("quantization.bits") == 8:
        packing = False
        draft.refuse(
            "packing", "8-bit weights mix the rows of a batch, so they are not packed; accepted: packing: false"
        )
    if packing:
        leaks = {
            "wrapped": "without attention between packed rows, and rows are not cut at the pack's end, unlike there"
        }
        draft.carry("packing", "data.packing", True, leaks.get(strategy, ""))
        draft.carried("packing_strategy", "data.packing", True, "packs hold whole rows, best fit first")
        if strategy == "bfd_split":
            draft.refuse("packing_strategy", "long conversations are not split; accepted: cut at their end")
    else:
        carry_no_packing(draft, "packing")
        draft.no_effect("packing_strategy", "without packing")
    micro = config.whole("per_device_train_batch_size")
    accumulation = config.whole("gradient_accumulation_steps")
    batches = Batches(
        "per_device_train_batch_size",
        micro or defaults.batch_size,
        "gradient_accumulation_steps",
        accumulation or defaults.accumulation,
        length,
    )
    carry_batches(draft, batches, packing=packing)
    _carry_loss(draft)


def _carry_loss(draft: Draft) -> None:
    config = draft.config
    answers = ("assistant_only_loss", "completion_only_loss", "train_on_responses_only")
    on = [key for key in answers if config.has(key) and config.get(key) not in (False, None)]
    if carry_collator(draft):
        return
    for key in on:
        draft.carried(key, "data.loss_on", "assistant")
    if not on:
        key = next((key for key in answers if config.has(key)), "")
        why = "for conversations and texts; with rows of prompt and completion, remove this line"
        if key and config.get("completion_only_loss", None) is False:
            draft.put("data.loss_on", "all", key)
        else:
            draft.assume("data.loss_on", "all", why)
        for each in answers:
            draft.carried(each, "data.loss_on", "all")
