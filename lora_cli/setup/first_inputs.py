"""The base model and the rows of a first recipe, as far as this machine knows them: config, formats, bad rows."""

import os
import re
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from lora_cli.data.examples import open_source
from lora_cli.data.formats import FORMATS
from lora_cli.data.records import BadRow
from lora_cli.data.sources import DataSource, eval_sources, train_sources
from lora_cli.data.turns import TurnOptions
from lora_cli.errors import LoraError
from lora_cli.model.model_source import find_model, load_config, load_tokenizer
from lora_cli.model.tasks import is_supported
from lora_cli.recipe.schema import DataSpec, ModelSpec
from lora_cli.recipe.tasks import EVERY_TASK, FormatName, TaskName

Info = Callable[[str], None]

MAX_READ = 100_000  # rows that are parsed
MAX_BAD = 0.1  # share of rows that a run may skip by default
CUT = "cut to their last answer"
CPU = torch.device("cpu")


class FoundModel(NamedTuple):
    """A base model as far as this machine knows it."""

    path: str
    config: PretrainedConfig | None  # None: not on this machine, and the hub does not answer
    why_unknown: str = ""

    @property
    def tasks(self) -> list[TaskName]:
        """The tasks that it can be trained for; all of them if its config is not known."""
        return [task for task in EVERY_TASK if self.config is None or is_supported(self.config, task)]


class FoundRows(NamedTuple):
    """Rows of a source, and what they can be used for."""

    path: str
    formats: dict[TaskName, FormatName]  # the best first
    columns: dict[str, str | None]
    rows: int
    complete: bool  # whether all rows were read
    bad: dict[str, int]  # by reason


def find_first_model(path: str, *, info: Info) -> FoundModel:
    """Find the base model `path`, and read its config and its tokenizer, without weights.

    Raises:
        LoraError: a local path is not a model that can be trained, or its files are damaged.
    """
    spec = ModelSpec(path=path)
    try:
        source = find_model(spec, dtype=torch.float32, device=CPU, info=info, weights=False)
        model = FoundModel(path, load_config(source))
        load_tokenizer(source)
        if not model.tasks:
            raise LoraError(f"model.path: {path} cannot be trained", hint="give a language model, or a classifier")
        return model
    except LoraError as error:
        # A folder of this machine can have the name of a hub id.
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and not path.startswith(".") and not os.path.lexists(path):
            return FoundModel(path, None, error.message)
        raise


def find_first_rows(path: str, model: FoundModel, *, info: Info) -> FoundRows:
    """Read the rows at `path` in each format that a task of the model has.

    Raises:
        LoraError: there are no rows, no format fits them, or too many of them are bad.
    """
    (source,) = train_sources(DataSpec(train=path), info=info)
    formats: dict[TaskName, FormatName] = {}
    columns: dict[str, str | None] = {}
    problem: LoraError | None = None
    for task in model.tasks:
        try:
            found = open_source(source, task, TurnOptions()).format
        except LoraError as error:
            problem = problem or error
            continue
        formats[task] = found.name
        columns = columns or found.columns
    if problem is not None and not formats:
        raise problem
    ranked = sorted(formats, key=lambda task: -len(FORMATS[formats[task]].required))
    rows, complete, bad = _count(source, ranked[0], TurnOptions())
    if bad:  # with on_bad_row: skip, a conversation is cut to its last answer
        bad = _count(source, ranked[0], TurnOptions(cut_end=True))[2] or {CUT: sum(bad.values())}
    if sum(bad.values()) > MAX_BAD * rows and CUT not in bad:
        reason = max(bad, key=lambda each: bad[each])
        raise LoraError(
            f"{path}: {sum(bad.values()):,} of {rows:,} rows cannot be used as {formats[ranked[0]]}: {reason}",
            hint="correct them, or give other rows",
        )
    return FoundRows(path, {task: formats[task] for task in ranked}, columns, rows, complete, bad)


def count_held_out(path: str, rows: FoundRows, task: TaskName) -> tuple[int, bool]:
    """Return the number of the evaluation rows at `path`, and whether these are all.

    Raises:
        LoraError: there are none, they are training rows too, or do not have the format and columns of those.
    """
    spec = DataSpec(train=rows.path, eval=path, format=rows.formats[task], columns=rows.columns)
    (source,) = eval_sources(spec, train_sources(spec))
    count, complete, bad = _count(source, task, TurnOptions(cut_end=bool(rows.bad)))
    if bad and not rows.bad:
        reason = max(bad, key=lambda each: bad[each])
        raise LoraError(
            f"{path}: {sum(bad.values()):,} of {count:,} rows cannot be used as {rows.formats[task]}: {reason}",
            hint="correct them, or give other rows",
        )
    return count, complete


def _count(source: DataSource, task: TaskName, turns: TurnOptions) -> tuple[int, bool, dict[str, int]]:
    """Return the number of rows, whether these are all, and the bad ones by reason."""
    reader = open_source(source, task, turns)
    bad: Counter[str] = Counter()
    rows = 0
    for row in islice(reader.rows, MAX_READ):
        rows += 1
        if isinstance(row.example, BadRow):
            bad[row.example.reason] += 1
    return rows, next(iter(reader.rows), None) is None, dict(bad)
