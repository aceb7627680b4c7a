"""Account for every row: what was read, kept, cut, left out and why. Pure: no tokenizer, no torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from lora_cli.errors import LoraError


@dataclass
class Tally:
    """What became of the rows of one source when they were encoded. Kept beside the encoded rows."""

    format: str = ""
    why: str = ""  # how the format was settled
    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    cut: int = 0  # kept rows that lost their end to data.max_length
    answers_cut: int = 0  # answers that lost a part of their tokens
    ends_lost: int = 0  # answers that lost their end-of-turn token, those cut off whole included
    splits: int = 0  # rows in which an answer began inside a token and was tokenised on its own
    rewritten: int = 0  # answers that the chat template changed, reasoning left out say
    labels_cut: int = 0  # labels, or target tokens, that rows lost with their end
    ignored: dict[str, int] = field(default_factory=dict)  # columns that the format does not read: rows with them
    labels: dict[str, Any] | None = None  # of a task that classifies: `labels.Found` of the rows, as a dictionary

    def check(self) -> None:
        """Every row read is kept or dropped for one reason: ours to hold, not the user's."""
        assert self.read == self.kept + self.dropped.total(), self

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "dropped": dict(self.dropped)}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Tally":
        return cls(**{**stored, "dropped": Counter(stored["dropped"])})


class Entry(NamedTuple):
    """One source in one run: its tally, and what split and weight made of the rows kept."""

    source: str
    split: Literal["train", "eval"]
    content: str  # hash of the source's bytes
    tally: Tally
    held_out: int  # rows given to evaluation
    left_out: int  # rows that a weight below a whole number left out of every epoch
    repeated: int  # further times that rows are seen in an epoch

    @property
    def rows(self) -> int:
        """Rows that the split takes from this source."""
        return self.tally.kept - self.held_out - self.left_out + self.repeated


class Totals(NamedTuple):
    """The rows of a split as the model will see them in one epoch."""

    rows: int
    tokens: int
    supervised: int  # tokens that carry loss
    lengths: dict[str, int]  # quantiles, in tokens a row

    @classmethod
    def of(cls, lengths: npt.NDArray[np.int32], supervised: npt.NDArray[np.int32]) -> "Totals":
        marks = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
        # The length of a row that is there, not a mean of two.
        found = np.quantile(lengths, list(marks.values()), method="higher") if len(lengths) else [0] * len(marks)
        quantiles = {name: int(value) for name, value in zip(marks, found, strict=True)}
        return cls(len(lengths), int(lengths.sum(dtype=np.int64)), int(supervised.sum(dtype=np.int64)), quantiles)


class Ledger(NamedTuple):
    """All sources and both splits."""

    entries: tuple[Entry, ...]
    train: Totals
    eval: Totals | None
    leaked: int  # rows of an own evaluation source that are also trained on
    unit: str = "supervised"  # what the totals count as supervised: tokens, or labels
    labels: str | None = None  # what a classifier's head tells apart

    def check(self) -> None:
        """The sums that hold in every ledger."""
        for entry in self.entries:
            entry.tally.check()
        train = sum(entry.rows for entry in self.entries if entry.split == "train")
        held = sum(entry.rows if entry.split == "eval" else entry.held_out for entry in self.entries)
        assert (train, held) == (self.train.rows, self.eval.rows if self.eval else 0), self

    def to_json(self) -> dict[str, Any]:
        """What goes to manifest.json."""
        return {
            "sources": [
                {
                    "source": entry.source,
                    "split": entry.split,
                    "content": entry.content,
                    **entry.tally.to_json(),
                    "held_out": entry.held_out,
                    "left_out_by_weight": entry.left_out,
                    "repeated_by_weight": entry.repeated,
                    "rows": entry.rows,
                }
                for entry in self.entries
            ],
            "train": self.train._asdict(),
            "eval": self.eval._asdict() if self.eval else None,
            "leaked": self.leaked,
        }

    def table(self) -> list[str]:
        """The ledger for a reader, line by line."""
        lines = [line for entry in self.entries for line in _entry(entry)]
        if self.labels:
            lines.append(self.labels)
        lines.append(_totals("train", self.train, self.unit))
        if self.eval:
            lines.append(_totals("eval", self.eval, self.unit))
        if self.leaked:
            lines.append(
                f"  {self.leaked:,} evaluation {_rows(self.leaked)} also in train: the loss on them is no test"
            )
        return lines


