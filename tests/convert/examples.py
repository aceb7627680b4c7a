"""Configs that other tools publish, as keys and values, and which of their keys a user has to accept.

From the examples of axolotl, LLaMA-Factory, torchtune, litgpt and mlx-lm, TRL's and PEFT's example commands, the
alignment handbook, unsloth's notebooks, and configs that people published for mlx-lm.
"""

from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parents[1] / "inputs" / "other_tools"


class Example(NamedTuple):
    """A published config."""

    file: Path
    tool: str
    accepted: tuple[str, ...]
    other_task: bool

    @property
    def name(self) -> str:
        return f"{self.tool}/{self.file.stem}"


# Examples that are not supervised fine-tuning of an adapter.
OTHER_TASKS = {
    "axolotl/llama-3-instruct-dpo-lora-8b",
    "llama-factory/llama3-dpo",
    "llama-factory/llama3-kto",
    "trl/example-config",
    "trl/starchat2-15b-full",
}
# Keys that change what is learnt and are not offered. Without them, nothing is written.
ACCEPTED: dict[str, tuple[str, ...]] = {
    "axolotl/cogito-llama-3b-lora": ("sample_packing",),
    "axolotl/devstral-small-qlora": ("scaling_softmax",),
    "axolotl/falcon-7b-qlora": ("special_tokens.bos_token", "evals_per_epoch"),
    "axolotl/openllama-3b-lora": ("sample_packing",),
    "axolotl/phi-1-5-qlora": ("adam_epsilon",),
    "axolotl/qwen3-32b-qlora": ("datasets[0].split", "optimizer"),
    "litgpt/falcon-7b-qlora": ("lora_query",),
    "llama-factory/llama3-sft-ray": ("dataset",),
    "llama-factory/qwen3-vl-4b-sft": ("dataset_info.json[mllm_demo].columns.images",),
    "mlx/example": ("num_layers",),
    "mlx/qwen3-4b-sweep": ("num_layers",),
    "mlx/wine-adafactor": (
        "num_layers",
        "optimizer_config.adafactor",
        "lr_schedule.warmup_init",
        "lr_schedule.arguments",
    ),
    "torchtune/llama3-2-11b-vision-multi": (
        *(f"model.{part}_trainable" for part in ("decoder", "encoder", "fusion")),
        *("model.image_size", "tokenizer.image_size", "lr_scheduler.num_warmup_steps"),
        *(f"datasets[{index}].transform" for index in range(4)),
    ),
    "torchtune/llama3-2-3b-gsm8k": ("dataset._component_", "dataset.partition"),
    "torchtune/phi3-mini-lora": ("model.lora_attn_modules",),
    "trl/zephyr-7b-qlora": ("dataset_mixture.test_split_size",),
    "unsloth/mistral-7b-cpt": (
        "dataset.train_test_split",
        "UnslothTrainingArguments.embedding_learning_rate",
    ),
}


def examples() -> list[Example]:
    """Return every published config."""
    files = sorted(
        file for tool in FOLDER.iterdir() if tool.name != "data" for file in tool.iterdir() if file.is_file()
    )
    found = []
    for file in files:
        name = f"{file.parent.name}/{file.stem}"
        found.append(Example(file, file.parent.name, ACCEPTED.get(name, ()), name in OTHER_TASKS))
    return found
