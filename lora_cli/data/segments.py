"""Dataset format `segments`: texts without a template, each with a label that says whether it carries loss. No torch.

It is the format input_output of axolotl. The texts are joined unchanged, so that the row has to contain its own
control tokens.
"""

from typing import Any, NamedTuple

from lora_cli.data.loss_flags import LOSS_FLAGS, Run, merge_runs, read_flag
from lora_cli.data.readers import json_type
from lora_cli.data.records import BadRow

SEGMENTS_SUMMARY = "a list of {text, label}: literal text; those with label true carry loss"


class Segments(NamedTuple):
    """Literal text without a chat template, and which parts of it carry loss."""

    text: str
    runs: tuple[Run, ...]


def parse_segments(segments: list[Any]) -> Segments:
    """Parse a list of `{text, label}`; a loss flag under another name (weight, train, ...) is read as the label.

    Raises:
        BadRow: a segment is invalid, or none carries loss.
    """
    texts, runs = [], []
    for index, segment in enumerate(segments):
        location = f"segments[{index}]"
        if not isinstance(segment, dict):
            problem = f"is {json_type(segment)}, not an object with text and label"
            raise BadRow("segment is not an object", problem, field=location)
        text = segment.get("text")
        if not isinstance(text, str):
            problem = f"is {json_type(text)}, not a string" if "text" in segment else "is missing"
            raise BadRow("segment without text", problem, field=f"{location}.text")
        texts.append(text)
        runs.append(Run(len(text), _label(segment, location)))
    merged = merge_runs(runs)
    if not any(run.loss for run in merged):
        raise BadRow("nothing to learn", "has no text whose label is true", field="segments")
    return Segments("".join(texts), merged)


def _label(segment: dict[str, Any], location: str) -> bool:
    values = {
        name: read_flag(value, f"{location}.{name}") == LOSS_FLAGS.get(name, True)
        for name, value in segment.items()
        if value is not None and (name == "label" or name in LOSS_FLAGS)
    }
    if not values:
        raise BadRow(
            "segment without label", "is missing: write true for text with loss, else false", field=f"{location}.label"
        )
    if len(set(values.values())) > 1:
        raise BadRow("conflicting loss flags", f"{' and '.join(values)} contradict each other", field=location)
    return next(iter(values.values()))
