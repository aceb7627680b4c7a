"""LLaMA-Factory's datasets: entries of dataset_info.json as sources with a format, columns and roles. No torch."""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lora_cli.convert.config import as_list, as_number
from lora_cli.convert.draft import Draft, Line, Outcome
from lora_cli.convert.sources import Source, carry_split, file_line, refused_line, write_sources
from lora_cli.errors import LoraError
from lora_cli.run.read_file import read_json_object

INFO = "dataset_info.json"
LOCATIONS = ("file_name", "hf_hub_url", "script_url", "ms_hub_url", "om_hub_url", "cloud_file_name")
KNOWN = {*LOCATIONS, "formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags", "revision"}
ALPACA = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "system": "system",
    "history": "history",
    "tools": "tools",
}
CHAT = {"messages": "", "system": "system", "tools": "tools"}
PREFERENCE_COLUMNS = ("chosen", "rejected", "kto_tag")
MEDIA_COLUMNS = ("images", "videos", "audios")
ROLE_TAGS = {
    "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt"),
    "observation_tag": ("tool", "observation"),
    "function_tag": ("tool_call", "function_call"),
    "system_tag": ("system", "system"),
}


def carry_datasets(draft: Draft, stage: str) -> None:
    """Carry `dataset` and `eval_dataset`, with the entries of dataset_info.json that they name."""
    config = draft.config
    info, place = _find_info(draft)
    rows = config.whole("max_samples")
    for key, to in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        names = [str(name) for name in as_list(config.get(key))]
        sources = []
        for name in names:
            source = _unknown_source(draft, key, name, info, place) if name not in (info or {}) else None
            if source is None:
                assert info is not None, "the name was found in it"
                assert place is not None
                source = _read_entry(draft, name, info[name], folder=place.parent, stage=stage)
            if rows:
                source.values["max_rows"] = min(rows, source.values.get("max_rows", rows))
            sources.append(source)
        if sources:
            write_sources(draft, to, sources)
            draft.carried(key, to, [source.values["path"] for source in sources])
        if key == "dataset" and not sources:
            draft.missing("dataset", "the config names no dataset; accepted: data/train.jsonl")
            draft.put("data.train", "data/train.jsonl", "replace: the config names no dataset")
    if rows:
        draft.carried("max_samples", "max_rows of each source", rows)
    draft.no_effect("dataset_dir", "the paths of data.train name the folder")


def _find_info(draft: Draft) -> tuple[dict[str, Any] | None, Path | None]:
    """Return dataset_info.json and its path: of dataset_dir, or of the folder `data` above the config."""
    folder = draft.config.text("dataset_dir") or "data"
    if folder == "ONLINE":
        return None, None
    above = [parent / folder for parent in draft.config.file.absolute().parents]
    for path in [Path(folder), *above]:
        if os.path.isfile(path / INFO):
            return read_json_object(path / INFO), path / INFO
    return None, None


def _unknown_source(draft: Draft, key: str, name: str, info: dict[str, Any] | None, place: Path | None) -> Source:
    folder = draft.config.text("dataset_dir") or "data"
    if folder == "ONLINE":
        return Source({"path": name})
    if info is None or place is None:
        what = f"{folder}/{INFO} was not found, in which it looks up {name}: convert in the folder where it trains"
    else:
        close = get_close_matches(name, info, n=1)
        what = f"{place} has no dataset {name}" + (f"; did you mean {close[0]}?" if close else "")
    draft.refuse(key, f"{what}; accepted: data/{name}.json")
    return Source({"path": f"data/{name}.json"})


def _read_entry(draft: Draft, name: str, entry: Any, *, folder: Path, stage: str) -> Source:
    if not isinstance(entry, dict):
        raise LoraError(f"{folder / INFO}: {name} is not an object", hint="correct it first")
    source, prefix = Source(), f"{INFO}[{name}]"
    _locate(draft, source, entry, prefix, folder)
    formatting = str(entry.get("formatting", "alpaca"))
    columns = entry.get("columns") if isinstance(entry.get("columns"), dict) else None
    if entry.get("ranking"):
        reason = "pairs of a good and a bad answer are for preference training, which is another task"
        draft.extra(Line(f"{prefix}.ranking", entry["ranking"], Outcome.OTHER_TASK, reason=reason))
    if stage == "pt":
        source.values["format"] = "text"
        source.columns(text=(columns or {}).get("prompt", "instruction"))
        return source
    ours = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}.get(formatting)
    if ours is None:
        draft.extra(refused_line(f"{prefix}.formatting", formatting, "is no format here; accepted: auto"))
    else:
        source.values["format"] = ours
        if "formatting" in entry:
            draft.extra(file_line(f"{prefix}.formatting", formatting, "format", ours))
    _read_columns(draft, source, columns, prefix, alpaca=formatting == "alpaca")
    if formatting in ("sharegpt", "openai"):
        _read_tags(draft, source, entry.get("tags"), prefix, openai=formatting == "openai")
    for key in entry.keys() - KNOWN:
        draft.extra(Line(f"{prefix}.{key}", entry[key], Outcome.UNKNOWN, reason="unknown key of dataset_info.json"))
    return source


