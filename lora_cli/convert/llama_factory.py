"""LLaMA-Factory: its arguments (model, data, fine-tuning, training), and what they become. No torch."""

from lora_cli.convert.adapters import carry_lora_variant
from lora_cli.convert.batches import Batches, carry_batches, carry_no_packing
from lora_cli.convert.draft import Draft
from lora_cli.convert.huggingface import (
    TRAINING_ARGUMENTS,
    TrainerDefaults,
    carry_eval_fraction,
    carry_revision,
    carry_training,
    real,
    text,
    texts,
)
from lora_cli.convert.llama_factory_data import carry_datasets
from lora_cli.convert.tables import (
    CACHE,
    EVALUATION,
    GENERATION,
    HARDWARE,
    LOGGING,
    OTHER_TASKS,
    OWN_TOKENIZER,
    PRECISION,
    UPLOAD,
    KeyTable,
    apply_table,
    join,
)
from lora_cli.convert.templates import carry_template
from lora_cli.convert.tracking import KEYS as TRACKING_KEYS
from lora_cli.convert.values import carry_targets

MULTIMODAL = "for images, video and audio: `lora train` trains text models"

_OWN = KeyTable(
    carried={
        "model_name_or_path": ("model.path", text),
        "additional_target": ("adapter.modules_to_save", texts),
    },
    no_effect={
        HARDWARE: "flash_attn use_unsloth use_unsloth_gc enable_liger_kernel disable_gradient_checkpointing "
        "use_reentrant_gc use_v1_kernels low_cpu_mem_usage use_kv_cache offload_folder use_kt kt_optimize_rule "
        "cpu_infer "
        "chunk_size mode kt_maxlen kt_use_cuda_graph kt_mode kt_force_think quantization_device_map use_mca "
        "fp8_enable_fsdp_float8_all_gather fp8_backend device_map",
        "where Ray starts processes: `distributed:` has the options here": "ray_run_name ray_storage_path "
        "ray_storage_filesystem ray_num_workers resources_per_worker placement_strategy ray_init_kwargs use_ray",
        CACHE: "overwrite_cache preprocessing_num_workers preprocessing_batch_size tokenized_path streaming "
        "buffer_size",
        LOGGING: "plot_loss print_param_status include_effective_tokens_per_second",
        PRECISION: "upcast_layernorm upcast_lmhead_output infer_dtype compute_dtype",
        EVALUATION: "compute_accuracy eval_on_each_dataset eval_num_beams",
        GENERATION: "infer_backend temperature top_p top_k num_beams max_length max_new_tokens repetition_penalty "
        "length_penalty skip_special_tokens do_sample vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank "
        "vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend",
        "`lora merge` and `lora export` do this after training": "export_dir export_size export_device "
        "export_quantization_bit export_quantization_dataset export_quantization_nsamples export_quantization_maxlen "
        "export_legacy_format export_hub_model_id",
        UPLOAD: "hf_hub_token ms_hub_token om_hub_token",
        "files of the hub: HF_HOME is their folder": "cache_dir",
        MULTIMODAL: "media_dir image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches "
        "video_max_pixels "
        "video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate freeze_vision_tower "
        "freeze_multi_modal_projector image_resolution video_resolution",
        "the adapter is a plain one in any case": "pissa_convert",
        "PiSSA starts from the exact decomposition": "pissa_iter",
        "for LoRA on embeddings, which are trained fully here": "loraplus_lr_embedding",
        OWN_TOKENIZER: "use_fast_tokenizer resize_vocab",
        f"{OTHER_TASKS}: it has no effect in this stage": "pref_beta pref_ftx pref_bco_weight pref_loss "
        "dpo_label_smoothing kto_chosen_weight kto_rejected_weight simpo_gamma ppo_buffer_size ppo_epochs "
        "ppo_score_norm ppo_target ppo_whiten_rewards ref_model ref_model_adapters ref_model_quantization_bit "
        "reward_model reward_model_adapters reward_model_quantization_bit reward_model_type ld_alpha "
        "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules galore_target galore_rank "
        "galore_update_interval galore_scale galore_proj_type galore_layerwise apollo_target apollo_rank "
        "apollo_update_interval apollo_scale apollo_proj apollo_proj_type apollo_scale_type apollo_layerwise "
        "apollo_scale_front badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio "
        "badam_mask_mode badam_verbose",
    },
    same={"tool calls are written by the chat template of the base": "tool_format"},
    not_offered={
        "a conversation starts as its row says; accepted: without it": "default_system",
        "the position embeddings of the base are used; accepted: unchanged": "rope_scaling",
        "LongLoRA's shifted attention; accepted: full attention": "shift_attn",
        "other layers than the base's; accepted: without it": "mixture_of_depths use_llama_pro",
        "the base's own weights are used; accepted: with them": "train_from_scratch",
        "another loss; accepted: cross-entropy": "use_dft_loss use_asft_loss use_eaft_loss",
        "an optimizer that is not offered; accepted: the one of optim": "use_galore use_apollo use_badam use_adam_mini",
        "8-bit floats; accepted: 16 bits": "fp8",
        "a router's loss; accepted: without it": "moe_aux_loss_coef",
        "rows are always shuffled, in the order of training.seed; accepted: shuffled": "disable_shuffling",
        "sources are concatenated, `weight` of each repeats or thins its rows; accepted: so": "mix_strategy=concat "
        "interleave_probs",
        "special tokens of the rows are read as such; accepted: so": "split_special_tokens",
        "new tokens are special tokens here; accepted: without them": "add_tokens",
        "new embeddings start at the mean of all; accepted: so": "new_special_tokens_config "
        "init_special_tokens=noise_init",
        "reasoning is trained as the row has it: write data.template_variables; accepted: so": "enable_thinking=true "
        "preserve_thinking",
        "padding carries no loss; accepted: so": "ignore_pad_token_for_loss=true",
        "the language model is what is trained; accepted: so": "freeze_language_model",
        "several adapters start from one; accepted: without it": "create_new_adapter adapter_folder",
        "the answer's end-of-turn token is that of the chat template; accepted: so": "efficient_eos",
    },
    handled="model_revision pure_bf16 early_stopping_steps "
    "stage finetuning_type do_train quantization_bit quantization_method quantization_type "
    "double_quantization "
    "lora_rank lora_alpha lora_dropout lora_target lora_target_modules loraplus_lr_ratio use_rslora use_dora "
    "pissa_init "
    "use_muon adapter_name_or_path dataset eval_dataset dataset_dir template cutoff_len train_on_prompt mask_history "
    "max_samples val_size packing neat_packing trust_remote_code add_special_tokens new_special_tokens oft_rank "
    f"oft_block_size oft_target module_dropout {TRACKING_KEYS}",
)
TABLE = join(_OWN, TRAINING_ARGUMENTS)


