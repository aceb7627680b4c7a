"""The labels of a classification task: read off the rows, named and numbered once. No tokenizer, no torch."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lora_cli.data.dataset import IGNORE_INDEX, Row
from lora_cli.data.encode_classes import LabeledRow, LabelValues
from lora_cli.data.records import BadRow
from lora_cli.errors import LoraError

# single: one label a row or word; multi: any number of them; regression: numbers to come near to.
LabelKind = Literal["single", "multi", "regression"]
MAX_SHOWN = 8
MAX_LABELS = 10_000  # labels; a larger number is a measure, or an id


class ClassLabels(NamedTuple):
    """What a model's head tells apart."""

    kind: LabelKind
    names: tuple[str, ...]  # in the order of their numbers; of a regression, the names of its values

    def describe(self) -> str:
        """`3 labels: neutral, positive, negative`, for the user."""
        if self.kind == "regression":
            return "regression" if len(self.names) == 1 else f"regression of {len(self.names)} values"
        listed = ", ".join(self.names[:MAX_SHOWN]) + (
            f" and {len(self.names) - MAX_SHOWN} more" if len(self.names) > MAX_SHOWN else ""
        )
        several = ", several a row" if self.kind == "multi" else ""
        return f"{len(self.names)} labels{several}: {listed}"


LABELS_FILE = "labels.json"  # beside an adapter: PEFT's own files do not name what a head tells apart


