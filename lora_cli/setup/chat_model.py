"""Load what `lora chat` talks to: a base with its adapters or a model, and how each was prompted in training."""

from collections.abc import Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jinja2 import TemplateSyntaxError
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.data.check_template import checked_template
from lora_cli.data.template_variables import with_date
from lora_cli.errors import LoraError
from lora_cli.model.adapter_files import AdapterFiles, open_adapter
from lora_cli.model.base_model import BaseCheckpoint
from lora_cli.model.device import pick_device, pick_dtype
from lora_cli.model.fp32_weights import upcast_trainable_params
from lora_cli.model.load_adapter import NamedAdapters, load_adapters
from lora_cli.model.model_source import find_model, load_config, load_tokenizer
from lora_cli.model.saved_adapter import find_base
from lora_cli.recipe.schema import ModelSpec, QuantizationSpec
from lora_cli.run import console
from lora_cli.setup.adapter_folders import find_chat_adapters
from lora_cli.setup.check_bases import check_bases
from lora_cli.training import cpu

PromptKind = Literal["chat", "text"]
PROMPT_KINDS: dict[str, PromptKind] = {"chat": "chat", "text": "text"}
DESCRIPTIONS = {
    "chat": "prompts use the chat template",
    "text": "each line is the whole prompt, without chat template",
}


class Prompting(NamedTuple):
    """How an adapter is prompted."""

    kind: PromptKind
    template: str | None = None  # chat template of its folder; None for that of the tokenizer


class LoadedChat(NamedTuple):
    """A base, its adapters, and how they are prompted."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    adapters: NamedAdapters | None  # None for a model without adapters
    prompting: dict[str, Prompting]  # of each adapter, by its name
    notes: list[str]  # for the user, on the prompts

    @property
    def kinds(self) -> set[PromptKind]:
        """The kinds of prompts of all adapters."""
        return {prompting.kind for prompting in self.prompting.values()}


def load_chat(target: Path, adapters: Sequence[str], base_path: str | None, *, other_base: bool = False) -> LoadedChat:
    """Load the base of the first adapter with all adapters on it, or a model without adapters.

    Args:
        target: a run, adapter or model folder, or a .gguf file.
        adapters: further adapters of the same base, `DIR` or `NAME=DIR`.
        base_path: base in place of the one that the adapter names.
        other_base: whether the base may have other weights than in training.

    Raises:
        LoraError: an adapter or model does not exist, does not fit its base, or is not a language model.
    """
    device = pick_device()
    if device.type == "cpu":
        cpu.set_up_cpu()
    opened = {name: open_adapter(folder) for name, folder in find_chat_adapters(target, adapters).items()}
    if not opened:
        base = _open_model(target, device)
        notes = [] if base.tokenizer.chat_template else [f"no chat template: {DESCRIPTIONS['text']}"]
        return LoadedChat(base.load(device).model, base.tokenizer, None, {}, notes)
    first = next(iter(opened.values()))
    base = find_base(first, path=base_path, trust_remote_code=False).base
    if base.task != "causal-lm":
        raise LoraError(f"{first.folder}: a model for {base.task} does not chat", hint="measure it with lora eval")
    prompting, notes = {}, []
    for name, adapter in opened.items():
        prompting[name], note = _prompting(name, adapter, base.tokenizer)
        notes += note
    trained_on = first.trained_on
    section = trained_on.quantization if trained_on else None
    quantization = QuantizationSpec.model_validate(section) if section else None
    dtype = pick_dtype("auto", device, quantization) if trained_on is None else base.dtype
    with check_bases(opened.values(), base, allowed=other_base):
        model = base.load(device, dtype=dtype, quantization=quantization).model
    loaded = load_adapters(model, opened, base=base.name)
    upcast_trainable_params(loaded.model, for_inference=True)
    return LoadedChat(loaded.model, base.tokenizer, loaded, prompting, notes)


def _prompting(name: str, adapter: AdapterFiles, tokenizer: PreTrainedTokenizerBase) -> tuple[Prompting, list[str]]:
    """Return how the adapter was prompted in training, and a note if that is not by the chat template."""
    trained_on, template = adapter.trained_on, adapter.chat_template
    day = trained_on.template_date if trained_on else None
    recorded = trained_on.prompts if trained_on else None
    if template is not None:
        with suppress(TemplateSyntaxError):  # is told when a line is to be rendered
            checked_template(f"the chat template of {adapter.folder}", template, tokenizer.special_tokens_map)
            template = with_date(template, date.fromisoformat(day)) if day else template  # as in training
    if tokenizer.chat_template is None and template is None:
        return Prompting("text"), [f"{name}: no chat template: {DESCRIPTIONS['text']}"]
    match recorded:
        case "chat":
            return Prompting("chat", template), []
        case "text":
            return Prompting("text", template), [
                f"{name} was trained on literal prompts: {DESCRIPTIONS['text']} (/prompt chat switches)"
            ]
        case "both":
            found = "was trained on conversations and literal prompts"
        case _:
            found = "has no record of its training rows"
    return Prompting("chat", template), [f"{name} {found}: {DESCRIPTIONS['chat']} (/prompt text switches)"]


def _open_model(target: Path, device: torch.device) -> BaseCheckpoint:
    dtype = pick_dtype("auto", device)
    source = find_model(ModelSpec(path=str(target)), dtype=dtype, device=device, info=console.info)
    config, tokenizer = load_config(source), load_tokenizer(source)
    return BaseCheckpoint(str(target), source, config, tokenizer, task="causal-lm", dtype=dtype)