def convert(draft: Draft) -> None:
    """Convert a config of LLaMA-Factory."""
    config = draft.config
    stage = config.text("stage") or "sft"
    if stage not in ("sft", "pt"):
        draft.other_task("stage", f"{stage} is another task: `lora train` does supervised fine-tuning on good answers")
    elif config.has("stage"):
        draft.same(
            "stage", "`lora train` does supervised fine-tuning" if stage == "sft" else "format text, loss on all"
        )
    kind = config.text("finetuning_type") or "lora"
    if kind not in ("lora", "oft"):
        draft.other_task("finetuning_type", f"{kind} trains weights of the base: only adapters are trained here")
    if config.has("do_train") and not config.switch("do_train"):
        draft.other_task("do_train", "this config does not train: `lora eval` measures and generates")
    path = config.text("model_name_or_path")
    if path:
        draft.carry("model_name_or_path", "model.path", path)
    carry_revision(draft, "model_revision")
    if config.switch("trust_remote_code"):
        draft.no_effect(
            "trust_remote_code", "code of the model's repository: write model.trust_remote_code if it needs it"
        )
    _carry_adapter(draft, kind)
    _carry_quantization(draft)
    _carry_rows(draft, stage)
    carry_training(draft, TrainerDefaults(), patience="early_stopping_steps")
    if config.switch("use_muon"):
        draft.carry("use_muon", "training.optimizer", "muon")
    apply_table(draft, TABLE)


def _carry_adapter(draft: Draft, kind: str) -> None:
    config = draft.config
    if kind == "oft":
        draft.carry("finetuning_type", "adapter.method", "oft")
        draft.carry("oft_block_size", "adapter.rotation_size", config.count("oft_block_size", 32))
        carry_targets(draft, "oft_target")
        draft.no_effect("module_dropout", "PEFT does not apply it to OFT")
        draft.refuse("oft_rank", "the size of the rotation blocks is set here; accepted: oft_block_size")
        return
    draft.same("finetuning_type", "lora is the default")
    carry_lora_variant(draft, rslora="use_rslora", dora="use_dora", pissa="pissa_init", plus="loraplus_lr_ratio")
    rank = config.whole("lora_rank")
    if rank is None:
        draft.assume("adapter.rank", 8)
    else:
        draft.carry("lora_rank", "adapter.rank", rank)
    alpha = config.number("lora_alpha")
    if alpha:
        draft.carry("lora_alpha", "adapter.alpha", float(alpha))
    else:
        draft.assume("adapter.alpha", float(2 * (rank or 8)), "twice lora_rank")
    if config.get("lora_dropout") is None:
        draft.assume("adapter.dropout", 0.0)
    else:
        draft.carry("lora_dropout", "adapter.dropout", real(config, "lora_dropout"))
    carry_targets(draft, "lora_target" if config.has("lora_target") else "lora_target_modules")
    adapters = texts(config, "adapter_name_or_path")
    if len(adapters) == 1:
        draft.carry("adapter_name_or_path", "adapter.from", adapters[0])
    elif adapters:
        draft.refuse("adapter_name_or_path", "a run goes on from one adapter; accepted: a new one")
    tokens = [key for key in ("add_special_tokens", "new_special_tokens") if config.get(key) is not None]
    for key in tokens:
        draft.carry(key, "model.new_tokens", texts(config, key))
        if config.get("additional_target") is None:
            draft.put("adapter.trainable_tokens", texts(config, key), f"{key}: their embeddings are trained")


