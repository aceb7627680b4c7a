"""`lora check --no-model`: validate a recipe and read its rows, without a model and its libraries. No torch."""

import glob
import os
from typing import Any

from lora_cli.data.examples import check_rows
from lora_cli.data.ledger import unread_lines
from lora_cli.data.remote import is_url
from lora_cli.recipe.schema import Recipe, SourceSpec
from lora_cli.run import console
from lora_cli.run.redact import redact_path
from lora_cli.setup.tracked_run import check_trackers_installed, describe_tracking


def check_without_model(recipe: Recipe) -> dict[str, Any]:
    """Read the recipe's local rows in their format, without tokenizer or model; print and return what was read.

    Raises:
        LoraError: a tracker is not installed, or rows cannot be read.
    """
    check_trackers_installed(recipe.tracking)
    for line in describe_tracking(recipe):
        console.out.print(line)
    local: dict[str, list[SourceSpec]] = {"train": [], "eval": []}
    elsewhere: list[str] = []
    read: list[dict[str, Any]] = []
    for side, value in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        specs = [SourceSpec(path=value)] if isinstance(value, str) else value if isinstance(value, list) else []
        for spec in specs:
            if os.path.lexists(spec.path) or (glob.has_magic(spec.path) and not is_url(spec.path)):
                local[side].append(spec)
            else:
                elsewhere.append(redact_path(spec.path))
                console.out.print(f"{spec.path}: not on this machine, so its rows were not read")
    if any(local.values()):
        data = recipe.data.model_copy(update=local)
        for source in check_rows(data, recipe.task, console.info, complete=not elsewhere):
            bad = "".join(f", {count:,} skipped: {reason}" for reason, count in source.bad.items())
            read.append({"source": source.source, "rows": source.read, "format": source.format, "skipped": source.bad})
            console.out.print(f"{source.source}: {source.read:,} rows of format {source.format}{bad}")
            for note in source.notes:
                console.out.print(f"  {note}")
            for line in unread_lines(source.unread_columns, source.unread_keys):
                console.out.print(f"  {line}")
    console.out.print("ok: the recipe is valid; model, labels and memory were not checked")
    return {"sources": read, "not_read": elsewhere}
