"""An adapter folder and the base that it goes on: found, read, and refused where they do not belong together."""

from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftConfig
from transformers import PretrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.data import class_labels as labelling
from lora_cli.data.class_labels import ClassLabels
from lora_cli.errors import LoraError
from lora_cli.model import base_model, empty_base, trained_on
from lora_cli.model.tasks import TASKS
from lora_cli.model.trained_on import TrainedOn
from lora_cli.recipe.schema import ModelSpec
from lora_cli.recipe.tasks import TaskName
from lora_cli.run import console

CPU = torch.device("cpu")


class SavedAdapter(NamedTuple):
    """What an adapter folder says of itself, and its base; no weight is read yet."""

    folder: Path
    config: PeftConfig
    task: TaskName
    labels: ClassLabels | None
    trained_on: TrainedOn | None
    base: str  # the user's name for it
    source: base_model.ModelSource
    base_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int  # embeddings that base and adapter have together, where the adapter brings some

    @property
    def dtype(self) -> torch.dtype:
        """That the base was loaded in for training."""
        found: torch.dtype = getattr(torch, self.trained_on.dtype) if self.trained_on else torch.bfloat16
        return found

    @property
    def method(self) -> str:
        """PEFT's name of the adapter's kind."""
        return str(self.config.peft_type.value).lower().replace("_", " ")

    def skeleton(self) -> PreTrainedModel:
        """The base's modules on the meta device, with the adapter's labels and vocabulary."""
        return base_model.skeleton(
            base_model.load_config(self.source),
            trust_remote_code=bool(self.source.options["trust_remote_code"]),
            task=self.task,
            labels=self.labels,
            vocabulary=self.vocabulary,
        )


def read_config(folder: Path) -> PeftConfig:
    """The adapter's configuration.

    Raises:
        LoraError: `folder` is no adapter.
    """
    if (folder / "adapter_config.json").is_file():
        return PeftConfig.from_pretrained(str(folder))
    hint = "give the adapter folder of a run: runs/NAME/adapter"
    if (folder / "adapter" / "adapter_config.json").is_file():
        hint = f"did you mean {folder / 'adapter'}?"
    raise LoraError(f"{folder} has no adapter_config.json", hint=hint)


def open_saved_adapter(
    folder: Path, config: PeftConfig, *, base_path: str | None, trust_remote_code: bool
) -> SavedAdapter:
    """Find the base of the adapter in `folder`, or `base_path` in its stead, and read config and tokenizer.

    Raises:
        LoraError: the base is not to be had.
    """
    known: dict[str, TaskName] = {task.peft: name for name, task in TASKS.items()}
    task = known.get(str(config.task_type or ""), "causal-lm")
    origin, labels = trained_on.read_trained_on(folder), labelling.load_labels(folder)
    path = base_path or str(config.base_model_name_or_path)
    revision = None if base_path else config.revision or (origin.commit if origin else None)
    # Folding needs whole weights: the numbers are the same as the packed ones.
    spec = ModelSpec(path=path, revision=revision, gguf="dequantized", trust_remote_code=trust_remote_code)
    dtype = getattr(torch, origin.dtype) if origin else torch.bfloat16
    source = base_model.find_model(spec, dtype=dtype, device=CPU, info=console.info)
    base_config = base_model.load_config(source)
    own_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = base_model.load_tokenizer(source._replace(where=str(folder)) if own_tokenizer else source)
    if own_tokenizer:
        _refuse_other_tokenizer(folder, tokenizer, path, source)
    found = SavedAdapter(folder, config, task, labels, origin, path, source, base_config, tokenizer, 0)
    skeleton = found.skeleton()
    rows = empty_base.embedding_rows(folder, skeleton)
    # A tokenizer may well know more tokens than the base has embeddings for, which is no reason to make new ones.
    taught_new = max(trained_tokens(config), default=-1) >= skeleton.get_input_embeddings().weight.shape[0]
    return found._replace(vocabulary=max(rows, len(tokenizer) if taught_new else 0))


def _refuse_other_tokenizer(
    folder: Path, tokenizer: PreTrainedTokenizerBase, path: str, source: base_model.ModelSource
) -> None:
    """The adapter's tokenizer may know more than the base's, but what both know has to be the same token."""
    where = base_model.local_folder(source, fetch=True)
    if not any((where / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return
    own = tokenizer.get_vocab()
    for token, number in base_model.load_tokenizer(source).get_vocab().items():
        if own.get(token, number) != number:
            raise LoraError(
                f"{folder}: its tokenizer is none of {path}: {token!r} is token {own[token]:,}, not {number:,}",
                hint="name the base that the adapter was trained on with --base, or mend the adapter's tokenizer",
            )


def trained_tokens(config: PeftConfig) -> list[int]:
    """The tokens whose single embeddings the adapter holds."""
    found = getattr(config, "trainable_token_indices", None) or []
    return sorted({token for ids in found.values() for token in ids} if isinstance(found, dict) else found)


def check_same_base(subject: SavedAdapter, *, allowed: bool) -> None:
    """Hold the base's weights against those that the adapter says it was trained on; others are told of if `allowed`.

    Raises:
        LoraError: they are others.
    """
    trained_on = subject.trained_on
    if trained_on is None or (here := base_model.fingerprint(subject.source)) == trained_on.fingerprint:
        return
    if allowed:
        trained = subject.config.base_model_name_or_path
        console.info(
            f"note: {subject.base} has other weights than {trained}, which the update was trained over: "
            "what it mends in those, such as their quantisation, is not in these"
        )
        return
    meant = f"{subject.config.base_model_name_or_path}, {trained_on.architecture}"
    raise LoraError(
        f"{subject.base} (fingerprint {here[:12]}) is not the base that {subject.folder} was trained on: "
        f"{meant} (fingerprint {trained_on.fingerprint[:12]})",
        hint="name that one with --base; if this one is the same model in another form, add --other-base",
    )
