"""Tiny models and adapters as `lora export` finds them: folders with weights, config and a real tokenizer."""

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

# What llama.cpp computes in one way alone.
AS_LLAMA_CPP: dict[str, dict[str, Any]] = {
    "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 16, "sliding_window": 512},
    "gemma3": {"tie_word_embeddings": True, "num_hidden_layers": 6, "sliding_window": 512},
    "mistral": {"sliding_window": None},
    "smollm3": {"num_hidden_layers": 4},
}


def tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE with a ChatML template."""
    return build("<|im_start|>", "<|endoftext|>", eos="<|im_end|>", template=CHATML)


def model(family: str, *, vocabulary: int, **options: Any) -> PreTrainedModel:
    """A random model whose norms are not all ones."""
    entry = FAMILIES[family]
    common = {key: value for key, value in zoo.COMMON.items() if not _foreign(key, entry.kind)}
    own = {"vocab_size": vocabulary, **entry.options, **AS_LLAMA_CPP.get(family, {}), **options}
    torch.manual_seed(0)
    config = AutoConfig.for_model(entry.kind, **{**common, **own})
    made: PreTrainedModel = TASKS[entry.task].auto_class.from_config(config)
    for parameter in made.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, parameter.mean().item(), 0.2)
    return made.requires_grad_(False).eval()


def _foreign(key: str, kind: str) -> bool:
    return kind in OWN_NAMES and key in ("num_key_value_heads", "intermediate_size")


def subject(family: str, folder: Path, **options: Any) -> ExportSource:
    """A tiny model of `family` in `folder`."""
    words = options.pop("tokenizer", None) or tokenizer()
    rows = options.pop("vocabulary", len(words))
    made = model(family, vocabulary=rows, eos_token_id=words.eos_token_id, pad_token_id=None, **options)
    made.generation_config.eos_token_id = words.eos_token_id
    made.save_pretrained(folder)
    words.save_pretrained(folder)
    task = FAMILIES[family].task
    prompts = tuple(tuple(range(5 + 3 * n, 17 + 5 * n)) for n in range(2)) if task == "causal-lm" else ()
    labels = LABELS if TASKS[task].is_classification else None
    return export_source(family, folder, words, task=task, labels=labels, prompts=prompts)


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
    """The model in `folder`, as `lora export` opens it."""
    config = config or AutoConfig.from_pretrained(folder)
    base = BaseCheckpoint(name, ModelSource(str(folder)), config, tokenizer, task, labels)
    return ExportSource(name, base, prompts)


def options(quantize: str | None = None, *, over: Path | None = None, runtime: bool = True) -> ExportOptions:
    """What the command line says, in short."""
    return ExportOptions(quantize, over, runtime)