def _carry_quantization(draft: Draft) -> None:
    config = draft.config
    bits = config.whole("quantization_bit")
    method = (config.text("quantization_method") or "bnb").lower()
    keys = ("quantization_method", "quantization_type", "double_quantization")
    if not bits:
        draft.same("quantization_bit", "asks for nothing")
        for key in keys:
            draft.no_effect(key, "without quantization_bit")
        return
    if bits not in (4, 8) or method not in ("bnb", "bitsandbytes"):
        key = "quantization_bit" if bits not in (4, 8) else "quantization_method"
        draft.refuse(key, "a base is quantized by bitsandbytes, in 4 or 8 bits; accepted: 4 bits")
        bits = bits if bits in (4, 8) else 4
    draft.carry("quantization_bit", "quantization.bits", bits)
    draft.same("quantization_method", "bitsandbytes quantizes the base")
    if bits == 8:
        for key in keys:
            draft.no_effect(key, "without effect on 8 bits")
        return
    if config.has("quantization_type"):
        draft.carry("quantization_type", "quantization.type", config.text("quantization_type"))
    if config.has("double_quantization"):
        draft.carry("double_quantization", "quantization.double_quant", config.switch("double_quantization"))


def _carry_rows(draft: Draft, stage: str) -> None:
    config = draft.config
    carry_datasets(draft, stage)
    neat, plain = config.switch("neat_packing"), config.switch("packing")
    packing = neat or plain or (stage == "pt" and config.get("packing") is None)
    if packing and config.whole("quantization_bit") == 8:
        packing = False
        for key in ("packing", "neat_packing"):
            draft.refuse(key, "8-bit weights mix the rows of a batch, so they are not packed; accepted: packing: false")
    length = config.whole("cutoff_len")
    if length is None:
        draft.assume("data.max_length", 2048)
    else:
        draft.carry("cutoff_len", "data.max_length", length)
    length = length or 2048
    if stage == "pt":
        draft.put("data.loss_on", "all", "stage: pt")
        draft.put("data.overlong", "split", "LLaMA-Factory cuts long documents into pieces of cutoff_len")
    elif packing:
        draft.assume("data.overlong", "drop", "with packing, longer rows are dropped")
    else:
        draft.assume("data.overlong", "truncate", "prompt and answer are cut in proportion; here the end is cut")
    if packing:
        leaks = "" if neat else "without attention between packed rows, unlike there"
        for key in ("neat_packing", "packing"):
            if config.switch(key):
                draft.carry(key, "data.packing", True, leaks)
        if not (neat or plain):
            draft.assume("data.packing", True, "stage: pt packs")
    else:
        carry_no_packing(draft, "packing")
        draft.same("neat_packing", "asks for nothing")
    draft.same("neat_packing", "asks for nothing")
    draft.same("packing", "neat_packing packs")
    batches = Batches(
        "per_device_train_batch_size",
        config.count("per_device_train_batch_size", 8),
        "gradient_accumulation_steps",
        config.count("gradient_accumulation_steps", 1),
        length,
    )
    carry_batches(draft, batches, packing=packing)
    if config.switch("train_on_prompt"):
        draft.carry("train_on_prompt", "data.loss_on", "all")
    elif config.switch("mask_history"):
        draft.carry("mask_history", "data.loss_on", "last-turn")
    for key in ("train_on_prompt", "mask_history"):
        draft.same(key, "loss on the assistant's turns is the default")
    if config.text("eval_dataset"):
        draft.same("val_size", "asks for nothing")
    else:
        carry_eval_fraction(draft, "val_size")
    if stage == "sft":
        carry_template(draft, "template", model=config.text("model_name_or_path"))
    else:
        draft.no_effect("template", "documents have no chat template")
