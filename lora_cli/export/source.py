"""Records that all export formats share: the model or adapter to export, the options, and the results of checks.

The module of an export format has five functions:

    check_supported(source, options) -> None             raise a LoraError if unsupported, before any weight is read
    size(source, options)            -> int              bytes that `write` writes, about
    write(source, out, options)      -> None             write the file or folder `out`, which does not exist yet
    verify(source, out, options)     -> Iterator[Check]  read `out` back, and run it in its runtime
    usage(source, out, options)      -> list[str]        commands or lines of Python that use the result at `out`
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from transformers import PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.data.class_labels import ClassLabels
from lora_cli.model.adapter_files import AdapterFiles
from lora_cli.model.base_model import BaseCheckpoint
from lora_cli.model.model_source import ModelSource
from lora_cli.recipe.tasks import TaskName
from lora_cli.run.disk_space import written_bytes


class ExportSource(NamedTuple):
    """A model, or an adapter with its base."""

    name: str  # the user's name for it
    base: BaseCheckpoint  # in a local folder of safetensors: the model, or the base of `adapter`
    prompts: tuple[tuple[int, ...], ...]  # token ids, on which export and original are compared; may be empty
    adapter: AdapterFiles | None = None  # for formats that store the adapter alone

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
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return sum(parameter.numel() for parameter in self.base.skeleton().parameters())

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapter's folder; 0 without an adapter."""
        return written_bytes(self.adapter.folder) if self.adapter is not None else 0

    @property
    def trust_remote_code(self) -> bool:
        """Whether Python code of the model's repository may run."""
        return self.base.source.trust_remote_code

    def at(self, folder: Path) -> "ExportSource":
        """Return the same source with the model in another folder (merged or exported), and no adapter."""
        return self._replace(base=self.base.at(ModelSource(str(folder), self.trust_remote_code)), adapter=None)


class ExportOptions(NamedTuple):
    """Options of the command line that apply to the format."""

    quantize: str | None  # None for the format's default
    over: Path | None  # GGUF file of the base, to verify a GGUF adapter with
    runtime: bool  # also run the export in its runtime


class Continuation(NamedTuple):
    """The greedy continuation of a prompt."""

    tokens: tuple[int, ...]  # without the final EOS
    stopped: bool  # by EOS, not by the length limit


class Check(NamedTuple):
    """The result of one comparison with the original, as export.json stores it."""

    name: str
    passed: bool
    found: str  # one line, for the user
    figures: Mapping[str, float | int | str] = {}  # the same facts as numbers, by key
