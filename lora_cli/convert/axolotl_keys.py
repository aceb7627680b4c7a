"""The table of axolotl's keys that need no code. No torch."""

from lora_cli.convert.huggingface import TRAINING_ARGUMENTS, as_items, text, texts
from lora_cli.convert.tables import (
    CACHE,
    CODE,
    EVALUATION,
    GENERATION,
    HARDWARE,
    LOGGING,
    OTHER_TASKS,
    OWN_TOKENIZER,
    PADDING,
    SHARDING,
    UPLOAD,
    KeyTable,
    join,
)
from lora_cli.convert.tracking import KEYS as TRACKING_KEYS

_OWN = KeyTable(
    carried={
        "base_model": ("model.path", text),
        "lora_model_dir": ("adapter.from", text),
        "peft_layers_to_transform": ("adapter.layers", as_items),
        "lora_modules_to_save": ("adapter.modules_to_save", texts),
    },
    no_effect={
        HARDWARE: "flash_attention sdp_attention xformers_attention flex_attention eager_attention sage_attention "
        "attn_implementation flex_attn_compile_kwargs flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_qkv "
        "flash_attn_fuse_mlp flash_optimum unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o "
        "unsloth_rms_norm unsloth_rope lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel liger_rope "
        "liger_rms_norm liger_layer_norm liger_glu_activation liger_swiglu liger_cross_entropy "
        "liger_fused_linear_cross_entropy chunked_cross_entropy "
        "chunked_cross_entropy_num_chunks chunked_cross_entropy_chunk_size cut_cross_entropy use_kernels "
        "use_scattermoe "
        "use_sonicmoe tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp llama4_linearized_experts "
        "layer_offloading offload activation_memory_budget low_cpu_mem_usage max_memory gpu_memory_limit gc_steps "
        "gc_collect_steps experimental_skip_move_to_device lora_on_cpu embeddings_skip_upcast "
        "profiler_steps profiler_steps_start batch_flattening use_flash_attention",
        SHARDING: "ddp fsdp_version fsdp_final_state_dict_type device_map device qlora_sharded_model_loading "
        "tensor_parallel_size context_parallel_size dp_shard_size dp_replicate_size sequence_parallel_degree "
        "heads_k_stride ring_attn_func expert_parallel_size use_ray ray_run_name ray_num_workers resources_per_worker "
        "ddp_find_unused_parameters",
        CACHE: "dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory "
        "streaming streaming_multipack_buffer_size pretrain_multipack_buffer_size push_dataset_to_hub "
        "dataset_shard_num "
        "num_dataset_shards_to_save hf_use_auth_token preprocess_iterable is_preprocess",
        LOGGING: "include_tkps total_num_tokens total_supervised_tokens axolotl_config_path debug_text_only",
        "a run that failed: training.on_spike has what is done at a spike of the loss": "loss_watchdog_threshold "
        "loss_watchdog_patience",
        "axolotl's own checks of the config": "strict",
        "the base is read from its config": "model_type base_model_config cls_model_config is_falcon_derived_model "
        "is_llama_derived_model is_mistral_derived_model is_qwen_derived_model base_model_ignore_patterns "
        "model_quantization_config model_quantization_config_kwargs overrides_of_model_kwargs model_kwargs",
        OWN_TOKENIZER: "tokenizer_type tokenizer_use_fast tokenizer_legacy tokenizer_use_mistral_common "
        "tokenizer_save_jinja_files processor_type",
        "rows of the embedding that no token uses": "resize_token_embeddings_to_32x shrink_embeddings "
        "mean_resizing_embeddings",
        PADDING: "pad_to_sequence_len pad_to_multiple_of",
        "how rows are put into packs; each pack holds max_length tokens at most": "sample_packing_group_size "
        "sample_packing_bin_size sample_packing_eff_est sample_packing_sequentially sample_packing_mp_start_method "
        "multipack_real_batches",
        EVALUATION: "eval_sample_packing eval_table_size eval_table_max_new_tokens eval_max_new_tokens "
        "do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset bench_split bench_source_max_len",
        GENERATION: "gradio_title gradio_share gradio_server_name gradio_server_port gradio_max_new_tokens "
        "gradio_temperature",
        CODE: "debug device_id prepared save_first_step dynamic_checkpoint ",
        UPLOAD: "hub_model_id hub_strategy hub_revision",
        "`lora merge` and `lora export` do this after training": "merge_lora merge_method",
        "for models of an older format": "gptq_groupsize gptq_model_v1 gptq_disable_exllama torchdistx_path "
        "max_packed_sequence_len lora_fan_in_fan_out fan_in_fan_out",
        "for LoRA on embeddings, which are trained fully here": "loraplus_lr_embedding",
        "embeddings of tokens that the base never saw in training": "fix_untrained_tokens",
        f"{OTHER_TASKS}: it has no effect without rl": "rl_beta dpo_beta orpo_alpha rpo_alpha simpo_gamma cpo_alpha "
        "kto_desirable_weight kto_undesirable_weight dpo_use_weighting dpo_use_logits_to_keep dpo_label_smoothing "
        "dpo_norm_loss dpo_padding_free dpo_loss_type dpo_loss_weights max_prompt_len trl vllm "
        "precompute_ref_log_probs generate_during_eval",
        "the parts of a LoRA model that are trained are the adapter's": "unfrozen_parameters",
        "for the vision part of a model: `lora train` trains text models": "image_size image_resize_algorithm",
    },
    same={
        "the end-of-turn token of the chat template carries loss": "eot_tokens",
        "a run continues with `lora train RECIPE --resume`": "auto_resume_from_checkpoints",
    },
    not_offered={
        "AdamW's epsilon is 1e-8; accepted: 1e-8": "adam_epsilon2",
        "AdamW has two betas; accepted: without it": "adam_beta3",
        "one learning rate for all; accepted: learning_rate": "embedding_lr embedding_lr_scale lr_groups",
        "the warmup is linear; accepted: linear": "lr_quadratic_warmup",
        "the cosine decays to the last step; accepted: so": "cosine_constant_lr_ratio",
        "no one-cycle schedule; accepted: without it": "lr_div_factor",
        "another attention than the base's; accepted: full attention": "s2_attention scaling_softmax",
        "8-bit floats; accepted: 16 bits": "fp8 fp8_enable_fsdp_float8_all_gather",
        "longer contexts by other positions; accepted: without it": "use_pose pose_split_on_token_ids "
        "pose_max_context_len pose_num_chunks rope_scaling overrides_of_model_config model_config",
        "LISA trains other weights; accepted: the adapter": "lisa_n_layers lisa_step_interval "
        "lisa_layers_attribute=model.layers",
        "ReLoRA restarts the adapter; accepted: one adapter": "relora relora_steps relora_warmup_steps "
        "relora_anneal_steps relora_prune_ratio relora_prune_method=magnitude relora_cpu_offload jagged_restart_steps "
        "jagged_restart_warmup_steps jagged_restart_anneal_steps",
        "other weights than linear layers; accepted: without them": "lora_target_parameters",
        "layers are listed by their index; accepted: those": "peft_layers_pattern peft_layer_replication",
        "tokens are listed in adapter.trainable_tokens, not their ids; accepted: none": "peft_trainable_token_indices",
        "tied weights are trained as one; accepted: so": "peft_ensure_weight_tying",
        "quantization-aware training; accepted: without it": "qat",
        "adapter weights are float32; accepted: so": "peft_autocast_adapter_dtype=true",
        "rows are encoded as their format says; accepted: so": "skip_prepare_dataset",
        "the order of rows is random; accepted: random": "curriculum_sampling shuffle_before_merging_datasets",
        "documents are cut into pieces, each attends to itself; accepted: so": "pretraining_sample_concatenation",
        "short rows are kept; accepted: kept": "min_sample_len",
        "a part of the rows; accepted: all rows": "dataset_shard_idx",
        "another loss; accepted: cross-entropy": "use_eaft use_dft eaft_alpha eaft_k dft "
        "router_aux_loss_coef orpo_beta",
        "names of existing tokens are kept; accepted: kept": "added_tokens_overrides",
        "the base is quantized by bitsandbytes, or as its config says; accepted: so": "bnb_config_kwargs",
        "a model that is quantized with GPTQ is recognized; accepted: so": "gptq",
        "a conversation starts as its row says; accepted: without it": "default_system_message",
        "the optimizer is the one of `optimizer`; accepted: its defaults": "dion_lr dion_momentum "
        "dion_rank_fraction dion_rank_multiple_of",
        "trained by a teacher; accepted: cross-entropy": "kd_trainer kd_ce_alpha kd_alpha kd_temperature "
        "kd_top_k_before_softmax kd_zscore_base_temp",
        "diffusion is another model; accepted: next-token prediction": "diffusion",
    },
    other_task={
        "another task than supervised fine-tuning": "reward_model process_reward_model",
        "classification is `task: seq-cls`, whose rows are a text and a label": "num_labels",
    },
    handled="revision_of_model model_revision datasets test_datasets pretraining_dataset rl adapter load_in_8bit "
    "load_in_4bit bf16 fp16 bfloat16 float16 "
    "float32 lora_r lora_alpha lora_dropout lora_target_modules lora_target_linear peft_use_dora peft_use_rslora "
    "peft_init_lora_weights loraplus_lr_ratio peft peft.loftq_config peft.backend peft.weight_dtype peft.group_size "
    "sequence_len excess_length_strategy sample_packing pretrain_multipack_attn train_on_inputs chat_template "
    "chat_template_jinja chat_template_kwargs val_set_size micro_batch_size batch_size gradient_accumulation_steps "
    "num_epochs max_steps learning_rate optimizer lr_scheduler lr_scheduler_kwargs cosine_min_lr_ratio warmup_steps "
    "warmup_ratio max_grad_norm neftune_noise_alpha noisy_embedding_alpha eval_strategy evaluation_strategy eval_steps "
    "evals_per_epoch save_strategy save_steps saves_per_epoch save_total_limit load_best_model_at_end "
    "early_stopping_patience logging_steps output_dir special_tokens special_tokens.bos_token special_tokens.eos_token "
    "special_tokens.pad_token special_tokens.unk_token special_tokens.additional_special_tokens tokens plugins "
    "dataset_exact_deduplication shuffle_merged_datasets tokenizer_config trust_remote_code activation_offloading "
    f"gradient_checkpointing {TRACKING_KEYS}",
)

TABLE = join(_OWN, TRAINING_ARGUMENTS)
