"""Dataset sources of other tools: the items of data.train and data.eval, with a comment for each key. No torch."""

import re
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from lora_cli.convert.config import show
from lora_cli.convert.draft import Draft, Line, Outcome
from lora_cli.data.message_shapes import FIELD_NAMES, ROLE_NAMES

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".arrow", ".gz", ".zst")
NO_PATH = "names no rows; accepted: data/train.jsonl"
SLICE = re.compile(r"^(\w+)\[(:?)(\d+)(%?)(:?)\]$")


@dataclass
class Source:
    """One item of data.train or data.eval."""

    values: dict[str, Any] = field(default_factory=dict)
    comment: str = ""

    def columns(self, **names: str | None) -> None:
        """Add columns whose name is not the format's own."""
        changed = {ours: theirs for ours, theirs in names.items() if theirs != ours}
        if changed:
            self.values["columns"] = {**self.values.get("columns", {}), **changed}

    def message_fields(self, **names: str | None) -> None:
        """Add the keys of messages that are not found by themselves."""
        changed = {ours: theirs for ours, theirs in names.items() if theirs and not _is_found(ours, theirs)}
        if changed:
            self.values["message_fields"] = {**self.values.get("message_fields", {}), **changed}

    def roles(self, target: str, *names: str) -> None:
        """Add the names of a role that are not known."""
        changed = {name: target for name in names if ROLE_NAMES.get(name.lower()) != target}
        if changed:
            self.values["roles"] = {**self.values.get("roles", {}), **changed}


def _is_found(ours: str, theirs: str) -> bool:
    # The first name of the list that a message has is read, so a later one is written out.
    return theirs in FIELD_NAMES.get(ours, (ours,))[:2]


def carry_split(draft: Draft, key: str, source: Source, split: str) -> str:
    """Set the split of a source, and return what of it is not offered: `train[:20%]` reads a part of a split."""
    if split == "train" and PurePath(str(source.values.get("path", ""))).suffix in FILE_SUFFIXES:
        draft.same(key, "the rows of the file")
        return ""
    part = SLICE.match(split)
    if part is None:
        if re.search(r"[\[+]", split):
            return f"{split} is a part of a split; accepted: the whole of train"
        source.values["split"] = split
        return ""
    name, before, number, percent, after = part.groups()
    source.values["split"] = name
    if before and not percent and not after:
        source.values["max_rows"] = int(number)
        return ""
    return f"{split} is a part of a split, and max_rows counts rows; accepted: all rows of {name}"


def write_sources(draft: Draft, to: str, sources: list[Source]) -> None:
    """Set data.train or data.eval; a single source without options is written as its path."""
    values = [source.values for source in sources]
    if len(values) == 1 and set(values[0]) <= {"path", "format"} and to == "data.train":
        draft.put(to, values[0]["path"], sources[0].comment)
        if "format" in values[0]:
            draft.put("data.format", values[0]["format"])
        return
    draft.put(to, values)
    for index, source in enumerate(sources):
        draft.comments[f"{to}[{index}]"] = source.comment


def file_line(key: str, value: Any, to: str, result: Any, note: str = "") -> Line:
    """Return the line of a carried key of another file."""
    return Line(key, value, Outcome.CARRIED, to, result, note)


def refused_line(key: str, value: Any, reason: str) -> Line:
    """Return the line of a key of another file that is not offered."""
    return Line(key, value, Outcome.NOT_OFFERED, reason=reason or show(value))
