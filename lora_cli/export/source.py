"""What is exported, how, and what was found out about it: the words that all formats share.

The module of a format has four functions:

    refuse(subject, options)              -> None             before any weight is read: LoraError for what cannot be
    write(subject, out, options)          -> None             the file or folder `out`, which is not there yet
    prove(subject, out, options)          -> Iterator[Check]  read back, and run in the real runtime
    usage(subject, out, options)          -> list[str]        lines that tell how to use what is at `out`
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from transformers import PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.data.class_labels import ClassLabels
from lora_cli.recipe.tasks import TaskName


class ExportSource(NamedTuple):
    """A model, or an adapter with its base."""

    name: str  # the user's
    model: Path  # a folder that plain transformers loads: safetensors and config; an adapter's base, or merged with it
    config: PretrainedConfig  # of that folder
    tokenizer: PreTrainedTokenizerBase
    task: TaskName
    labels: ClassLabels | None
    prompts: tuple[tuple[int, ...], ...]  # token ids that the runtimes are to go on from
    adapter: Path | None = None  # a folder as PEFT writes it, for the formats that take adapters
    trust_remote_code: bool = False


class ExportOptions(NamedTuple):
    """What the command line says of the form."""

    quantize: str | None  # None: the format's own choice
    over: Path | None  # for a GGUF adapter: the GGUF file of its base
    runtime: bool  # prove it in the real runtime too


class Continuation(NamedTuple):
    """What a model makes of a prompt, taking the most likely token each time."""

    tokens: tuple[int, ...]  # without the one that it stopped at
    stopped: bool  # by a token that ends an answer, not at the limit


class Check(NamedTuple):
    """One thing that was held against the original."""

    name: str
    passed: bool
    found: str  # one line, for people
    figures: Mapping[str, float | int | str] = {}  # the same for programs
