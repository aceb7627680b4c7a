"""What other commands have written into the folder of a run: pages of `lora report`, results of `lora eval`. No torch.

They have any name, and are known by their content.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_cli.errors import LoraError
from lora_cli.run.read_file import open_regular, read_json_object

PAGE_MARK = "<!doctype html>\n<!-- lora report -->\n"  # of a page: a file that starts with it is a report
MAX_RESULT_BYTES = 64 << 20
PREDICTION = {"where", "prompt", "references", "answers"}  # keys of each line that --predictions writes


def is_measurement(content: Mapping[str, Any]) -> bool:
    """Return whether an object of JSON is a result of `lora eval`."""
    results = content.get("results")
    return isinstance(results, dict) and bool(results) and "rows" in content and "data" in content


def check_predictions_file(file: Path | None) -> None:
    """Raise if the file of --predictions exists, and has something else than predictions: it can be the rows.

    Raises:
        LoraError: it does.
    """
    if file is not None and os.path.lexists(file) and not _has_predictions(file, or_nothing=True):
        raise LoraError(f"--predictions {file} exists, and has no predictions of lora", hint="name another file")


def list_results(folder: Path) -> list[str]:
    """Return the names of the files in `folder`, not deeper, that are pages, results or predictions, sorted."""
    return sorted(name for name in os.listdir(folder) if _is_result(folder / name))


def _is_result(path: Path) -> bool:
    try:
        match path.suffix:
            case ".html":
                with open_regular(path) as file:
                    return file.read(len(PAGE_MARK)) == PAGE_MARK.encode()
            case ".json":
                return is_measurement(read_json_object(path, limit=MAX_RESULT_BYTES))
            case ".jsonl":
                return _has_predictions(path)
    except (LoraError, ValueError, RecursionError):  # not JSON, a folder, no permission: nothing that is known
        pass
    return False


def _has_predictions(path: Path, *, or_nothing: bool = False) -> bool:
    """Return whether a file has the answers of --predictions; for one that is empty, `or_nothing`."""
    with open_regular(path, hint="name another file") as file:
        line = file.readline(MAX_RESULT_BYTES)
    if not line:
        return or_nothing
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and first.keys() == PREDICTION
