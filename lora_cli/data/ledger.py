"""Dataset statistics: count every row that is read, kept, truncated or dropped. Pure: no tokenizer, no torch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from lora_cli.data.conversation import Conversation
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec


@dataclass
class Tally:
    """Counts of the rows of one source by encoding result. Stored with the encoded rows in the cache."""

    format: str = ""
    why: str = ""  # reason for the format
    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    cut: int = 0  # kept rows that were truncated to data.max_length
    answers_cut: int = 0  # answers that lost a part of their tokens by truncation
    ends_lost: int = 0  # answers that lost their end-of-turn token, completely lost answers included
    splits: int = 0  # rows in which an answer began inside a token and was tokenized separately
    rewritten: int = 0  # answers whose text the chat template changed
    # Reasoning, and the text that generation prompts write before an answer: see `assistant_spans.AnswerCounts`.
    dropped_reasoning: int = 0
    inserted: int = 0
    unprompted: int = 0
    empty: int = 0
    reasoned: int = 0
    answered: int = 0
    documents_split: int = 0  # documents that were split at data.max_length
    added: int = 0  # rows that splitting added to those that were read
    answers_masked: int = 0  # answers that loss flags of the row take all loss from
    parts_masked: int = 0  # parts of other answers that loss flags take loss from
    turns_joined: int = 0  # turns that data.merge_turns joined with the turn before
    ends_cut: int = 0  # conversations that were cut to their last answer
    labels_cut: int = 0  # labels or target tokens that were lost by truncation
    ignored: dict[str, int] = field(default_factory=dict)  # rows by column that the format does not use
    templated: int = 0  # kept rows that are conversations, rendered by the chat template
    unread_keys: dict[str, int] = field(default_factory=dict)  # messages by key that nothing reads
    nulls: Counter[str] = field(default_factory=Counter)  # null fields in structs of Arrow tables, dropped, by path
    labels: dict[str, Any] | None = None  # classification: the fields of `class_labels.SourceLabels`

    def check(self) -> None:
        """Assert that every row is either kept or dropped for one reason; a violation is a bug, not a user error."""
        assert self.read + self.added == self.kept + self.dropped.total(), self

    def add_conversation(self, chat: Conversation) -> None:
        """Count what was changed in a conversation that is kept."""
        self.turns_joined += chat.joined
        self.ends_cut += chat.cut
        for message, loss in zip(chat.messages, chat.loss, strict=False):  # no flags: `loss` is empty
            if loss is not None and message["role"] == "assistant":
                self.answers_masked += loss.none
                self.parts_masked += 0 if loss.none else loss.parts

    def to_json(self) -> dict[str, Any]:
        """Return the content of `tally.json`."""
        return {**vars(self), "dropped": dict(self.dropped), "nulls": dict(self.nulls)}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Tally":
        """Return the tally of a `tally.json`."""
        return cls(**{**stored, "dropped": Counter(stored["dropped"]), "nulls": Counter(stored["nulls"])})


PromptKind = Literal["chat", "text", "both"]


class Entry(NamedTuple):
    """One source in one run: its tally, and how split and weight use its kept rows."""

    source: str
    split: Literal["train", "eval"]
    content: str  # hash of the source's bytes
    tally: Tally
    held_out: int  # rows held out for evaluation
    left_out: int  # rows that are in no epoch because of a weight below 1
    repeated: int  # repetitions of rows in an epoch because of a weight above 1
    duplicates: int = 0  # rows left out by data.dedup
    max_rows: int | None = None  # of the source, if it ended the reading

    @property
    def rows(self) -> int:
        """Rows of this source in the split, repetitions included."""
        return self.tally.kept - self.duplicates - self.held_out - self.left_out + self.repeated


class Totals(NamedTuple):
    """Totals of a split in one epoch."""

    rows: int
    tokens: int
    supervised: int  # tokens that carry loss, or labels
    lengths: dict[str, int]  # quantiles of tokens per row
    histogram: dict[str, Any]  # of tokens per row: `first` (tokens), `width` of each bin (tokens), `rows` of each bin

    @classmethod
    def of(cls, lengths: npt.NDArray[np.int32], supervised: npt.NDArray[np.int32]) -> "Totals":
        """Compute totals from the tokens and supervised tokens of each row, both int32 [rows]."""
        marks = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
        # method="higher" gives the length of an existing row, not the mean of two.
        values = np.quantile(lengths, list(marks.values()), method="higher") if len(lengths) else [0] * len(marks)
        quantiles = {name: int(value) for name, value in zip(marks, values, strict=True)}
        tokens, of_loss = int(lengths.sum(dtype=np.int64)), int(supervised.sum(dtype=np.int64))
        return cls(len(lengths), tokens, of_loss, quantiles, _histogram(lengths))


MAX_BINS = 32


def _histogram(lengths: npt.NDArray[np.int32]) -> dict[str, Any]:
    """Return the number of rows by their tokens, in at most MAX_BINS bins of equal width; `lengths` is [rows]."""
    if not len(lengths):
        return {"first": 0, "width": 1, "rows": []}
    first = int(lengths.min())
    width = (int(lengths.max()) - first) // MAX_BINS + 1
    return {"first": first, "width": width, "rows": np.bincount((lengths - first) // width).tolist()}


class Ledger(NamedTuple):
    """The statistics of all sources and both splits."""

    entries: tuple[Entry, ...]
    train: Totals
    eval: Totals | None
    leaked: int  # rows of separate evaluation sources that are also training rows
    unit: str = "supervised"  # unit of `Totals.supervised`: supervised tokens, target tokens or labels
    labels: str | None = None  # summary of a classifier's labels

    def check(self) -> None:
        """Assert that the counts of sources and splits add up."""
        for entry in self.entries:
            entry.tally.check()
        train = sum(entry.rows for entry in self.entries if entry.split == "train")
        held = sum(entry.rows if entry.split == "eval" else entry.held_out for entry in self.entries)
        assert (train, held) == (self.train.rows, self.eval.rows if self.eval else 0), self

    @property
    def has_chats(self) -> bool:
        """Whether any row was rendered with a chat template."""
        return any(entry.tally.templated for entry in self.entries)

    def to_json(self) -> dict[str, Any]:
        """Return the ledger for manifest.json."""
        return {
            "sources": [
                {
                    "source": entry.source,
                    "split": entry.split,
                    "content": entry.content,
                    **entry.tally.to_json(),
                    "max_rows": entry.max_rows,
                    "duplicates": entry.duplicates,
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

    def prompt_kind(self, split: Literal["train", "eval"] = "train") -> PromptKind | None:
        """Return how the rows of a split prompt a language model: by its chat template, as literal text, or both ways.

        None: unknown, because rows are token ids.
        """
        entries = [entry for entry in self.entries if entry.split == split and entry.rows]
        # Without sources of their own, evaluation rows are held out of the training sources.
        tallies = [entry.tally for entry in entries or self.entries]
        if any(tally.format == "tokens" for tally in tallies):
            return None
        templated, kept = sum(tally.templated for tally in tallies), sum(tally.kept for tally in tallies)
        return "text" if not templated else "chat" if templated == kept else "both"

    def table(self) -> list[str]:
        """Return the lines of the ledger for messages."""
        lines = [line for entry in self.entries for line in _entry_lines(entry)]
        if self.labels:
            lines.append(self.labels)
        lines.append(_totals_line("train", self.train, self.unit))
        if self.eval:
            lines.append(_totals_line("eval", self.eval, self.unit))
        if self.leaked:
            lines.append(
                f"  {self.leaked:,} evaluation {_rows(self.leaked)} also in train: their loss is not a valid test"
            )
        return lines


def _entry_lines(entry: Entry) -> list[str]:
    tally = entry.tally
    parts = [f"{entry.rows:,} for {entry.split}"]
    if entry.held_out:
        parts.append(f"{entry.held_out:,} held out for eval")
    if entry.duplicates:
        parts.append(f"{entry.duplicates:,} left out as duplicates")
    if entry.left_out:
        parts.append(f"{entry.left_out:,} left out by weight")
    if dropped := tally.dropped.total():
        parts.append(f"{dropped:,} dropped")
    repeated = f" - {entry.repeated:,} repeated by weight" if entry.repeated else ""
    added = f" + {tally.added:,} by splitting" if tally.added else ""
    lines = [
        f"{entry.source}: {tally.format} ({tally.why})",
        f"  {tally.read:,} {_rows(tally.read)} read{added} = {' + '.join(parts)}{repeated}",
    ]
    if entry.max_rows is not None:
        lines.append(f"  only the first {entry.max_rows:,} rows are read (max_rows)")
    lines += [f"  dropped {count:,}: {reason}" for reason, count in tally.dropped.most_common()]
    end_tokens = "end-of-turn token" if tally.ends_lost == 1 else "end-of-turn tokens"
    notes = conversation_notes(tally) | {
        f"{_rows(tally.cut)} truncated to data.max_length": tally.cut,
        f"{_answers(tally.answers_cut)} truncated": tally.answers_cut,
        f"{end_tokens} lost: the model cannot learn to stop from these answers": tally.ends_lost,
        f"document{'s' * (tally.documents_split != 1)} split at data.max_length": tally.documents_split,
        "labels or target tokens lost by truncation": tally.labels_cut,
        f"{_rows(tally.splits)} with an answer, or a part of one, that began inside a token and was tokenized "
        "separately": tally.splits,
        f"{_answers(tally.rewritten)} changed by the chat template": tally.rewritten,
        **_reasoning_notes(tally),
    }
    lines += [f"  {count:,} {note}" for note, count in notes.items() if count]
    lines += [f"  {line}" for line in null_lines(tally)]
    if tally.labels and tally.labels["counts"]:
        lines.append(f"  labels: {_label_counts(tally.labels['counts'])}")
    lines += [f"  {line}" for line in unread_lines(tally.ignored, tally.unread_keys)]
    return lines


def unread_lines(columns: Mapping[str, int], keys: Mapping[str, int]) -> list[str]:
    """Return the lines that list columns of rows and keys of messages that nothing reads, with their numbers."""
    lines = []
    for name, unit, counts in (("columns", "row", columns), ("message keys", "message", keys)):
        if counts:
            listed = (f"{key} ({count:,} {unit}{'s' * (count != 1)})" for key, count in counts.items())
            lines.append(f"{name} not used: {', '.join(listed)}")
    return lines


def conversation_notes(tally: Tally) -> dict[str, int]:
    """Return what was changed in conversations, with its count."""
    return {
        f"{_answers(tally.answers_masked)} without loss, by their loss flags": tally.answers_masked,
        f"part{'s' * (tally.parts_masked != 1)} of answers without loss, by their loss flags": tally.parts_masked,
        f"turn{'s' * (tally.turns_joined != 1)} joined with the turn before, of the same role": tally.turns_joined,
        f"{_rows(tally.ends_cut)} cut to the last answer: other turns followed it": tally.ends_cut,
    }


NULLS_SHOWN = 5  # fields listed with the number of their nulls


def null_lines(tally: Tally) -> list[str]:
    """Return the line about dropped nulls, if there are any."""
    if not tally.nulls:
        return []
    listed = ", ".join(f"{path} {count:,}" for path, count in tally.nulls.most_common(NULLS_SHOWN))
    more = f" and {len(tally.nulls) - NULLS_SHOWN} more" * (len(tally.nulls) > NULLS_SHOWN)
    fields = "null field" if tally.nulls.total() == 1 else "null fields"
    return [f"{tally.nulls.total():,} {fields} of structs dropped (Arrow fills them in): {listed}{more}"]


def _reasoning_notes(tally: Tally) -> dict[str, int]:
    """Return notes about reasoning and generation prompts, with their counts."""
    mixed = tally.reasoned if tally.answered else 0
    return {
        f"{_rows(mixed)} with reasoning in the last answer, mixed with {tally.answered:,} without": mixed,
        f"earlier {_answers(tally.dropped_reasoning)} whose reasoning is omitted by the chat template": (
            tally.dropped_reasoning
        ),
        f"last {_answers(tally.inserted)} whose reasoning, which the chat template omits, is written after its "
        "generation prompt": tally.inserted,
        f"{_answers(tally.empty)} without reasoning after an empty reasoning block of the chat template, which carries "
        "no loss: a server writes it in the prompt if reasoning is off (data.template_variables)": tally.empty,
        f"{_answers(tally.unprompted)} not behind the text that the chat template's generation prompt writes before an "
        "answer": tally.unprompted,
    }


LABELS_SHOWN = 12  # labels listed with their counts


def _label_counts(counts: dict[str, int]) -> str:
    """Return `negative 1,005 (52.8%), positive 900 (47.2%)`, the most frequent label first."""
    total = sum(counts.values())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{label} {count:,} ({count / total:.1%})" for label, count in ordered[:LABELS_SHOWN])
    rest = ordered[LABELS_SHOWN:]
    return listed + (f" and {len(rest)} more labels with {sum(count for _, count in rest):,} in total" if rest else "")


def _totals_line(name: str, totals: Totals, unit: str) -> str:
    share = totals.supervised / max(1, totals.tokens)
    lengths = ", ".join(f"{mark} {length:,}" for mark, length in totals.lengths.items())
    counted = f"{totals.supervised:,} of them supervised ({share:.1%})" if unit == "supervised" else ""
    return (
        f"{name}: {totals.rows:,} {_rows(totals.rows)}, {totals.tokens:,} tokens, "
        f"{counted or f'{totals.supervised:,} {unit}'}; tokens per row: {lengths}"
    )


def _answers(count: int) -> str:
    return "answer" if count == 1 else "answers"


def _rows(count: int) -> str:
    return "row" if count == 1 else "rows"


def check_dropped_share(tallies: Sequence[Tally], spec: DataSpec) -> None:
    """Check that a run does not drop more rows of its sources than the recipe allows.

    Raises:
        LoraError: the share of dropped rows is above data.max_loss.
    """
    limit = 0.0 if spec.overlong in ("error", "split") and spec.on_bad_row == "error" else 0.1
    limit = limit if spec.max_loss is None else spec.max_loss
    read = sum(tally.read for tally in tallies)
    dropped: Counter[str] = Counter()
    for tally in tallies:
        dropped.update(tally.dropped)
    if dropped.total() > limit * read:
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in dropped.most_common(3))
        raise LoraError(
            f"data: {dropped.total():,} of {read:,} rows are dropped ({dropped.total() / read:.1%}), "
            f"more than data.max_loss allows ({limit:.1%}): {reasons}",
            hint="fix the rows, or raise data.max_loss",
        )
