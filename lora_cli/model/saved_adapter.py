"""A saved adapter, opened: its folder, PEFT config and base checkpoint, checked to belong together.

No weight is read here.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftConfig
from safetensors import safe_open
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.data.class_labels import LABELS_FILE, ClassLabels, LabelKind, load_labels
from lora_cli.errors import LoraError
from lora_cli.model import empty_base
from lora_cli.model.base_model import BaseCheckpoint, head_labels
from lora_cli.model.load_adapter import PREFIX
from lora_cli.model.model_source import ModelSource, find_model, fingerprint, load_config, load_tokenizer, local_folder
from lora_cli.model.save_adapter import ADAPTER_WEIGHTS
from lora_cli.model.tasks import TASKS
from lora_cli.model.trained_on import TrainedOn, read_trained_on
from lora_cli.recipe.schema import ModelSpec
from lora_cli.recipe.tasks import TaskName
from lora_cli.run import console

CPU = torch.device("cpu")


class SavedAdapter(NamedTuple):
    """An adapter folder and its base."""

    folder: Path
    config: PeftConfig
    base: BaseCheckpoint  # with the adapter's tokenizer, labels, vocabulary, and the dtype of its training
    trained_on: TrainedOn | None  # None for adapters of other tools

    @property
    def method(self) -> str:
        """PEFT's name of the method, in words: `lora`, `prefix tuning`."""
        return method_name(self.config)


def method_name(config: PeftConfig) -> str:
    """Return PEFT's name of the method, in words: `lora`, `prefix tuning`."""
    return str(config.peft_type.value).lower().replace("_", " ")


def open_saved_adapter(
    folder: Path, config: PeftConfig, *, base_path: str | None, trust_remote_code: bool
) -> SavedAdapter:
    """Find the base of the adapter in `folder`, or use `base_path` in its place; read its config and tokenizer.

    Raises:
        LoraError: the base cannot be found, or the adapter's tokenizer belongs to another model.
    """
    tasks: dict[str, TaskName] = {task.task_type: name for name, task in TASKS.items()}
    trained_on = read_trained_on(folder)
    path = base_path or config.base_model_name_or_path
    if not path:
        raise LoraError(f"{folder}: adapter_config.json names no base", hint="name it with --base")
    revision = None if base_path else config.revision or (trained_on.commit if trained_on else None)
    # Merging needs unpacked weights; they have the same values as the packed ones.
    spec = ModelSpec(path=path, revision=revision, gguf="dequantized", trust_remote_code=trust_remote_code)
    dtype = getattr(torch, trained_on.dtype) if trained_on else torch.bfloat16
    source = find_model(spec, dtype=dtype, device=CPU, info=console.info)
    base_config = load_config(source)
    own_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(source._replace(path=str(folder)) if own_tokenizer else source)
    if own_tokenizer:
        _check_tokenizer(folder, tokenizer, path, source)
    base = BaseCheckpoint(
        name=path,
        source=source,
        config=base_config,
        tokenizer=tokenizer,
        task=tasks.get(str(config.task_type or ""), "causal-lm"),
        labels=load_labels(folder),  # else read off the head below
        dtype=dtype,
        pad_id=tokenizer.pad_token_id,
    )
    if base.labels is None and TASKS[base.task].is_classification:
        base = base._replace(labels=labels_of_head(folder, base))
        assert base.labels is not None
        console.info(f"{folder} has no {LABELS_FILE}: its head has {base.labels.describe()}")
    skeleton = base.skeleton()
    # A tokenizer may have more tokens than the base has embeddings; new rows are added only where they are trained.
    has_new_tokens = max(trained_tokens(config), default=-1) >= skeleton.get_input_embeddings().weight.shape[0]
    rows = max(empty_base.embedding_rows(folder, skeleton), len(tokenizer) if has_new_tokens else 0)
    return SavedAdapter(folder, config, base._replace(vocabulary=rows), trained_on)


def labels_of_head(folder: Path, base: BaseCheckpoint) -> ClassLabels:
    """Return labels for the classification head in the adapter file, which has no names: LABEL_0, as transformers does.

    If the base's own head is of the same size, its names are kept, as transformers does too. The names of `base` are
    not used.

    Raises:
        LoraError: the file contains no head.
    """
    two, three = (
        {
            name: tuple(parameter.shape)
            for name, parameter in base._replace(labels=ClassLabels("single", names)).skeleton().named_parameters()
        }
        for names in (("0", "1"), ("0", "1", "2"))
    )
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        keys = {key.replace(".modules_to_save.", "."): key for key in file.keys()}  # noqa: SIM118 - not a dictionary
        for name in two:
            if two[name] != three[name] and PREFIX + name in keys:
                size = int(file.get_slice(keys[PREFIX + name]).get_shape()[0])
                break
        else:
            raise LoraError(
                f"{folder}: its file has no classification head", hint="save it with modules_to_save: the head's name"
            )
    if size == 1:
        return ClassLabels("regression", ("value",))
    kind: LabelKind = "multi" if base.config.problem_type == "multi_label_classification" else "single"
    own = head_labels(base.config, base.task)
    return ClassLabels(kind, own if len(own) == size else tuple(f"LABEL_{number}" for number in range(size)))


def _check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, path: str, source: ModelSource) -> None:
    """Raise if adapter and base disagree on the id of a token; the adapter's tokenizer may have more tokens."""
    base_folder = local_folder(source, fetch=True)
    if not any((base_folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return
    ids = tokenizer.get_vocab()
    for token, number in load_tokenizer(source).get_vocab().items():
        if ids.get(token, number) != number:
            raise LoraError(
                f"{folder}: its tokenizer does not fit {path}: {token!r} is token {ids[token]:,}, not {number:,}",
                hint="name the base that the adapter was trained on with --base, or correct the adapter's tokenizer",
            )


def trained_tokens(config: PeftConfig) -> list[int]:
    """Return the ids of the tokens whose single embeddings the adapter contains, sorted."""
    indices = getattr(config, "trainable_token_indices", None) or []
    return sorted({token for ids in indices.values() for token in ids} if isinstance(indices, dict) else indices)


def check_same_base(adapter: SavedAdapter, *, allowed: bool) -> None:
    """Compare the base's weights with those that the adapter was trained on; if `allowed`, only print a note.

    Raises:
        LoraError: the weights differ, and `allowed` is False.
    """
    trained_on, name = adapter.trained_on, adapter.base.name
    if trained_on is None or (own_fingerprint := fingerprint(adapter.base.source)) == trained_on.fingerprint:
        return
    trained_name = adapter.config.base_model_name_or_path
    if allowed:
        console.info(
            f"note: the weights of {name} differ from those of {trained_name}, which this adapter was trained on; "
            "corrections that it learned there (of quantization errors, for example) do not apply here"
        )
        return
    raise LoraError(
        f"{name} (fingerprint {own_fingerprint[:12]}) is not the base that {adapter.folder} was trained on: "
        f"{trained_name}, {trained_on.architecture} (fingerprint {trained_on.fingerprint[:12]})",
        hint="name the right one with --base; if this is the same model in another form, add --other-base",
    )