def save_labels(labels: ClassLabels, folder: Path) -> None:
    """Put the labels beside the adapter whose head they belong to."""
    (folder / LABELS_FILE).write_text(
        json.dumps(labels._asdict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def load_labels(folder: Path) -> ClassLabels | None:
    """The labels that lie beside an adapter; None where there are none."""
    if not (folder / LABELS_FILE).is_file():
        return None
    stored = json.loads((folder / LABELS_FILE).read_text(encoding="utf-8"))
    return ClassLabels(stored["kind"], tuple(stored["names"]))


class SourceLabels(NamedTuple):
    """The labels of one source, as its rows spell them, in the order in which they were met."""

    kind: LabelKind
    counts: dict[str, int]
    first: dict[str, str]  # where each was met first: `data/train.jsonl:17`
    numbered: bool  # all of them were whole numbers
    width: int = 1  # values a row, of a regression


class LabelTable:
    """Numbers the labels of one source while it is encoded."""

    def __init__(self) -> None:
        self._kind: LabelKind | None = None
        self._numbers: dict[str, int] = {}
        self._counts: list[int] = []
        self._first: list[str] = []
        self._numbered = True
        self._width = 1

    def number(self, row: LabeledRow, where: str) -> LabelValues:
        """The row's labels as numbers of this table, IGNORED where a token has none; its values, of a regression.

        Raises:
            BadRow: its labels are of another kind than those of the rows before.
        """
        kind: LabelKind = "multi" if row.multi_label else "single" if row.label_keys else "regression"
        if self._kind is None:
            self._kind, self._width = kind, len(row.values) or 1
        if kind != self._kind:
            problem = f"is {KIND_NAMES[kind]}, and in rows before it {KIND_NAMES[self._kind]}"
            raise BadRow("another kind of label", problem, field="label")
        if kind == "regression":
            if len(row.values) != self._width:
                raise BadRow("another kind of label", f"has {len(row.values)} values, not {self._width}", field="label")
            return row.values
        self._numbered &= row.numbered
        # A row of no labels must still be seen to have been read.
        return np.array([self._of(each, where) for each in row.label_keys] or [IGNORE_INDEX], dtype=np.float64)

    def _of(self, label: str | None, where: str) -> int:
        if label is None:
            return IGNORE_INDEX
        if label not in self._numbers:
            self._numbers[label] = len(self._counts)
            self._counts.append(0)
            self._first.append(where)
        number = self._numbers[label]
        self._counts[number] += 1
        return number

    def found(self) -> dict[str, Any] | None:
        """What goes to the tally; None where no row had labels."""
        if self._kind is None:
            return None
        counts = dict(zip(self._numbers, self._counts, strict=True))
        first = dict(zip(self._numbers, self._first, strict=True))
        return SourceLabels(self._kind, counts, first, self._numbered, self._width)._asdict()


KIND_NAMES = {"single": "one label", "multi": "a list of labels", "regression": "a number to come near to"}


def resolve_labels(
    wanted: Literal["auto", "regression"] | Sequence[str],
    train: Sequence[SourceLabels],
    evaluation: Sequence[SourceLabels],
    *,
    base: Sequence[str] = (),
) -> ClassLabels:
    """The labels of a run: those of the recipe, else those of the base's own head where the rows have no others, else
    those of the training rows, sorted; numbers in their order, with those between that no row has.

    Args:
        wanted: the recipe's `data.labels`.
        train: what the sources of the training rows hold.
        evaluation: the same for evaluation rows.
        base: label names of the head that the base has, if it has one.

    Raises:
        LoraError: sources disagree on what labels are, or a row has a label that is not among them.
    """
    sources = [*train, *evaluation]
    kinds = {found.kind for found in sources}
    if kinds == {"regression"} and not isinstance(wanted, str):
        raise LoraError(
            f"data.labels: {len(wanted)} labels are listed, but the rows have measured numbers such as 1.0",
            hint="write the labels as names or whole numbers, several as a list of those that apply; "
            "or data: {labels: regression}",
        )
    if wanted == "regression" or kinds == {"regression"}:
        if kinds != {"regression"}:
            raise LoraError("data.labels: regression, but some rows have labels that are no numbers", hint="write auto")
        widths = {found.width for found in sources}
        if len(widths) > 1:
            raise LoraError(f"data: rows of {' and '.join(map(str, sorted(widths)))} values", hint="mend the rows")
        return ClassLabels(
            "regression", tuple(f"value {i}" for i in range(widths.pop())) if widths != {1} else ("value",)
        )
    if len(kinds) > 1:
        raise LoraError(
            f"data: sources disagree on what a label is: {' and '.join(sorted(kinds))}",
            hint="write each label as a list where a row may have several, as a number for regression only",
        )
    kind = kinds.pop()
    there = {label for found in train for label in found.counts}
    if not there:
        raise LoraError("data: no training row has a label", hint="see the column that data.columns names `label`")
    numbered = all(found.numbered for found in train)
    if (
        len(there) > MAX_LABELS
        or (numbered and max(map(int, there)) >= MAX_LABELS)
        or (not numbered and all(map(_is_measure, there)))
    ):
        raise LoraError(
            f"data: labels such as {sorted(there)[0]} look like measured numbers, not like names or numbers of classes",
            hint="give labels that are names or count from 0; measured numbers are for task: seq-cls with "
            "data: {labels: regression}",
        )
    if isinstance(wanted, str):
        if base and there <= ({*base} if not numbered else {str(i) for i in range(len(base))}):
            names = tuple(base)
        elif numbered:
            names = tuple(str(number) for number in range(max(map(int, there)) + 1))
        else:
            names = tuple(sorted(there))
    else:
        names = tuple(wanted)
    labels = ClassLabels(kind, names)
    for found in sources:
        _refuse_strange(labels, found)
    if len(names) < 2 and kind == "single":
        raise LoraError(f"data: every training row has the label {names[0]}", hint="there is nothing to tell apart")
    return labels


def _is_measure(label: str) -> bool:
    return re.fullmatch(r"-?\d+\.\d+", label) is not None


def _refuse_strange(labels: ClassLabels, found: SourceLabels) -> None:
    known = label_numbers(labels, found)
    strange = [label for label in found.counts if label not in known]
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        listed = ", ".join(labels.names[:MAX_SHOWN]) + (", ..." if len(labels.names) > MAX_SHOWN else "")
        raise LoraError(
            f"{found.first[strange[0]]}: label {strange[0]}{more}: not among the {len(labels.names)} of the head",
            hint=f"they are {listed}: mend the row, or list it in data.labels",
        )


def label_numbers(labels: ClassLabels, found: SourceLabels) -> dict[str, int]:
    """The number of each spelling: of a name, its place; of a number that is no name, itself."""
    known = {name: number for number, name in enumerate(labels.names)}
    if found.numbered:
        known |= {str(number): number for number in range(len(labels.names)) if str(number) not in known}
    return known


def label_mapper(labels: ClassLabels, found: SourceLabels) -> Callable[[Row], Row]:
    """What makes a row's labels of the numbers that its source has for them.

    A class is int32 [1], or one for each token and IGNORED at most of them; several classes are float32
    [labels] of 0 and 1; a regression's values are float32 [values].
    """
    if labels.kind == "regression":
        return lambda row: row._replace(labels=row.labels.astype(np.float32))
    known = label_numbers(labels, found)
    lookup = np.array([known[label] for label in found.counts], dtype=np.int32)

    def single(row: Row) -> Row:
        chosen = row.labels.astype(np.int64)
        return row._replace(
            labels=np.where(chosen == IGNORE_INDEX, IGNORE_INDEX, lookup[chosen.clip(0)]).astype(np.int32)
        )

    def several(row: Row) -> Row:
        hot = np.zeros(len(labels.names), np.float32)
        hot[lookup[row.labels[row.labels != IGNORE_INDEX].astype(np.int64)]] = 1
        return row._replace(labels=hot)

    return several if labels.kind == "multi" else single
