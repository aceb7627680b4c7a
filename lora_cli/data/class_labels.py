"""Class labels of a classification task (id2label): collected from the rows, then named and numbered. No torch."""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np

from lora_cli.data.encode_classes import LabeledRow, LabelValues
from lora_cli.data.encoded_rows import Row
from lora_cli.data.label_mask import IGNORE_INDEX
from lora_cli.data.records import BadRow
from lora_cli.errors import LoraError
from lora_cli.run.read_file import RESTORE, read_json_object

# single: one label for each row or word; multi: any number of labels for each row; regression: numbers.
LabelKind = Literal["single", "multi", "regression"]
MAX_SHOWN = 8  # labels listed in a message
MAX_LABELS = 10_000  # larger label numbers are assumed to be regression values or ids, not classes


class ClassLabels(NamedTuple):
    """The labels of a model's classification head."""

    kind: LabelKind
    names: tuple[str, ...]  # in the order of their numbers; for a regression, the names of its values

    def describe(self) -> str:
        """Return a summary for messages: `3 labels: neutral, positive, negative`."""
        if self.kind == "regression":
            return "regression" if len(self.names) == 1 else f"regression of {len(self.names)} values"
        listed = ", ".join(self.names[:MAX_SHOWN]) + (
            f" and {len(self.names) - MAX_SHOWN} more" if len(self.names) > MAX_SHOWN else ""
        )
        multiple = ", several per row" if self.kind == "multi" else ""
        return f"{len(self.names)} labels{multiple}: {listed}"


LABELS_FILE = "labels.json"  # in an adapter folder, because PEFT's own files do not name the labels


