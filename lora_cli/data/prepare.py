"""Prepare the train and eval datasets of a recipe: tokenize the sources, split, weight, and count every row."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
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
from lora_cli.data.examples import NO_ROWS_HINT, check_documents
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
    placeholders: Sequence[int] = (),
    train_key: str = "data.train",
    model: str = "",
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
        placeholders: token ids that stand for an image, a video or a sound, which no row of text may contain.
        train_key: name of `spec.train` in messages: its recipe key or file name.
        model: name of the base model, for `lora cache`.

    Raises:
        LoraError: a source, the chat template or the labels cannot be used, no rows are left, or more rows are bad,
            overlong or dropped than the recipe allows.
    """
    check_template_variables(spec, tokenizer)
    encoder = make_encoder(task, spec, tokenizer, placeholders)
    in_train = train_sources(spec, cache=cache, info=info)
    in_eval = eval_sources(spec, in_train, cache=cache, info=info)
    check_documents([*in_train, *in_eval], spec, task)
    encode = partial(encode_source, cache=cache, info=info, model=model)
    train = [encode(source, spec, encoder) for source in in_train]
    separate_eval = [encode(source, spec, encoder) for source in in_eval]
    share = spec.eval if isinstance(spec.eval, float) else 0.0
    distinct = _distinct_rows(train, spec)
    # The chunks of a document are held out together; otherwise rows by their content, all duplicates of it or none.
    keys = [item.rows.document_keys() if item.tally.added else item.rows.keys for item in train]
    kept_keys = [key[index] for key, index in zip(keys, distinct, strict=True)]
    held_out = held_out_masks(kept_keys, share=share, seed=seed)
    train_parts, entries = [], []
    for number, (item, rows, mask) in enumerate(zip(train, distinct, held_out, strict=True)):
        weight = item.source.spec.weight
        index = apply_weight(rows[~mask], weight, seed=seed, split="train", number=number)
        train_parts.append((item.rows, index))
        entries.append(_entry(item, "train", index, distinct=len(rows), held_out=int(mask.sum())))
    eval_parts = [(item.rows, rows[mask]) for item, rows, mask in zip(train, distinct, held_out, strict=True)]
    for number, (item, rows) in enumerate(zip(separate_eval, _distinct_rows(separate_eval, spec), strict=True)):
        weight = item.source.spec.weight
        index = apply_weight(rows, weight, seed=seed, split="eval", number=number)
        eval_parts.append((item.rows, index))
        entries.append(_entry(item, "eval", index, distinct=len(rows), held_out=0))
    check_dropped_share([item.tally for item in [*train, *separate_eval]], spec)
    labels, mappers = None, []
    if task in ("seq-cls", "token-cls"):
        by_source = [_source_labels(item) for item in [*train, *separate_eval]]
        train_labels, eval_labels = by_source[: len(train)], by_source[len(train) :]
        labels = class_labels.resolve_labels(spec.labels, train_labels, eval_labels, base=base_labels)
        for note in class_labels.label_notes(labels, by_source):
            info(note)
        mappers = [class_labels.label_mapper(labels, source) for source in by_source]
    train_set, eval_set = EncodedDataset(train_parts, mappers[: len(train)]), EncodedDataset(eval_parts, mappers)
    for split, name in ((train_set, train_key), (eval_set, "data.eval")):
        if not len(split) and (split is train_set or separate_eval):
            raise LoraError(f"{name}: no rows are left", hint=NO_ROWS_HINT)
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


def _distinct_rows(items: Sequence[EncodedSource], spec: DataSpec) -> list[Index]:
    """Return the rows of each source that data.dedup keeps, [rows]: the first of each over all sources."""
    if spec.dedup is None:
        return [np.arange(len(item.rows)) for item in items]
    keys = np.concatenate([np.zeros(0, np.uint64), *(item.rows.keys for item in items)])
    first = np.zeros(len(keys), bool)
    first[np.unique(keys, return_index=True)[1]] = True
    starts = np.cumsum([0, *(len(item.rows) for item in items)])
    return [np.flatnonzero(first[start : start + len(item.rows)]) for start, item in zip(starts, items, strict=False)]


def _source_labels(item: EncodedSource) -> SourceLabels:
    stored = item.tally.labels
    if stored is None:
        raise LoraError(f"{item.source.name}: no rows are left", hint="check data.on_bad_row and data.overlong")
    return SourceLabels(**stored)


def _entry(item: EncodedSource, split: str, index: Index, *, distinct: int, held_out: int) -> Entry:
    available = distinct - held_out
    max_rows = item.source.spec.max_rows
    left_out = available - int(np.count_nonzero(np.bincount(index)))
    return Entry(
        source=item.source.name,
        split="train" if split == "train" else "eval",
        content=item.content,
        tally=item.tally,
        held_out=held_out,
        left_out=left_out,
        repeated=len(index) - (available - left_out),
        duplicates=item.tally.kept - distinct,
        max_rows=max_rows if item.tally.read == max_rows else None,
    )
