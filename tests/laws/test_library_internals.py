"""Every private or undocumented name of a library that lora_cli relies on, with the files that use it and a check.

If an upgrade of a library breaks a name, the test of that name fails and prints the files that use it. Other tests
compare these tables with lora_cli: a new use of a private name, or a new import from an undocumented module, fails
until it is listed here with a check. The names and texts of warnings that lora_cli silences are checked in
`tests/run/test_library_warnings.py`.
"""

import ast
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import transformers

import lora_cli
from tests.support import library_checks, moe_checks, peft_checks, typer_checks

ROOT = Path(lora_cli.__file__).parent
SOURCES = {str(file.relative_to(ROOT)): file.read_text() for file in sorted(ROOT.rglob("*.py"))}


class Use(NamedTuple):
    """What lora_cli does with a name of a library."""

    files: str  # of lora_cli that use it, separated by spaces
    check: Callable[[], None]  # fails if the name is missing or does not do what these files need


# Attributes whose names begin with one underscore; every use in lora_cli is listed.
PRIVATE: dict[str, Use] = {
    # transformers
    "_attn_implementation": Use(
        "evaluation/answers.py model/falcon_attention.py model/loss.py model/select_attention.py setup/run_records.py "
        "setup/training_model.py",
        library_checks.attention_name,
    ),
    "_can_set_attn_implementation": Use(
        "model/falcon_attention.py model/select_attention.py", library_checks.falcon_layers
    ),
    "_split_heads": Use("model/falcon_attention.py", library_checks.falcon_layers),
    "_can_set_experts_implementation": Use("export/onnx/model.py", library_checks.experts_models),
    "_is_stateful": Use("export/onnx/model.py model/packing_support.py", library_checks.stateful_models),
    "_apply_gate": Use("model/experts_lora.py", moe_checks.experts_module),
    "_process_model_after_weight_loading": Use("model/quantize_experts.py", moe_checks.four_bit_loader),
    "_process_model_before_weight_loading": Use("model/quantize_experts.py", moe_checks.four_bit_loader),
    "_unpack_matmul": Use("model/gguf_base.py", library_checks.packed_linear),
    "_weight_conversions": Use("model/conversion.py", library_checks.weight_conversion),
    # PEFT
    "_MODEL_TO_CONVERSION_PATTERN": Use("model/expert_targets.py", moe_checks.names_read_as_experts),
    "_MOE_FUSED_TARGETS": Use("model/expert_targets.py", moe_checks.names_read_as_experts),
    "_MOE_TARGET_MODULE_MAPPING": Use("model/expert_targets.py", moe_checks.names_read_as_experts),
    "_prefix_tuning_forward": Use("model/virtual_tokens.py", peft_checks.prefix_below_a_head),
    "_did_swap_in_out_features": Use("model/experts_lora.py", moe_checks.parameter_layer),
    "_register_custom_module": Use("model/fused_lora.py", peft_checks.custom_layers),
    # liger-kernel
    "_apply_liger_kernel_to_instance": Use("model/kernels.py", library_checks.liger_functions),
    # datasets
    "_fingerprint": Use("data/sources.py", library_checks.fingerprint),
    # torch
    "_backward_hooks": Use("model/fused_lora.py", library_checks.hooks_of_a_module),
    "_backward_pre_hooks": Use("model/fused_lora.py", library_checks.hooks_of_a_module),
    "_forward_hooks": Use("model/fused_lora.py", library_checks.hooks_of_a_module),
    "_forward_pre_hooks": Use("model/fused_lora.py", library_checks.hooks_of_a_module),
    "_C": Use("model/streamed_weights.py", library_checks.tensor_subclass),
    "_compiled_call_impl": Use("model/compile_layers.py", library_checks.compiled_layer),
    "_dynamo": Use("model/compile_layers.py", library_checks.compiled_layer),
    "_make_wrapper_subclass": Use("model/streamed_weights.py", library_checks.tensor_subclass),
    "_modules": Use("model/experts.py model/fp32_weights.py", library_checks.module_dictionaries),
    "_parameters": Use(
        "model/empty_base.py model/experts.py model/experts_lora.py model/fp32_weights.py model/quantize.py "
        "model/quantize_experts.py",
        library_checks.module_dictionaries,
    ),
    "_grouped_mm": Use("model/meta_forward.py", moe_checks.product_of_experts),
    "_get_dtype_plan": Use("model/sharded_base.py", library_checks.weights_kept_in_fp32),
    "_python_dispatch": Use("model/quantize.py", library_checks.dispatch_mode),
    "_get_sequence_number_for_group": Use("training/process_group.py", library_checks.collectives_are_counted),
    "_set_pg_timeout": Use("training/process_group.py", library_checks.group_timeout),
    "_pytree": Use("model/streamed_weights.py", library_checks.tensor_subclass),
    "_softmax_backward_data": Use("model/packed_attention.py", library_checks.softmax_backward),
    # typer
    "_click": Use("cli/__init__.py cli/app.py cli/completion.py cli/usage_errors.py", typer_checks.usage_errors),
    "_coercion": Use("cli/app.py", typer_checks.flags),
    "_completion_classes": Use("cli/completion.py", typer_checks.bash_completion),
}

