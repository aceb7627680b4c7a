"""The smallest config of each tool that can be converted, with changes, as a recipe."""

from pathlib import Path
from typing import Any

from lora_cli.convert.config import Config
from lora_cli.convert.convert_config import convert_config
from lora_cli.recipe.load import parse_recipe
from lora_cli.recipe.schema import Recipe

MINIMAL: dict[str, dict[str, Any]] = {
    "axolotl": {
        "base_model": "a/b",
        "adapter": "lora",
        "learning_rate": 1e-4,
        "datasets": [{"path": "r.jsonl", "type": "chat_template"}],
    },
    "llama-factory": {"model_name_or_path": "a/b", "finetuning_type": "lora", "dataset": "r", "dataset_dir": "ONLINE"},
    "trl": {"model_name_or_path": "a/b", "dataset_name": "a/r", "use_peft": True},
    "torchtune": {
        "model": {"_component_": "torchtune.models.llama3.lora_llama3_8b", "lora_attn_modules": ["q_proj"]},
        "checkpointer": {"_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": "/tmp/b"},
        "dataset": {"_component_": "torchtune.datasets.alpaca_dataset"},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-4},
    },
    "litgpt": {"checkpoint_dir": "checkpoints/a/b", "lora_r": 8, "train": {"max_seq_length": 512}},
    "mlx": {"model": "a/b", "fine_tune_type": "lora", "num_layers": -1, "data": "./rows"},
}


def convert(tool: str, **changes: Any) -> Recipe:
    values = {**MINIMAL[tool], **changes}
    conversion = convert_config(Config(Path("x.yaml"), values), tool)
    assert conversion.to_accept() == []
    return parse_recipe(conversion.text, Path("recipe.yaml"))
