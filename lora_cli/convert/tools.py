"""The tools whose configs can be converted: what converts each, and the keys that it is recognized by. No torch."""

from collections.abc import Callable
from typing import NamedTuple

from lora_cli.convert import axolotl, axolotl_keys, litgpt, llama_factory, mlx, torchtune, trl
from lora_cli.convert.axolotl_data import KEYS as AXOLOTL_DATASET_KEYS
from lora_cli.convert.draft import Draft


class Tool(NamedTuple):
    """A tool whose configs can be converted."""

    name: str  # as written in a sentence
    convert: Callable[[Draft], None]
    known: frozenset[str]  # every key, dotted, without indices
    marks: frozenset[str]  # keys that only this tool has


def _tool(name: str, convert: Callable[[Draft], None], known: set[str], marks: str) -> Tool:
    return Tool(name, convert, frozenset(known), frozenset(marks.split()))


_AXOLOTL_KEYS = axolotl_keys.TABLE.known() | {
    f"{section}.{key}"
    for section in ("datasets", "test_datasets", "pretraining_dataset")
    for key in AXOLOTL_DATASET_KEYS.split()
}

# By the name of --from.
TOOLS: dict[str, Tool] = {
    "axolotl": _tool(
        "axolotl",
        axolotl.convert,
        _AXOLOTL_KEYS,
        "base_model base_model_config micro_batch_size sequence_len sample_packing lora_target_linear val_set_size "
        "lora_model_dir pad_to_sequence_len dataset_prepared_path evals_per_epoch saves_per_epoch num_epochs adapter "
        "flash_attention wandb_watch lora_fan_in_fan_out test_datasets pretraining_dataset special_tokens",
    ),
    "llama-factory": _tool(
        "LLaMA-Factory",
        llama_factory.convert,
        llama_factory.TABLE.known(),
        "finetuning_type stage cutoff_len template lora_rank lora_target dataset dataset_dir quantization_bit "
        "preprocessing_num_workers overwrite_cache plot_loss neat_packing max_samples val_size mask_history",
    ),
    "trl": _tool(
        "TRL",
        trl.convert,
        trl.TABLE.known(),
        "use_peft use_peft_lora dataset_name dataset_train_split dataset_mixture max_length "
        "dataset_text_field assistant_only_loss completion_only_loss packing_strategy use_bnb_nested_quant "
        "chat_template_path dataset_num_proc SFTConfig SFTTrainer LoraConfig dataset_mixer dataset_config",
    ),
    "torchtune": _tool(
        "torchtune",
        torchtune.convert,
        torchtune.TABLE.known(),
        "_component_ model._component_ tokenizer._component_ checkpointer._component_ dataset._component_ "
        "optimizer._component_ loss._component_ metric_logger log_every_n_steps max_steps_per_epoch clip_grad_norm "
        "enable_activation_checkpointing",
    ),
    "litgpt": _tool(
        "litgpt",
        litgpt.convert,
        litgpt.TABLE.known(),
        "data.class_path out_dir precision quantize lora_query lora_key lora_value lora_projection lora_mlp lora_head "
        "train.global_batch_size train.micro_batch_size train.max_seq_length eval.interval logger_name",
    ),
    "mlx": _tool(
        "mlx-lm",
        mlx.convert,
        mlx.TABLE.known(),
        "fine_tune_type lora_parameters iters num_layers lora_layers adapter_path steps_per_eval steps_per_report "
        "grad_checkpoint val_batches mask_prompt resume_adapter_file lr_schedule hf_dataset optimizer_config",
    ),
    "unsloth": _tool(
        "unsloth",
        trl.convert,
        trl.TABLE.known(),
        "FastLanguageModel UnslothTrainer UnslothTrainingArguments from_pretrained.load_in_4bit",
    ),
}
