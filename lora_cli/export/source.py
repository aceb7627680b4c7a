"""The records that all export formats share: the model or adapter to export, the options, and the results of checks.

The module of a format has four functions:

    refuse(source, options)              -> None             before any weight is read: LoraError for what cannot be
    write(source, out, options)          -> None             the file or folder `out`, which does not exist yet
    prove(source, out, options)          -> Iterator[Check]  read back, and run in the real runtime
    usage(source, out, options)          -> list[str]        lines that tell how to use the result at `out`
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from transformers import PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.data.class_labels import ClassLabels
from lora_cli.model.base_model import BaseCheckpoint
from lora_cli.model.model_source import ModelSource
from lora_cli.recipe.tasks import TaskName


class ExportSource(NamedTuple):
    """A model, or an adapter with its base."""

    name: str  # the user's name for it
    base: BaseCheckpoint  # in a local folder of safetensors: the model, or the base of `adapter`
    prompts: tuple[tuple[int, ...], ...]  # token ids that the runtimes continue, to be compared
    adapter: Path | None = None  # a PEFT folder, for the formats that take adapters

    @property
    def folder(self) -> Path:
        """Folder of the model: safetensors and config, as transformers loads it."""
        return Path(self.base.source.path)

    @property
    def config(self) -> PretrainedConfig:
        """Configuration of the model, with the adapter's labels and vocabulary."""
        return self.base.config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the adapter, else of the model."""
        return self.base.tokenizer

    @property
    def task(self) -> TaskName:
        """Task of the model."""
        return self.base.task

    @property
    def labels(self) -> ClassLabels | None:
        """Labels of a classification head."""
        return self.base.labels

    @property
    def trust_remote_code(self) -> bool:
        """Whether the user trusts the Python code of the model's repository."""
        return self.base.source.trust_remote_code

    def at(self, folder: Path) -> "ExportSource":
        """Return the same source with the model in another folder, and no adapter: what was merged or written."""
        return self._replace(base=self.base.at(ModelSource(str(folder), self.trust_remote_code)), adapter=None)


class ExportOptions(NamedTuple):
    """Options of the command line that concern the format."""

    quantize: str | None  # None: the format's default
    over: Path | None  # for a GGUF adapter: the GGUF file of its base
    runtime: bool  # run the checks in the real runtime too


class Continuation(NamedTuple):
    """The greedy continuation of a prompt."""

    tokens: tuple[int, ...]  # without the token that ended it
    stopped: bool  # by a token that ends an answer, not at the limit


class Check(NamedTuple):
    """The result of one comparison with the original."""

    name: str
    passed: bool
    found: str  # one line, for people
    figures: Mapping[str, float | int | str] = {}  # the same for programs
