"""`lora convert`: read another tool's config, account for each of its keys, and write a recipe. No torch."""

import re
import shlex
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_cli.convert.config import Unreadable, show
from lora_cli.convert.convert_config import Conversion, convert_config
from lora_cli.convert.detect import Detected, detect_tool
from lora_cli.convert.draft import Outcome
from lora_cli.convert.read import read_config
from lora_cli.convert.secrets import hide
from lora_cli.errors import LoraError, one_line
from lora_cli.recipe.load import parse_recipe
from lora_cli.run import atomic, console, json_output
from lora_cli.run.shell import shell_path

TITLES: tuple[tuple[Outcome, str], ...] = (
    (Outcome.CARRIED, "carried"),
    (Outcome.DEFAULT, "the same without the key"),
    (Outcome.NO_EFFECT, "without effect on what is learnt"),
    (Outcome.NOT_OFFERED, "changes what is learnt, and is not offered"),
    (Outcome.OTHER_TASK, "another task"),
    (Outcome.UNKNOWN, "unknown"),
)


def convert(file: Path, *, tool: str | None, out: Path | None, accepted: Sequence[str]) -> dict[str, Any]:
    """Convert `file`, print and return the report, and write the recipe to `out`, or to stdout.

    Raises:
        LoraError: the file cannot be read, its tool is not clear, or keys change what is learnt and are not accepted.
    """
    config = read_config(file)
    detected = Detected(tool, "by --from") if tool else detect_tool(config)
    conversion = convert_config(config, detected.name)
    open_keys = _check_accepted(conversion, accepted)
    refused = bool(open_keys or conversion.of(Outcome.OTHER_TASK))
    if not refused:
        _check_recipe(conversion, file)
    record = _record(conversion, detected, accepted, None if refused else out)
    _print_report(conversion, detected, accepted, console.out if out or refused else console.err)
    if refused:
        raise _refusal(conversion, open_keys, file, record)
    if out is not None:
        _write(out, conversion.text)
        console.info(f"{out} is written; next: lora check {shell_path(out)}")
    elif not json_output.is_reserved():
        sys.stdout.write(conversion.text)
    return record


def _check_recipe(conversion: Conversion, file: Path) -> None:
    """Raise if a value of the config is one that a recipe cannot have, such as a negative learning rate."""
    try:
        parse_recipe(conversion.text, Path("recipe"))
    except LoraError as error:
        raise LoraError(
            f"{file} has values that a recipe cannot have, and nothing was written",
            hint="correct them in the config first",
            details=[re.sub(r"^recipe:\d+: ", "", line) for line in error.details],
        ) from None


def _check_accepted(conversion: Conversion, accepted: Sequence[str]) -> list[str]:
    """Return the keys that are still to be accepted."""
    needed = conversion.to_accept()
    for key in accepted:
        if key not in needed:
            close = get_close_matches(key, needed, n=1)
            hint = f"did you mean {close[0]}?" if close else "remove it"
            if not close and needed:
                hint = f"those that do are {', '.join(needed)}"
            raise LoraError(f"--accept {key}: this key needs no acceptance", hint=hint)
    return [key for key in needed if key not in accepted]


def _print_report(conversion: Conversion, detected: Detected, accepted: Sequence[str], stream: Console) -> None:
    """Print a line for each key, by what became of it, and one for each default that is written out."""
    draft = conversion.draft
    stream.print(f"{one_line(str(draft.config.file))}: a {draft.config.kind} of {draft.tool} ({detected.why})")
    counts = [f"{len(conversion.of(outcome))} {title}" for outcome, title in TITLES if conversion.of(outcome)]
    stream.print(f"{len(conversion.lines)} keys: {', '.join(counts)}")
    for outcome, title in TITLES:
        lines = conversion.of(outcome)
        if lines:
            stream.print(f"{title}:")
        for line in lines:
            place = draft.config.places.get(line.key, "")
            shown = (
                f"{place}: " if outcome in (Outcome.NOT_OFFERED, Outcome.OTHER_TASK, Outcome.UNKNOWN) and place else ""
            )
            mark = " (accepted)" if line.key in accepted else ""
            stream.print(one_line(f"  {shown}{line.text()}{mark}"))
    if draft.assumed:
        stream.print(f"defaults of {draft.tool} that differ from ours, written out:")
    for each in draft.assumed:
        stream.print(one_line(f"  {each.to}: {show(each.value)} — {each.reason}"))


def _refusal(conversion: Conversion, open_keys: list[str], file: Path, record: dict[str, Any]) -> LoraError:
    """Return the error of a config that no recipe stands for, or whose keys are not accepted."""
    other = conversion.of(Outcome.OTHER_TASK)
    if other:
        return LoraError(
            f"{file} is for another task, and nothing was written: {other[0].key}: {other[0].reason}",
            hint="convert a config of supervised fine-tuning with an adapter",
            record=record,
        )
    count = "1 key changes" if len(open_keys) == 1 else f"{len(open_keys)} keys change"
    accept = " ".join(f"--accept {shlex.quote(key)}" for key in open_keys)
    return LoraError(
        f"{count} what is learnt, and nothing was written: {', '.join(open_keys)}",
        hint=f"read above what is done instead; to write the recipe so, add {accept}",
        record=record,
    )


def _record(conversion: Conversion, detected: Detected, accepted: Sequence[str], out: Path | None) -> dict[str, Any]:
    draft = conversion.draft
    return {
        "file": str(draft.config.file),
        "tool": detected.name,
        "why": detected.why,
        "keys": [
            {
                "key": line.key,
                "value": _plain(hide(line.key, line.value)),
                "outcome": str(line.outcome),
                "to": line.to or None,
                "result": _plain(hide(line.to, line.result)),
                "reason": line.reason or None,
                "accepted": line.key in accepted,
            }
            for line in conversion.lines
        ],
        "defaults": [{"to": each.to, "value": each.value, "reason": each.reason} for each in draft.assumed],
        "recipe": conversion.text,
        "out": None if out is None else str(out),
    }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Unreadable) else value


def _write(out: Path, text: str) -> None:
    try:
        with atomic.file(out) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except FileExistsError:
        raise LoraError(f"--out {out} exists", hint="write another name, or move it away") from None