def save_labels(labels: ClassLabels, folder: Path) -> None:
    """Write the labels to `labels.json` in an adapter folder."""
    (folder / LABELS_FILE).write_text(
        json.dumps(labels._asdict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def load_labels(folder: Path) -> ClassLabels | None:
    """Read the labels from an adapter folder; None if it has no `labels.json`.

    Raises:
        LoraError: the file cannot be read, or has something else than a kind and different names.
    """
    path = folder / LABELS_FILE
    if not os.path.lexists(path):
        return None
    stored = read_json_object(path)
    kind, names = stored.get("kind"), stored.get("names")
    if stored.keys() != set(ClassLabels._fields) or kind not in get_args(LabelKind):
        raise LoraError(
            f"{path}: it needs `kind` ({', '.join(get_args(LabelKind))}) and `names`, and nothing else", hint=RESTORE
        )
    texts = isinstance(names, list) and all(isinstance(name, str) and _is_encodable(name) for name in names)
    if not texts or not names or len(set(names)) != len(names):
        raise LoraError(f"{path}: names: not a list of different labels", hint=RESTORE)
    return ClassLabels(cast(LabelKind, kind), tuple(names))


def _is_encodable(text: str) -> bool:
    """Return whether `text` is Unicode: JSON can also write half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


class SourceLabels(NamedTuple):
    """The labels of one source, spelled as in its rows, in order of first occurrence."""

    kind: LabelKind
    counts: dict[str, int]
    first: dict[str, str]  # location of the first occurrence: `data/train.jsonl:17`
    numbered: bool  # all labels are integers
    width: int = 1  # values per row of a regression


class LabelTable:
    """Assigns numbers to the labels of one source while it is encoded."""

    def __init__(self, labels: SourceLabels | None = None) -> None:
        """`labels` are those of the rows before, to continue with them."""
        self._kind: LabelKind | None = labels.kind if labels else None
        counts = labels.counts if labels else {}
        self._numbers = {label: number for number, label in enumerate(counts)}
        self._counts = list(counts.values())
        self._first = list(labels.first.values()) if labels else []
        self._numbered = labels.numbered if labels else True
        self._width = labels.width if labels else 1

    def to_numbers(self, row: LabeledRow, location: str) -> LabelValues:
        """Return the labels of a row as numbers of this table, float64 [labels]; for a regression, its values.

        Tokens without label get IGNORE_INDEX.

        Raises:
            BadRow: the row has a different kind of label than the rows before.
        """
        kind: LabelKind = "multi" if row.multi_label else "single" if row.label_keys else "regression"
        if self._kind is None:
            self._kind, self._width = kind, len(row.values) or 1
        if kind != self._kind:
            problem = f"is {KIND_NAMES[kind]}, but earlier rows have {KIND_NAMES[self._kind]}"
            raise BadRow("different kind of label", problem, field="label")
        if kind == "regression":
            if len(row.values) != self._width:
                problem = f"has {len(row.values)} values, not {self._width}"
                raise BadRow("different kind of label", problem, field="label")
            return row.values
        self._numbered &= row.numbered
        # A row without stored values is read as a causal-lm row, so an empty list of labels is stored as IGNORE_INDEX.
        return np.array(
            [self._number_of(each, location) for each in row.label_keys] or [IGNORE_INDEX], dtype=np.float64
        )

    def _number_of(self, label: str | None, location: str) -> int:
        if label is None:
            return IGNORE_INDEX
        if label not in self._numbers:
            self._numbers[label] = len(self._counts)
            self._counts.append(0)
            self._first.append(location)
        number = self._numbers[label]
        self._counts[number] += 1
        return number

    def to_dict(self) -> dict[str, Any] | None:
        """Return the fields of `SourceLabels` for the tally; None if no row has labels."""
        if self._kind is None:
            return None
        counts = dict(zip(self._numbers, self._counts, strict=True))
        first = dict(zip(self._numbers, self._first, strict=True))
        return SourceLabels(self._kind, counts, first, self._numbered, self._width)._asdict()


KIND_NAMES = {"single": "a single label", "multi": "a list of labels", "regression": "a regression value"}


def resolve_labels(
    setting: Literal["auto", "regression"] | Sequence[str],
    train: Sequence[SourceLabels],
    evaluation: Sequence[SourceLabels],
    *,
    base: Sequence[str] = (),
) -> ClassLabels:
    """Choose the labels of a run and their order.

    These are the labels of the recipe; else those of the base model's head, if it has all labels of the training rows;
    else those of the training rows, sorted. If all labels are integers, the labels are 0 to the largest of them.

    Args:
        setting: `data.labels` of the recipe.
        train: labels of the training sources.
        evaluation: labels of the evaluation sources.
        base: label names of the base model's classification head, if it has one.

    Raises:
        LoraError: sources have different kinds of labels, or a row has a label that the run does not have.
    """
    sources = [*train, *evaluation]
    kinds = {source.kind for source in sources}
    if kinds == {"regression"} and not isinstance(setting, str):
        raise LoraError(
            f"data.labels: {len(setting)} labels are listed, but the rows have regression values such as 1.0",
            hint="write labels as names or integers, several labels of a row as a list; or data: {labels: regression}",
        )
    if setting == "regression" or kinds == {"regression"}:
        if kinds != {"regression"}:
            raise LoraError("data.labels: regression, but some rows have labels that are not numbers", hint="set auto")
        widths = {source.width for source in sources}
        if len(widths) > 1:
            counts = " and ".join(map(str, sorted(widths)))
            raise LoraError(f"data: rows have different numbers of values: {counts}", hint="fix the rows")
        return ClassLabels(
            "regression", tuple(f"value {i}" for i in range(widths.pop())) if widths != {1} else ("value",)
        )
    if len(kinds) > 1:
        raise LoraError(
            f"data: sources have different kinds of labels: {' and '.join(sorted(kinds))}",
            hint="write every label as a list if a row can have several; decimal numbers are for regression only",
        )
    kind = kinds.pop()
    used = {label for source in train for label in source.counts}
    if not used:
        raise LoraError("data: no training row has a label", hint="check which column data.columns maps to `label`")
    numbered = all(source.numbered for source in train)
    if (
        len(used) > MAX_LABELS
        or (numbered and max(map(int, used)) >= MAX_LABELS)
        or (not numbered and all(map(_is_decimal, used)))
    ):
        raise LoraError(
            f"data: labels such as {sorted(used)[0]} look like regression values, not like class names or numbers",
            hint="use names, or numbers that count from 0; for regression: task: seq-cls, data: {labels: regression}",
        )
    if isinstance(setting, str):
        if base and used <= ({*base} if not numbered else {str(i) for i in range(len(base))}):
            names = tuple(base)
        elif numbered:
            names = tuple(str(number) for number in range(max(map(int, used)) + 1))
        else:
            names = tuple(sorted(used))
    else:
        names = tuple(setting)
    labels = ClassLabels(kind, names)
    for source in sources:
        # Class numbers in evaluation rows would be guesses where the training rows have names.
        if source in evaluation and source.numbered and not numbered:
            source = source._replace(numbered=False)
        _check_labels_known(labels, source)
    if len(names) < 2 and kind == "single":
        raise LoraError(
            f"data: every training row has the label {names[0]}", hint="a classifier needs at least two labels"
        )
    return labels


def _is_decimal(label: str) -> bool:
    return re.fullmatch(r"-?\d+\.\d+", label) is not None


def _check_labels_known(labels: ClassLabels, source: SourceLabels) -> None:
    known = label_numbers(labels, source)
    unknown = [label for label in source.counts if label not in known]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        listed = ", ".join(labels.names[:MAX_SHOWN]) + (", ..." if len(labels.names) > MAX_SHOWN else "")
        similar = [name for name in labels.names if _folded(name) == _folded(unknown[0])]
        raise LoraError(
            f"{source.first[unknown[0]]}: label {unknown[0]}{more}: not one of the model's {len(labels.names)} labels",
            hint=f"did you mean {similar[0]}? Upper case and spaces count"
            if similar
            else f"these are {listed}: fix the row, or add the label to data.labels",
        )


def label_numbers(labels: ClassLabels, source: SourceLabels) -> dict[str, int]:
    """Return the number of each spelling: for a name, its index; for an integer, the integer, if no name is one."""
    known = {name: number for number, name in enumerate(labels.names)}
    if source.numbered and not any(map(str.isdecimal, labels.names)):
        known |= {str(number): number for number in range(len(labels.names))}
    return known


def label_notes(labels: ClassLabels, sources: Sequence[SourceLabels]) -> list[str]:
    """Return what the user should know of the spelling of labels: class numbers, names that differ only in case."""
    notes: list[str] = []
    if labels.kind == "regression":
        return notes
    numbered = next((source for source in sources if source.numbered and source.counts), None)
    if numbered and not any(map(str.isdecimal, labels.names)):
        listed = ", ".join(f"{number} is {name}" for number, name in enumerate(labels.names[:MAX_SHOWN]))
        more = ", ..." if len(labels.names) > MAX_SHOWN else ""
        location = next(iter(numbered.first.values()))
        notes.append(f"{location}: its integer labels are class numbers: {listed}{more}")
    by_folded: dict[str, list[str]] = {}
    for name in labels.names:
        by_folded.setdefault(_folded(name), []).append(name)
    notes += [
        f"labels {' and '.join(map(repr, names))} are different classes: they differ only in case or spaces"
        for names in by_folded.values()
        if len(names) > 1
    ]
    return notes


def _folded(label: str) -> str:
    return " ".join(label.casefold().split())


def label_mapper(labels: ClassLabels, source: SourceLabels) -> Callable[[Row], Row]:
    """Return a function that replaces a row's label numbers of its source by those of `labels`.

    The result is int32 [1] for a class, int32 [tokens] for a class per word (IGNORE_INDEX at other tokens),
    float32 [labels] of 0 and 1 for several classes, and float32 [values] for a regression.
    """
    if labels.kind == "regression":
        return lambda row: row._replace(labels=row.labels.astype(np.float32))
    known = label_numbers(labels, source)
    lookup = np.array([known[label] for label in source.counts], dtype=np.int32)

    def single(row: Row) -> Row:
        numbers = row.labels.astype(np.int64)
        return row._replace(
            labels=np.where(numbers == IGNORE_INDEX, IGNORE_INDEX, lookup[numbers.clip(0)]).astype(np.int32)
        )

    def multi(row: Row) -> Row:
        hot = np.zeros(len(labels.names), np.float32)
        hot[lookup[row.labels[row.labels != IGNORE_INDEX].astype(np.int64)]] = 1
        return row._replace(labels=hot)

    return multi if labels.kind == "multi" else single
