"""From a recipe's data section to rows of ids and labels for training and evaluation, every one accounted for."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from lora_cli.data import class_labels as labelling
from lora_cli.data.cache import EncodedSource, encode_source
from lora_cli.data.class_labels import ClassLabels, SourceLabels
from lora_cli.data.dataset import EncodedDataset
from lora_cli.data.encode_classes import make_encoder
from lora_cli.data.ledger import Entry, Ledger, Totals, check_loss
from lora_cli.data.sources import eval_sources, train_sources
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from lora_cli.recipe.tasks import TaskName

SUPERVISED_UNITS = {
    "causal-lm": "supervised",
    "seq-cls": "labels",
    "token-cls": "labels",
    "seq2seq-lm": "target tokens",
}

Index = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


class PreparedData(NamedTuple):
    """The data of a run."""

    train: EncodedDataset
    eval: EncodedDataset | None
    ledger: Ledger
    labels: ClassLabels | None = None  # of a task that classifies

    @property
    def fingerprint(self) -> str:
        """A hash of all ids and labels of both splits, in their order."""
        parts = [self.train.fingerprint, self.eval.fingerprint if self.eval else ""]
        parts += [repr(self.labels)] if self.labels else []
        return hashlib.blake2b(" ".join(parts).encode(), digest_size=16).hexdigest()


def prepare_data(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    cache: Path,
    info: Callable[[str], None],
    task: TaskName = "causal-lm",
    own_labels: Sequence[str] = (),
    train_key: str = "data.train",
) -> PreparedData:
    """Reads, checks, encodes and splits the rows that a recipe names.

    Args:
        spec: the recipe's data section.
        tokenizer: of the base model.
        seed: picks the held-out rows, and those that a weight leaves out.
        cache: folder for encoded rows; a second call with the same content, tokenizer and options maps them.
        say: takes progress lines.
        task: what the rows are to teach.
        own_labels: names of the labels that the base's own head tells apart, if it has one.
        train_key: what the user knows `spec.train` by.

    Raises:
        LoraError: no row, bad rows, a template that cannot be trained with, more loss than allowed, ...
    """
    encoder = make_encoder(task, spec, tokenizer)
    train = [encode_source(source, spec, encoder, cache=cache, info=info) for source in train_sources(spec)]
    own = [encode_source(source, spec, encoder, cache=cache, info=info) for source in eval_sources(spec)]
    held = _held_out(train, spec.eval if isinstance(spec.eval, float) else 0.0, seed)
    parts, entries = [], []
    for number, (item, out) in enumerate(zip(train, held, strict=True)):
        index = _weighted(np.flatnonzero(~out), item.source.spec.weight, salt=_salt(seed, "train", number))
        parts.append((item.rows, index))
        entries.append(_entry(item, "train", index, held_out=int(out.sum())))
    evaluation = [(item.rows, np.flatnonzero(out)) for item, out in zip(train, held, strict=True)]
    for number, item in enumerate(own):
        index = _weighted(np.arange(len(item.rows)), item.source.spec.weight, salt=_salt(seed, "eval", number))
        evaluation.append((item.rows, index))
        entries.append(_entry(item, "eval", index, held_out=0))
    check_loss(entries, limit=_limit(spec))
    labels, read = None, []
    if task in ("seq-cls", "token-cls"):
        there = [_found(item) for item in [*train, *own]]
        labels = labelling.resolve_labels(spec.labels, there[: len(train)], there[len(train) :], base=own_labels)
        read = [labelling.label_mapper(labels, found) for found in there]
    rows, tested = EncodedDataset(parts, read[: len(train)]), EncodedDataset(evaluation, read)
    for split, name in ((rows, train_key), (tested, "data.eval")):
        if not len(split) and (split is rows or own):
            raise LoraError(f"{name}: no row is left", hint="see data.on_bad_row, data.overlong and the weights")
    if not len(tested) and spec.eval is not None:
        info("data.eval: there is only one row, so none is held out")
    leaked = int(np.isin(tested.keys, rows.keys).sum()) if own else 0
    ledger = Ledger(
        tuple(entries),
        Totals.of(rows.lengths, rows.supervised),
        Totals.of(tested.lengths, tested.supervised) if len(tested) else None,
        leaked,
        SUPERVISED_UNITS[task],
        labels.describe() if labels else None,
    )
    ledger.check()
    return PreparedData(rows, tested if len(tested) else None, ledger, labels)


def _found(item: EncodedSource) -> SourceLabels:
    stored = item.tally.labels
    if stored is None:
        raise LoraError(f"{item.source.name}: no row is left", hint="see data.on_bad_row and data.overlong")
    return SourceLabels(**stored)


def _limit(spec: DataSpec) -> float:
    if spec.max_loss is not None:
        return spec.max_loss
    return 0.0 if spec.overlong == "error" and spec.on_bad_row == "error" else 0.1


def _entry(item: EncodedSource, split: str, index: Index, *, held_out: int) -> Entry:
    there = item.tally.kept - held_out
    left_out = there - len(np.unique(index))
    return Entry(
        source=item.source.name,
        split="train" if split == "train" else "eval",
        content=item.content,
        tally=item.tally,
        held_out=held_out,
        left_out=left_out,
        repeated=len(index) - (there - left_out),
    )


def _held_out(items: Sequence[EncodedSource], share: float, seed: int) -> list[npt.NDArray[np.bool_]]:
    """Which rows go to evaluation: by a hash of their content, so that equal rows stay together.

    Rows that are added or removed do not move others; only the two bounds do (never none, never all).
    """
    scores = [_mixed(item.rows.keys, _salt(seed, "eval", 0)) for item in items]
    every = np.unique(np.concatenate([np.zeros(0, np.uint64), *scores]))
    if not share or sum(map(len, scores)) < 2:
        return [np.zeros(len(score), bool) for score in scores]
    if len(every) < 2:
        raise LoraError(
            "data.eval: all rows are the same, so none can be held out for evaluation",
            hint="set data.eval to null, or to rows of its own",
        )
    border = min(max(int(share * 2**64), int(every[0]) + 1), int(every[-1]))
    return [score < np.uint64(border) for score in scores]


def _weighted(index: Index, weight: float, *, salt: int) -> Index:
    """The rows of one epoch: all as often as the whole part of the weight says, a seeded share once more."""
    whole, rest = divmod(weight, 1.0)
    count = round(rest * len(index))
    # By a hash of the place, not of the content: of equal rows each is its own.
    order = np.argsort(_mixed(index.astype(np.uint64), salt), kind="stable")
    return np.concatenate([np.tile(index, int(whole)), np.sort(index[order[:count]])])


def _salt(seed: int, purpose: str, number: int) -> int:
    digest = hashlib.blake2b(f"{seed} {purpose} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _mixed(values: Hashes, salt: int) -> Hashes:
    """A hash of each value (SplitMix64), the same on every machine and with every NumPy."""
    mixed = values + np.uint64(salt)  # arrays of unsigned integers wrap around, as the algorithm wants
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
