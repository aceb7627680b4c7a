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
    """The model in `folder` as it is found; `fields` are those of the record."""
    source = ModelSource(str(folder))
    words: Any = tokenizer  # tests of weights need none
    return BaseCheckpoint(str(folder), source, config or load_config(source), words, **{"task": "causal-lm", **fields})


def load(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    quantization: QuantizationSpec | None = None,
    **fields: Any,
) -> PreTrainedModel:
    """The frozen model in `folder`, on the CPU."""
    found = checkpoint(folder, **fields).load(CPU, dtype=dtype, attention=attention, quantization=quantization)
    return found.model


def skeleton_of(config: PretrainedConfig, **fields: Any) -> PreTrainedModel:
    """The modules of a model of `config`, on the meta device."""
    return checkpoint(Path("nowhere"), config=config, **fields).skeleton()