def _entry(entry: Entry) -> list[str]:
    tally = entry.tally
    parts = [f"{entry.rows:,} for {entry.split}"]
    if entry.held_out:
        parts.append(f"{entry.held_out:,} held out for eval")
    if entry.left_out:
        parts.append(f"{entry.left_out:,} left out by weight")
    if dropped := tally.dropped.total():
        parts.append(f"{dropped:,} dropped")
    repeated = f" - {entry.repeated:,} repeated by weight" if entry.repeated else ""
    lines = [
        f"{entry.source}: {tally.format} ({tally.why})",
        f"  {tally.read:,} {_rows(tally.read)} read = {' + '.join(parts)}{repeated}",
    ]
    lines += [f"  dropped {count:,}: {reason}" for reason, count in tally.dropped.most_common()]
    notes = {
        f"{_rows(tally.cut)} cut at data.max_length": tally.cut,
        f"answer{'s' * (tally.answers_cut != 1)} cut": tally.answers_cut,
        f"end-of-turn token{'s' * (tally.ends_lost != 1)} lost: these answers teach no stopping": tally.ends_lost,
        "labels or target tokens lost with the end of their row": tally.labels_cut,
        f"{_rows(tally.splits)} with an answer that began inside a token: tokenised on its own": tally.splits,
        "answers changed by the chat template (reasoning left out, say)": tally.rewritten,
    }
    lines += [f"  {count:,} {note}" for note, count in notes.items() if count]
    if tally.labels and tally.labels["counts"]:
        lines.append(f"  labels: {_counted(tally.labels['counts'])}")
    if tally.ignored:
        lines.append(f"  columns not read: {', '.join(tally.ignored)}")
    return lines


LABELS_SHOWN = 12


def _counted(counts: dict[str, int]) -> str:
    """`positive 900 (47.2%), negative 1,005 (52.8%)`, the most frequent first."""
    total = sum(counts.values())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{label} {count:,} ({count / total:.1%})" for label, count in ordered[:LABELS_SHOWN])
    rest = ordered[LABELS_SHOWN:]
    return shown + (f" and {len(rest)} more, {sum(count for _, count in rest):,} in all" if rest else "")


def _totals(name: str, totals: Totals, unit: str) -> str:
    share = totals.supervised / max(1, totals.tokens)
    lengths = ", ".join(f"{mark} {length:,}" for mark, length in totals.lengths.items())
    counted = f"{totals.supervised:,} of them supervised ({share:.1%})" if unit == "supervised" else ""
    return (
        f"{name}: {totals.rows:,} {_rows(totals.rows)}, {totals.tokens:,} tokens, "
        f"{counted or f'{totals.supervised:,} {unit}'}; tokens a row: {lengths}"
    )


def _rows(count: int) -> str:
    return "row" if count == 1 else "rows"


def check_loss(entries: Sequence[Entry], *, limit: float) -> None:
    """Stops a run that would lose more rows than the recipe allows.

    Raises:
        LoraError: the share of rows dropped, for whatever reason, is above `limit`.
    """
    read = sum(entry.tally.read for entry in entries)
    dropped: Counter[str] = Counter()
    for entry in entries:
        dropped.update(entry.tally.dropped)
    if dropped.total() > limit * read:
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in dropped.most_common(3))
        raise LoraError(
            f"data: {dropped.total():,} of {read:,} rows are lost ({dropped.total() / read:.1%}), "
            f"more than data.max_loss allows ({limit:.1%}): {reasons}",
            hint="mend the rows, or raise data.max_loss",
        )