# Names that peft, transformers and torch.distributed export from submodules only; every import in lora_cli is listed.
IMPORTED: dict[str, Use] = {
    "peft.tuners.adalora.layer.AdaLoraLayer": Use("model/adalora.py", peft_checks.adalora_allocator),
    "peft.tuners.boft.layer.BOFTLayer": Use("model/peft_waits.py", peft_checks.replaced_methods),
    "peft.tuners.boft.layer.MultiplicativeDropoutLayer": Use("model/peft_waits.py", peft_checks.replaced_methods),
    "peft.tuners.boft.layer.get_fbd_cuda": Use("model/peft_config.py", peft_checks.boft_extension),
    "peft.tuners.loha.LoHaLayer": Use("model/peft_waits.py", peft_checks.replaced_methods),
    "peft.tuners.lokr.LoKrLayer": Use("model/peft_waits.py", peft_checks.replaced_methods),
    "peft.tuners.lora.Embedding": Use("merging/check_weights.py merging/deltas.py", peft_checks.lora_embedding),
    "peft.tuners.lora.Linear": Use(
        "merging/check_weights.py merging/deltas.py model/fused_lora.py model/gguf_base.py "
        "model/measure_activations.py",
        peft_checks.custom_layers,
    ),
    "peft.tuners.lora.LoraLayer": Use(
        "commands/convert_adapter.py export/gguf/adapter.py export/hf/vllm_adapter.py "
        "model/foreign_adapters/to_peft.py model/fp32_weights.py model/fused_lora.py model/init_adapter.py",
        peft_checks.lora_layer,
    ),
    "peft.tuners.lora.bnb.Linear4bit": Use("model/fused_lora.py", peft_checks.lora_on_a_4_bit_layer),
    "peft.tuners.lora.config.CordaConfig": Use("model/init_adapter.py", peft_checks.corda_decomposition),
    "peft.tuners.lora.corda.preprocess_corda": Use("model/init_adapter.py", peft_checks.corda_decomposition),
    "peft.tuners.lora.dora.DoraLinearLayer": Use("model/init_adapter.py", peft_checks.dora_variant),
    "peft.tuners.lora.layer.ParamWrapper": Use("model/experts_lora.py", moe_checks.parameter_layer),
    "peft.tuners.oft.OFTLayer": Use("model/attach_adapter.py", peft_checks.oft_layer),
    "peft.tuners.tuners_utils.BaseTunerLayer": Use(
        "merging/deltas.py model/attach_adapter.py model/experts_lora.py "
        "model/fused_lora.py model/memory.py model/save_adapter.py",
        peft_checks.lora_layer,
    ),
    "peft.tuners.tuners_utils.cast_adapter_dtype": Use("model/attach_adapter.py", peft_checks.cast_to_fp32),
    "peft.tuners.tuners_utils.check_target_module_exists": Use("model/config_values.py", peft_checks.targeted_modules),
    "peft.utils.ModulesToSaveWrapper": Use(
        "merging/deltas.py merging/streamed_models.py model/fp32_weights.py model/target_modules.py",
        peft_checks.modules_to_save_wrapper,
    ),
    "peft.utils.TrainableTokensWrapper": Use(
        "merging/deltas.py model/fp32_weights.py", peft_checks.trainable_tokens_wrapper
    ),
    "peft.utils.constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING": Use(
        "model/attach_adapter.py", peft_checks.ia3_table
    ),
    "peft.utils.integrations.dequantize_module_weight": Use("model/init_adapter.py", peft_checks.dequantized_matrix),
    "peft.utils.merge_utils.dare_linear": Use("merging/low_rank.py", peft_checks.combined_updates),
    "peft.utils.merge_utils.ties": Use("merging/low_rank.py", peft_checks.combined_updates),
    "peft.utils.other.AuxiliaryTrainingWrapper": Use(
        "model/save_adapter.py setup/strategy.py", peft_checks.modules_to_save_wrapper
    ),
    "peft.utils.other.get_pattern_key": Use(
        "merging/low_rank.py model/adapter_files.py model/config_values.py", peft_checks.pattern_keys
    ),
    "peft.utils.transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN": Use(
        "model/expert_targets.py", moe_checks.names_read_as_experts
    ),
    "peft.utils.transformers_weight_conversion._MOE_FUSED_TARGETS": Use(
        "model/expert_targets.py", moe_checks.names_read_as_experts
    ),
    "peft.utils.transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING": Use(
        "model/expert_targets.py", moe_checks.names_read_as_experts
    ),
    "torch.distributed.distributed_c10d._set_pg_timeout": Use(
        "training/process_group.py", library_checks.group_timeout
    ),
    "torch.distributed.DistError": Use(
        "training/failures.py training/peers.py training/process_group.py", library_checks.errors_of_a_store
    ),
    "torch.distributed.PrefixStore": Use("training/peers.py training/process_group.py", library_checks.shared_store),
    "torch.distributed.Store": Use("training/peers.py", library_checks.shared_store),
    "torch.distributed.TCPStore": Use("training/launch.py training/process_group.py", library_checks.shared_store),
    "torch.distributed.device_mesh.DeviceMesh": Use(
        "model/sharded_base.py training/process_group.py", library_checks.sharded_layer
    ),
    "torch.distributed.device_mesh.init_device_mesh": Use("training/process_group.py", library_checks.sharded_layer),
    **dict.fromkeys(
        ("torch.distributed.fsdp.CPUOffloadPolicy", "torch.distributed.fsdp.OffloadPolicy"),
        Use("model/sharded_base.py", library_checks.sharded_layer),
    ),
    "torch.distributed.fsdp.fully_shard": Use("model/sharded_base.py", library_checks.sharded_layer),
    "torch.distributed.fsdp.FSDPModule": Use("model/sharding.py", library_checks.sharded_layer),
    "torch.distributed.tensor.DTensor": Use("model/sharded_base.py model/sharding.py", library_checks.sharded_layer),
    "torch.distributed.tensor.Shard": Use("model/sharded_base.py", library_checks.sharded_layer),
    "transformers.conversion_mapping.get_model_conversion_mapping": Use(
        "model/conversion.py", library_checks.weight_conversion
    ),
    "transformers.core_model_loading.WeightRenaming": Use("model/conversion.py", library_checks.weight_conversion),
    "transformers.core_model_loading.WeightTransform": Use("model/conversion.py", library_checks.weight_conversion),
    "transformers.core_model_loading.dot_natural_key": Use("model/conversion.py", library_checks.weight_conversion),
    "transformers.core_model_loading.rename_source_key": Use("model/conversion.py", library_checks.weight_conversion),
    "transformers.core_model_loading.revert_weight_conversion": Use(
        "model/conversion.py", library_checks.weight_conversion
    ),
    "transformers.integrations.gguf.dequant.dequantize": Use("model/gguf_base.py", library_checks.packed_linear),
    "transformers.integrations.gguf.utils.GgufEmbedding": Use("model/gguf_base.py", library_checks.packed_linear),
    "transformers.integrations.gguf.utils.GgufExperts": Use("model/gguf_base.py", library_checks.packed_linear),
    "transformers.integrations.gguf.utils.GgufLinear": Use(
        "model/fused_lora.py model/gguf_base.py model/target_modules.py", library_checks.packed_linear
    ),
    "transformers.integrations.gguf.utils.is_gguf_arch_supported": Use(
        "model/gguf_base.py", library_checks.gguf_header
    ),
    "transformers.integrations.bitsandbytes.Bnb4bitQuantize": Use(
        "model/quantize_experts.py", moe_checks.four_bit_loader
    ),
    "transformers.integrations.bitsandbytes.Bnb8bitQuantize": Use(
        "model/quantize_experts.py", moe_checks.eight_bit_loader
    ),
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS": Use(
        "model/falcon_attention.py model/packed_attention.py model/padded_attention.py model/varlen_attention.py "
        "setup/inputs.py",
        library_checks.attention_functions,
    ),
    "transformers.integrations.sdpa_attention.sdpa_attention_forward": Use(
        "model/padded_attention.py", library_checks.mask_functions
    ),
    "transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS": Use(
        "model/padded_attention.py", library_checks.mask_functions
    ),
    "transformers.masking_utils.sdpa_mask": Use("model/padded_attention.py", library_checks.mask_functions),
    "transformers.activations.GELUActivation": Use("model/fused_mlp.py", library_checks.activations),
    "transformers.activations.GELUTanh": Use("model/fused_mlp.py", library_checks.activations),
    "transformers.activations.NewGELUActivation": Use("model/fused_mlp.py", library_checks.activations),
    "transformers.activations.SiLUActivation": Use("model/fused_mlp.py", library_checks.activations),
    "transformers.models.falcon.modeling_falcon.FalconLinear": Use(
        "model/fused_lora.py model/quantize_experts.py model/weight_memory.py", library_checks.falcon_linear
    ),
    "transformers.models.falcon.modeling_falcon.FalconAttention": Use(
        "model/falcon_attention.py", library_checks.falcon_layers
    ),
    "transformers.models.falcon.modeling_falcon.apply_rotary_pos_emb": Use(
        "model/falcon_attention.py", library_checks.falcon_layers
    ),
    "transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING": Use("model/quantize_experts.py", moe_checks.four_bit_loader),
    "transformers.quantizers.quantizer_bnb_4bit.Bnb4BitHfQuantizer": Use(
        "model/fake_quantize.py model/quantize_experts.py", moe_checks.four_bit_loader
    ),
    "transformers.quantizers.quantizer_bnb_8bit.Bnb8BitHfQuantizer": Use(
        "model/fake_quantize.py model/quantize_experts.py", moe_checks.eight_bit_loader
    ),
    "transformers.quantizers.base.get_keys_to_not_convert": Use("model/quantize_experts.py", library_checks.left_out),
    "transformers.quantizers.quantizers_utils.should_convert_module": Use(
        "model/weight_memory.py", library_checks.left_out
    ),
    "transformers.quantizers.auto.AutoHfQuantizer": Use("model/fake_quantize.py", library_checks.quantizer),
    "transformers.utils.cached_file": Use("model/model_source.py", library_checks.missing_file),
    "transformers.utils.chat_template_utils.render_jinja_template": Use(
        "data/rendering.py", library_checks.rendered_template
    ),
}

