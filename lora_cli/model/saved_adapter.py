"""A saved adapter with its base: the adapter's files and the base checkpoint, checked to belong together.

No weight is read here.
"""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.data.class_labels import LABELS_FILE, ClassLabels, LabelKind
from lora_cli.errors import LoraError
from lora_cli.model import empty_base
from lora_cli.model.adapter_files import PREFIX, AdapterFiles
from lora_cli.model.base_model import BaseCheckpoint, head_labels
from lora_cli.model.model_path import check_model_path
from lora_cli.model.model_source import ModelSource, find_model, fingerprint, load_config, load_tokenizer, local_folder
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import ModelSpec
from lora_cli.recipe.tasks import TaskName
from lora_cli.run import console
from lora_cli.run.folder import recipe_of_adapter
from lora_cli.run.redact import redact_path

CPU = torch.device("cpu")


class SavedAdapter(NamedTuple):
    """An adapter and its base."""

    files: AdapterFiles
    base: BaseCheckpoint  # with the adapter's tokenizer, labels, vocabulary, and the dtype of its training

    @property
    def folder(self) -> Path:
        """Folder of the adapter."""
        return self.files.folder


def base_path(adapter: AdapterFiles) -> str | None:
    """Return the path or hub id of the adapter's base, by its configuration; None if that names none.

    The configuration of a base with an absolute path has only the last part of it, because adapters are published. The
    recipe of the run, which stays on this machine, has the whole.
    """
    name: str | None = adapter.config.base_model_name_or_path
    recipe_file = recipe_of_adapter(adapter.folder)
    if not name or recipe_file is None:
        return name
    try:
        path = load_recipe(recipe_file).model.path
    except LoraError:
        return name  # a recipe of another version; if the name finds no model, that is the error
    return path if redact_path(path) == name else name


def find_base(adapter: AdapterFiles, *, path: str | None, trust_remote_code: bool) -> SavedAdapter:
    """Find the base of an adapter, or use `path` in its place; read its config and tokenizer.

    Raises:
        LoraError: the base cannot be found, or the adapter's tokenizer belongs to another model.
    """
    folder, config, trained_on = adapter.folder, adapter.config, adapter.trained_on
    tasks: dict[str, TaskName] = {task.task_type: name for name, task in TASKS.items()}
    if path is not None:
        check_model_path(path)
    found_path = path or base_path(adapter)
    if not found_path:
        raise LoraError(f"{folder}: adapter_config.json names no base", hint="name it with --base")
    revision = None if path else config.revision or (trained_on.commit if trained_on else None)
    # Merging needs unpacked weights; they have the same values as the packed ones.
    spec = ModelSpec(path=found_path, revision=revision, gguf="dequantized", trust_remote_code=trust_remote_code)
    dtype = getattr(torch, trained_on.dtype) if trained_on else torch.bfloat16
    try:
        source = find_model(spec, dtype=dtype, device=CPU, info=console.info)
        base_config = load_config(source)
    except LoraError as error:
        if path is not None or os.path.exists(found_path):  # False for a name that is too long
            raise
        # The name of a local base is its last part, if training read it from an absolute path.
        found = error.message.removeprefix("model.path: ")
        raise LoraError(
            f"{folder} names its base {found_path}: {found}", hint=f"name it with --base PATH; {error.hint}"
        ) from None
    own_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(source._replace(path=str(folder)) if own_tokenizer else source)
    if own_tokenizer:
        _check_tokenizer(folder, tokenizer, found_path, source)
    base = BaseCheckpoint(
        name=found_path,
        source=source,
        config=base_config,
        tokenizer=tokenizer,
        task=tasks.get(str(config.task_type or ""), "causal-lm"),
        labels=adapter.labels,  # else read off the head below
        dtype=dtype,
        pad_id=tokenizer.pad_token_id,
    )
    if base.labels is None and TASKS[base.task].is_classification:
        base = base._replace(labels=labels_of_head(adapter, base))
        assert base.labels is not None
        console.info(f"{folder} has no {LABELS_FILE}: its head has {base.labels.describe()}")
    skeleton = base.skeleton()
    # A tokenizer may have more tokens than the base has embeddings; new rows are added only where they are trained.
    has_new_tokens = max(trained_tokens(config), default=-1) >= skeleton.get_input_embeddings().weight.shape[0]
    rows = max(empty_base.embedding_rows(adapter, skeleton), len(tokenizer) if has_new_tokens else 0)
    return SavedAdapter(adapter, base._replace(vocabulary=rows))


def labels_of_head(adapter: AdapterFiles, base: BaseCheckpoint) -> ClassLabels:
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
    shapes = {key.replace(".modules_to_save.", "."): stored.shape for key, stored in adapter.tensors.items()}
    heads = (shapes[PREFIX + name] for name in two if two[name] != three[name] and PREFIX + name in shapes)
    size = next((shape[0] for shape in heads if shape), 0)
    if not size:
        raise LoraError(
            f"{adapter.folder}: its file has no classification head",
            hint="save it with modules_to_save: the head's name",
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


def check_same_base(adapter: AdapterFiles, base: BaseCheckpoint, *, allowed: bool) -> None:
    """Compare the base's weights with those that the adapter was trained on; if `allowed`, only print a note.

    The files of a hub model must be in the cache.

    Raises:
        LoraError: the weights differ, and `allowed` is False.
    """
    trained_on, name = adapter.trained_on, base.name
    if trained_on is None or (own_fingerprint := fingerprint(base.source)) == trained_on.fingerprint:
        return
    trained_name = adapter.config.base_model_name_or_path
    if allowed:
        console.info(
            f"note: the weights of {name} differ from those of {trained_name}, which {adapter.folder} was trained on; "
            "corrections that it learned there (of quantization errors, for example) do not apply here"
        )
        return
    raise LoraError(
        f"{name} (fingerprint {own_fingerprint[:12]}) is not the base that {adapter.folder} was trained on: "
        f"{trained_name}, {trained_on.architecture} (fingerprint {trained_on.fingerprint[:12]})",
        hint="name the right one with --base; if this is the same model in another form, add --other-base",
    )
