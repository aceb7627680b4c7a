"""Base checkpoints of tiny model folders, most of which have no tokenizer."""

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_cli.model.base_model import BaseCheckpoint
from lora_cli.model.model_source import ModelSource, load_config
from lora_cli.recipe.schema import QuantizationSpec

CPU = torch.device("cpu")


def checkpoint(
    folder: Path,
    *,
    config: PretrainedConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **fields: Any,
) -> BaseCheckpoint:
    """Return the record of the model in `folder`; `fields` override its other fields."""
    source = ModelSource(str(folder))
    optional: Any = tokenizer  # None in tests of weights, which need no tokenizer
    return BaseCheckpoint(
        str(folder), source, config or load_config(source), optional, **{"task": "causal-lm", **fields}
    )


def load(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    quantization: QuantizationSpec | None = None,
    **fields: Any,
) -> PreTrainedModel:
    """Load the model in `folder` on the CPU, frozen."""
    loaded = checkpoint(folder, **fields).load(CPU, dtype=dtype, attention=attention, quantization=quantization)
    return loaded.model


def skeleton_of(config: PretrainedConfig, **fields: Any) -> PreTrainedModel:
    """Build a model of `config` on the meta device, without weights."""
    return checkpoint(Path("nowhere"), config=config, **fields).skeleton()
