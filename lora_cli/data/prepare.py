"""Prepare the train and eval datasets of a recipe: tokenize the sources, split, weight, and count every row."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_cli.data import class_labels
from lora_cli.data.cache import EncodedSource, encode_source
from lora_cli.data.chat_templates import check_template_variables
from lora_cli.data.class_labels import ClassLabels, SourceLabels
from lora_cli.data.dataset import EncodedDataset
from lora_cli.data.encode_classes import make_encoder
from lora_cli.data.examples import check_documents
from lora_cli.data.ledger import Entry, Ledger, Totals, check_dropped_share
from lora_cli.data.sources import eval_sources, train_sources
from lora_cli.data.split import Index, apply_weight, held_out_masks
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from lora_cli.recipe.tasks import TaskName

SUPERVISED_UNITS = {
    "causal-lm": "supervised",
    "seq-cls": "labels",
    "token-cls": "labels",
    "seq2seq-lm": "target tokens",
}


class PreparedData(NamedTuple):
    """The datasets of a run."""

    train: EncodedDataset
    eval: EncodedDataset | None
    ledger: Ledger
    labels: ClassLabels | None = None  # of a classification task

    @property
    def fingerprint(self) -> str:
        """A hash of all ids and labels of both splits in order."""
        parts = [self.train.fingerprint, self.eval.fingerprint if self.eval else ""]
        if self.labels:
            # The text that earlier versions hashed, so that their runs can be resumed.
            parts.append(f"Labels(kind={self.labels.kind!r}, names={self.labels.names!r})")
        return hashlib.blake2b(" ".join(parts).encode(), digest_size=16).hexdigest()


def prepare_data(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    cache: Path,
    info: Callable[[str], None],
    task: TaskName = "causal-lm",
    base_labels: Sequence[str] = (),
    train_key: str = "data.train",
) -> PreparedData:
    """Read, check, encode and split the rows of a recipe.

    Args:
        spec: the recipe's data section.
        tokenizer: of the base model.
        seed: selects the held-out rows, and the rows that a fractional weight includes.
        cache: folder for encoded rows, which later calls with the same content, tokenizer and options reuse.
        info: prints a progress message.
        task: the task of the model.
        base_labels: label names of the base model's classification head, if it has one.
        train_key: name of `spec.train` in messages: its recipe key or file name.

    Raises:
        LoraError: a source, the chat template or the labels cannot be used, no rows are left, or more rows are bad,
            overlong or dropped than the recipe allows.
    """
    check_template_variables(spec, tokenizer)
    encoder = make_encoder(task, spec, tokenizer)
    found = [train_sources(spec), eval_sources(spec)]
    check_documents([*found[0], *found[1]], spec, task)
    train, separate_eval = (
        [encode_source(source, spec, encoder, cache=cache, info=info) for source in sources] for sources in found
    )
    share = spec.eval if isinstance(spec.eval, float) else 0.0
    # The chunks of a document are held out together.
    keys = [item.rows.document_keys() if item.tally.added else item.rows.keys for item in train]
    held_out = held_out_masks(keys, share=share, seed=seed)
    train_parts, entries = [], []
    for number, (item, mask) in enumerate(zip(train, held_out, strict=True)):
        weight = item.source.spec.weight
        index = apply_weight(np.flatnonzero(~mask), weight, seed=seed, split="train", number=number)
        train_parts.append((item.rows, index))
        entries.append(_entry(item, "train", index, held_out=int(mask.sum())))
    eval_parts = [(item.rows, np.flatnonzero(mask)) for item, mask in zip(train, held_out, strict=True)]
    for number, item in enumerate(separate_eval):
        weight = item.source.spec.weight
        index = apply_weight(np.arange(len(item.rows)), weight, seed=seed, split="eval", number=number)
        eval_parts.append((item.rows, index))
        entries.append(_entry(item, "eval", index, held_out=0))
    check_dropped_share(entries, limit=_max_dropped_share(spec))
    labels, mappers = None, []
    if task in ("seq-cls", "token-cls"):
        by_source = [_source_labels(item) for item in [*train, *separate_eval]]
        in_train, in_eval = by_source[: len(train)], by_source[len(train) :]
        labels = class_labels.resolve_labels(spec.labels, in_train, in_eval, base=base_labels)
        for note in class_labels.label_notes(labels, by_source):
            info(note)
        mappers = [class_labels.label_mapper(labels, source) for source in by_source]
    train_set, eval_set = EncodedDataset(train_parts, mappers[: len(train)]), EncodedDataset(eval_parts, mappers)
    for split, name in ((train_set, train_key), (eval_set, "data.eval")):
        if not len(split) and (split is train_set or separate_eval):
            raise LoraError(f"{name}: no rows are left", hint="check data.on_bad_row, data.overlong and the weights")
    if not len(eval_set) and spec.eval is not None:
        info("data.eval: the data has only one row, so none is held out")
    leaked = int(np.isin(eval_set.keys, train_set.keys).sum()) if separate_eval else 0
    ledger = Ledger(
        tuple(entries),
        Totals.of(train_set.lengths, train_set.supervised),
        Totals.of(eval_set.lengths, eval_set.supervised) if len(eval_set) else None,
        leaked,
        SUPERVISED_UNITS[task],
        labels.describe() if labels else None,
    )
    ledger.check()
    return PreparedData(train_set, eval_set if len(eval_set) else None, ledger, labels)


def _source_labels(item: EncodedSource) -> SourceLabels:
    stored = item.tally.labels
    if stored is None:
        raise LoraError(f"{item.source.name}: no rows are left", hint="check data.on_bad_row and data.overlong")
    return SourceLabels(**stored)


def _max_dropped_share(spec: DataSpec) -> float:
    if spec.max_loss is not None:
        return spec.max_loss
    return 0.0 if spec.overlong in ("error", "split") and spec.on_bad_row == "error" else 0.1


def _entry(item: EncodedSource, split: str, index: Index, *, held_out: int) -> Entry:
    available = item.tally.kept - held_out
    left_out = available - len(np.unique(index))
    return Entry(
        source=item.source.name,
        split="train" if split == "train" else "eval",
        content=item.content,
        tally=item.tally,
        held_out=held_out,
        left_out=left_out,
        repeated=len(index) - (available - left_out),
    )