# Public names without a documented meaning: attributes of layers and models, class names that are compared as strings,
# attributes that lora_cli replaces. This table is kept by hand; the last part of a name occurs in the listed files.
UNDOCUMENTED: dict[str, Use] = {
    "liger_kernel.transformers.monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN": Use(
        "model/kernels.py", library_checks.liger_functions
    ),
    "liger_kernel.ops.swiglu.swiglu_forward": Use("model/fused_mlp.py", library_checks.liger_gates),
    "liger_kernel.ops.swiglu.swiglu_backward": Use("model/fused_mlp.py", library_checks.liger_gates),
    "liger_kernel.ops.geglu.geglu_forward": Use("model/fused_mlp.py", library_checks.liger_gates),
    "liger_kernel.ops.geglu.geglu_backward": Use("model/fused_mlp.py", library_checks.liger_gates),
    "torch.utils.deterministic.fill_uninitialized_memory": Use("training/gpu.py", library_checks.deterministic_switch),
    "transformers.modeling_gguf_pytorch_utils.tqdm": Use("model/gguf_base.py", library_checks.gguf_progress_bar),
    "GgufLinear.input_permutation": Use("model/gguf_base.py", library_checks.packed_linear),
    "PreTrainedModel.hf_quantizer": Use("model/quantize.py", library_checks.loaded_model),
    "PreTrainedModel.is_loaded_in_8bit": Use("model/select_attention.py", library_checks.loaded_model),
    "AutoModel.from_pretrained.mismatched_keys": Use("model/base_model.py", library_checks.loaded_model),
    "DynamicLayer.lazy_initialization": Use("export/onnx/graph.py", library_checks.cache_layer),
    "MODEL_FOR_CAUSAL_LM_MAPPING": Use("model/tasks.py", library_checks.task_mappings),
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING": Use("model/tasks.py", library_checks.task_mappings),
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": Use("model/tasks.py", library_checks.task_mappings),
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING": Use("model/tasks.py", library_checks.task_mappings),
    "AdaLoraModel.rankallocator": Use("model/adalora.py", peft_checks.adalora_allocator),
    "AdaLoraModel.resize_modules_by_rank_pattern": Use("model/adalora.py", peft_checks.adalora_allocator),
    "AdaLoraLayer.lora_E": Use("model/adalora.py", peft_checks.adalora_allocator),
    "AdaLoraLayer.ranknum": Use("model/attach_adapter.py", peft_checks.adalora_allocator),
    "RankAllocator.update_ipt": Use("model/adalora.py", peft_checks.adalora_allocator),
    "RankAllocator.budget_schedule": Use("model/adalora.py", peft_checks.adalora_allocator),
    "RankAllocator.reset_ipt": Use("model/adalora.py", peft_checks.adalora_allocator),
    "RankAllocator.init_bgt": Use("model/adalora.py", peft_checks.adalora_allocator),
    "RankAllocator.ipt": Use("model/adalora.py", peft_checks.adalora_allocator),
    "RankAllocator.exp_avg_ipt": Use("model/adalora.py", peft_checks.adalora_allocator),
    "RankAllocator.exp_avg_unc": Use("model/adalora.py", peft_checks.adalora_allocator),
    "BOFTLayer.cayley_batch": Use("model/peft_waits.py", peft_checks.replaced_methods),
    "LoHaLayer.get_delta_weight": Use("model/peft_waits.py", peft_checks.replaced_methods),
    "LoHaLayer.rank_dropout": Use("model/peft_waits.py", peft_checks.replaced_methods),
    "LoKrLayer.rank_dropout_scale": Use("model/peft_waits.py", peft_checks.replaced_methods),
    "EvaConfig.rho": Use("model/attach_adapter.py model/init_adapter.py", peft_checks.eva_factor),
    "LoraLayer.lora_bias": Use("merging/deltas.py", peft_checks.lora_layer),
    "LoraLayer.lora_magnitude_vector": Use("model/init_adapter.py", peft_checks.dora_variant),
    "LoraLayer.lora_variant": Use(
        "merging/deltas.py model/fp32_weights.py model/fused_lora.py", peft_checks.dora_variant
    ),
    "Linear.eigens": Use("model/init_adapter.py", peft_checks.corda_decomposition),
    "ModulesToSaveWrapper.adapter_state_dict": Use("model/fp32_weights.py", peft_checks.modules_to_save_wrapper),
    "ModulesToSaveWrapper.original_module": Use(
        "merging/streamed_models.py model/save_adapter.py", peft_checks.modules_to_save_wrapper
    ),
    "TrainableTokensWrapper.token_adapter": Use("merging/deltas.py", peft_checks.trainable_tokens_wrapper),
    "ParamWrapper": Use("model/init_adapter.py", peft_checks.param_wrapper),
    "PeftModel.prompt_tokens": Use("model/virtual_tokens.py", peft_checks.prompt_learning),
    "PeftModel.word_embeddings": Use("model/virtual_tokens.py", peft_checks.prompt_learning),
    "PeftModelForTokenClassification.cls_layer_name": Use("model/virtual_tokens.py", peft_checks.prefix_below_a_head),
    "PeftModel.prompt_encoder": Use("model/init_adapter.py", peft_checks.prompt_learning),
    "PeftModel.generation_config": Use("evaluation/generation.py", peft_checks.prompt_learning),
    "Linear4bit.compute_dtype": Use(
        "model/fp32_weights.py model/fused_lora.py model/select_attention.py", library_checks.four_bit_layer
    ),
    "Linear4bit.support_avx512bf16_for_cpu": Use("model/quantize.py", library_checks.four_bit_layer),
    "Params4bit.compress_statistics": Use("model/fused_lora.py", library_checks.four_bit_layer),
    "Params4bit.quant_state": Use(
        "model/attach_adapter.py model/finite.py model/fused_lora.py model/quantize.py", library_checks.four_bit_layer
    ),
    "QuantState.state2": Use("export/hf/nf4.py model/finite.py model/quantize.py", library_checks.four_bit_layer),
    "QuantState.absmax": Use("model/experts.py model/finite.py", moe_checks.four_bit_parts),
    "Int8Params.SCB": Use("model/finite.py", library_checks.int8_functions),
    "pyo3_runtime.PanicException": Use("model/library_errors.py", library_checks.panic),
    "GgufLinear.ggml_type": Use("model/gguf_base.py", library_checks.packed_linear),
    "ParamWrapper.parameter_name": Use("model/attach_adapter.py model/experts_lora.py", moe_checks.parameter_layer),
    "Experts.is_transposed": Use("model/experts_lora.py", moe_checks.experts_module),
    "Experts.has_gate": Use("model/experts_lora.py model/measure_activations.py", moe_checks.experts_module),
    "Linear8bitLt": Use("model/fake_quantize.py model/select_attention.py", library_checks.quantizer),
    "bitsandbytes.functional.int8_vectorwise_quant": Use("model/fake_quantize.py", library_checks.int8_functions),
    "bitsandbytes.functional.int8_vectorwise_dequant": Use("model/fake_quantize.py", library_checks.int8_functions),
    "bitsandbytes.optim.Optimizer8bit.init_state": Use("training/optimizer.py", library_checks.optimizer_state),
    "bitsandbytes.optim.Optimizer8bit.check_overrides": Use("training/optimizer.py", library_checks.optimizer_state),
    "bitsandbytes.optim.Optimizer8bit.state.qmap": Use("training/optimizer.py", library_checks.optimizer_state),
    "torch.nn.Module.parametrizations": Use("model/fp32_weights.py", library_checks.module_dictionaries),
    "torch.distributed.TORCHELASTIC_USE_AGENT_STORE": Use(
        "training/launch.py training/process_group.py", library_checks.launchers_store
    ),
    "huggingface_hub.constants.ENDPOINT": Use("run/hub.py", library_checks.offline_switch),
    "huggingface_hub.constants.HF_HUB_OFFLINE": Use("run/hub.py", library_checks.offline_switch),
    "huggingface_hub.errors.HfHubHTTPError.__bases__": Use("run/hub.py", library_checks.errors_of_http),
    "lm_eval.tasks.TaskManager.all_tasks": Use("evaluation/lm_eval_harness.py", library_checks.harness_tasks),
    "xllamacpp.CommonParams": Use("export/gguf/llama_cpp_server.py", library_checks.llama_cpp_parameters),
    "xllamacpp.Server.listening_address": Use("export/gguf/llama_cpp_server.py", library_checks.llama_cpp_parameters),
    **dict.fromkeys(
        (f"typer._click.exceptions.{name}" for name in ("NoSuchOption", "MissingParameter", "BadParameter")),
        Use("cli/usage_errors.py", typer_checks.usage_errors),
    ),
    "typer._click.exceptions.BadOptionUsage": Use("cli/usage_errors.py", typer_checks.usage_errors),
    "typer._click.exceptions.UsageError": Use(
        "cli/__init__.py cli/app.py cli/usage_errors.py", typer_checks.usage_errors
    ),
    "typer._click.exceptions.NoArgsIsHelpError": Use("cli/__init__.py", typer_checks.usage_errors),
    "typer._coercion.bool_flag_type_descriptor": Use("cli/app.py", typer_checks.flags),
    "typer.core.TyperCommand.format_options": Use("cli/app.py", typer_checks.help_pages),
    "typer.core.TyperCommand.collect_usage_pieces": Use("cli/app.py", typer_checks.help_pages),
    "typer._completion_classes.BashComplete": Use("cli/completion.py", typer_checks.bash_completion),
    "typer._click.shell_completion.add_completion_class": Use("cli/completion.py", typer_checks.bash_completion),
    "onnxruntime.capi.onnxruntime_pybind11_state": Use("export/onnx/verify.py", library_checks.onnx_names),
}
USES = PRIVATE | IMPORTED | UNDOCUMENTED
PYTHONS_OWN = {"_asdict", "_exit", "_fields", "_make", "_replace"}  # documented by Python