def _locate(draft: Draft, source: Source, entry: dict[str, Any], prefix: str, folder: Path) -> None:
    key = next((key for key in LOCATIONS if key in entry), None)
    if key is None:
        raise LoraError(f"{prefix}: has none of {', '.join(LOCATIONS[:3])}", hint="correct it first")
    value = str(entry[key])
    if key == "file_name":
        path = folder / value
        value = str(path.relative_to(Path.cwd()) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path)
    source.values["path"] = value
    source.comment = f"{prefix}.{key}"
    if key in ("hf_hub_url", "file_name", "cloud_file_name"):
        draft.extra(file_line(f"{prefix}.{key}", entry[key], "path", value))
    else:
        why = "runs code to load rows" if key == "script_url" else "is of another hub"
        draft.extra(refused_line(f"{prefix}.{key}", entry[key], f"{why}; accepted: as a path or an id of the hub"))
    if entry.get("subset"):
        source.values["subset"] = str(entry["subset"])
    if entry.get("folder"):
        source.values["path"] = f"{value}/{entry['folder']}"
    if entry.get("split") and (refused := carry_split(draft, "split", source, str(entry["split"]))):
        draft.extra(refused_line(f"{prefix}.split", entry["split"], refused))
    if entry.get("num_samples"):
        count = as_number(entry["num_samples"])
        if count is None:
            raise LoraError(f"{folder / INFO}: {prefix}.num_samples is not a number", hint="correct it first")
        source.values["max_rows"] = int(count)
        draft.extra(
            file_line(
                f"{prefix}.num_samples",
                entry["num_samples"],
                "max_rows",
                entry["num_samples"],
                "the first rows, not a random choice",
            )
        )
    if entry.get("revision"):
        draft.extra(refused_line(f"{prefix}.revision", entry["revision"], "a hub dataset is read at its main revision"))


def _read_columns(draft: Draft, source: Source, columns: dict[str, Any] | None, prefix: str, *, alpaca: bool) -> None:
    named, columns = columns is not None, columns or {}
    for key in PREFERENCE_COLUMNS:
        if columns.get(key):
            reason = "marks good and bad answers, for preference training: another task"
            draft.extra(Line(f"{prefix}.columns.{key}", columns[key], Outcome.OTHER_TASK, reason=reason))
    for key in MEDIA_COLUMNS:
        if columns.get(key):
            reason = (
                "`lora train` trains text models, and refuses rows with images, video or audio; accepted: those without"
            )
            draft.extra(refused_line(f"{prefix}.columns.{key}", columns[key], reason))
    known = (
        ALPACA
        if alpaca
        else {**CHAT, "messages": "conversations" if source.values.get("format") == "sharegpt" else "messages"}
    )
    for theirs, ours in known.items():
        if isinstance(name := columns.get(theirs), str):
            source.columns(**{ours: name})
            draft.extra(file_line(f"{prefix}.columns.{theirs}", name, f"columns.{ours}", name))
        elif theirs in ("history", "system", "tools") or (theirs == "query" and named):
            # Columns that the entry does not name are not read, also if the rows have them.
            source.columns(**{ours: None})
    for key in columns.keys() - {*known, *PREFERENCE_COLUMNS, *MEDIA_COLUMNS}:
        draft.extra(Line(f"{prefix}.columns.{key}", columns[key], Outcome.UNKNOWN, reason="unknown column"))


def _read_tags(draft: Draft, source: Source, tags: Any, prefix: str, *, openai: bool) -> None:
    tags = tags if isinstance(tags, dict) else {}
    fields = {"role": tags.get("role_tag"), "content": tags.get("content_tag")}
    source.message_fields(**fields)
    for key, ours in (("role_tag", "role"), ("content_tag", "content")):
        if key in tags:
            skipped = ours == "role" and not openai and "system_tag" not in tags
            note = "rows that start with a system message are left out there, without system_tag" if skipped else ""
            draft.extra(file_line(f"{prefix}.tags.{key}", tags[key], f"message_fields.{ours}", tags[key], note))
    for key, (role, default) in ROLE_TAGS.items():
        if key in tags and not openai:
            source.roles(role, str(tags[key] or default))
            draft.extra(file_line(f"{prefix}.tags.{key}", tags[key], f"roles.{tags[key]}", role))
    for key in tags.keys() - {"role_tag", "content_tag", *ROLE_TAGS}:
        draft.extra(Line(f"{prefix}.tags.{key}", tags[key], Outcome.UNKNOWN, reason="unknown tag"))
