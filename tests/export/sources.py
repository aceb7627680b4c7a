"""Tiny models as sources of an export: folders with random weights, config and a real tokenizer."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_cli.data.class_labels import ClassLabels
from lora_cli.export.source import ExportOptions, ExportSource
from lora_cli.model.base_model import BaseCheckpoint
from lora_cli.model.model_source import ModelSource
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.tasks import TaskName
from tests.inputs.tiny_tokenizers import CHATML, build
from tests.model import zoo
from tests.model.families import FAMILIES, LABELS, OWN_NAMES

# Options without which llama.cpp computes something else than transformers.
LLAMA_CPP_OPTIONS: dict[str, dict[str, Any]] = {
    "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 16, "sliding_window": 512},
    "gemma3": {"tie_word_embeddings": True, "num_hidden_layers": 6, "sliding_window": 512},
    "mistral": {"sliding_window": None},
    "smollm3": {"num_hidden_layers": 4},
}


def tokenizer() -> PreTrainedTokenizerBase:
    """Return a byte-level BPE tokenizer with a ChatML template."""
    return build("<|im_start|>", "<|endoftext|>", eos="<|im_end|>", template=CHATML)


def tiny_model(family: str, *, vocabulary: int, **options: Any) -> PreTrainedModel:
    """Return a random model whose norm weights are not all ones."""
    entry = FAMILIES[family]
    common = {key: value for key, value in zoo.COMMON.items() if not _has_own_name(key, entry.kind)}
    specific = {"vocab_size": vocabulary, **entry.options, **LLAMA_CPP_OPTIONS.get(family, {}), **options}
    torch.manual_seed(0)
    config = AutoConfig.for_model(entry.kind, **{**common, **specific})
    model: PreTrainedModel = TASKS[entry.task].auto_class.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, parameter.mean().item(), 0.2)
    return model.requires_grad_(False).eval()


def _has_own_name(key: str, kind: str) -> bool:
    """Return whether the config class has another name for the option `key` of `zoo.COMMON`."""
    return kind in OWN_NAMES and key in ("num_key_value_heads", "intermediate_size")


def tiny_source(family: str, folder: Path, **options: Any) -> ExportSource:
    """Save a tiny model of `family` and its tokenizer to `folder`, and return them as an export source."""
    saved = options.pop("tokenizer", None) or tokenizer()
    rows = options.pop("vocabulary", len(saved))
    model = tiny_model(family, vocabulary=rows, eos_token_id=saved.eos_token_id, pad_token_id=None, **options)
    model.generation_config.eos_token_id = saved.eos_token_id
    model.save_pretrained(folder)
    saved.save_pretrained(folder)
    task = FAMILIES[family].task
    prompts = tuple(tuple(range(5 + 3 * n, 17 + 5 * n)) for n in range(2)) if task == "causal-lm" else ()
    labels = LABELS if TASKS[task].is_classification else None
    return export_source(family, folder, saved, task=task, labels=labels, prompts=prompts)


def export_source(
    name: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: PretrainedConfig | None = None,
    task: TaskName = "causal-lm",
    labels: ClassLabels | None = None,
    prompts: tuple[tuple[int, ...], ...] = (),
) -> ExportSource:
    """Return the model in `folder` as `lora export` opens it."""
    config = config or AutoConfig.from_pretrained(folder)
    base = BaseCheckpoint(name, ModelSource(str(folder)), config, tokenizer, task, labels)
    return ExportSource(name, base, prompts)


def options(quantize: str | None = None, *, over: Path | None = None, runtime: bool = True) -> ExportOptions:
    """Return the options of the command line."""
    return ExportOptions(quantize, over, runtime)