@pytest.mark.parametrize("name", USES)
def test_the_library_does_what_lora_cli_needs(name: str):
    use = USES[name]
    try:
        use.check()
    except Exception as reason:
        message = f"{name} is missing or behaves differently; it is used by lora_cli/: {use.files}"
        raise AssertionError(f"{message}\n{type(reason).__name__}: {reason}") from reason


def own_private_names(tree: ast.AST) -> set[str]:
    """Return the private attributes that the classes of a file define: methods, fields, and `self._x = ...`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            names |= {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
            names |= {part.target.id for part in node.body if isinstance(part, ast.AnnAssign)}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
    return names


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_names(source: str) -> set[str]:
    """Return the private names in `source` that are neither its own classes' nor imported from lora_cli."""
    tree = ast.parse(source)
    own, found = own_private_names(tree), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (is_self(node.value) and node.attr in own):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lora_cli"):
            found |= {part for alias in node.names for part in (*(node.module or "").split("."), alias.name)}
        elif isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            found |= {str(part.value) for part in node.args if isinstance(part, ast.Constant)}  # getattr(x, "_name")
    return {name for name in found - PYTHONS_OWN if name.startswith("_") and not name.startswith("__")}


def undocumented_imports(source: str) -> set[str]:
    """Return what `source` imports from submodules of these libraries and cannot import from their top module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        for alias in node.names:
            library = {"peft": peft, "transformers": transformers}.get(node.module.partition(".")[0])
            if node.module.startswith("torch.distributed") or (library and not hasattr(library, alias.name)):
                found.add(f"{node.module}.{alias.name}")
    return found - DOCUMENTED


DOCUMENTED = {f"transformers.utils.is_flash_attn_{version}_available" for version in (2, 3, 4)}


def uses_by_name(find: Callable[[str], set[str]]) -> dict[str, list[str]]:
    files: defaultdict[str, list[str]] = defaultdict(list)
    for file, source in SOURCES.items():
        for name in find(source):
            files[name].append(file)
    return dict(files)


@pytest.mark.parametrize(("table", "find"), [(PRIVATE, private_names), (IMPORTED, undocumented_imports)])
def test_every_use_in_lora_cli_is_listed(table: dict[str, Use], find: Callable[[str], set[str]]):
    listed = {name: use.files.split() for name, use in table.items()}
    assert uses_by_name(find) == listed, "list each name with its files in this test, and write a check for it"


@pytest.mark.parametrize("name", UNDOCUMENTED)
def test_the_listed_files_use_the_name(name: str):
    last = name.rpartition(".")[2]
    assert [file for file in UNDOCUMENTED[name].files.split() if last not in SOURCES[file]] == []


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("x = model.config._attn_implementation", {"_attn_implementation"}),
        ("module._parameters['weight'] = x", {"_parameters"}),
        ("self._cache = self._inherited", {"_inherited"}),  # no class of the file defines the second
        ("x = self._model._secret", {"_model", "_secret"}),
        ("x = getattr(model, '_hidden', None)", {"_hidden"}),
        ("from torch._C import _functions", {"_C", "_functions"}),
        ("import torch._dynamo", {"_dynamo"}),
        ("from lora_cli.model.loss import _own", set()),
        ("x = row._replace(a=1).__class__", set()),
    ],
)
def test_the_scan_itself(line: str, names: set[str]):
    assert private_names(line) == names


def test_the_scan_of_imports_itself():
    assert undocumented_imports("from peft.utils.other import get_pattern_key") == {"peft.utils.other.get_pattern_key"}
    assert undocumented_imports("from peft.tuners.lora import LoraConfig") == set()  # `peft.LoraConfig` exists
