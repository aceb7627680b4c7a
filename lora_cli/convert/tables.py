"""Tables of another tool's keys that need no code: carried as they are, without effect, or not offered. No torch."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from lora_cli.convert.config import Config, Unreadable, as_switch
from lora_cli.convert.draft import Draft

# Reasons that several tools share.
LOGGING = "logging: metrics.jsonl records every step"
TRACKING = "logging: metrics.jsonl records every step; the recipe's `tracking` section is for trackers"
HARDWARE = "speed and memory only: chosen for the device here"
SHARDING = "where the base is stored: `distributed: {strategy: auto}` shards it where it does not fit"
UPLOAD = "nothing is uploaded"
CACHE = "encoded rows are cached and read by as many processes as fit"
ORDER_ONLY = "the order of rows in a batch: rows are packed, or batched by length"
EVALUATION = "evaluation only"
OTHER_TASKS = "for another task than supervised fine-tuning"
CODE = "where code runs, not what it computes"
RESUME = "a run continues with `lora train RECIPE --resume`"
PRECISION = "precision of the computation: what is left in float32 uses TF32 with a 16-bit model.dtype"
GENERATION = "generation after training"
PADDING = "padding carries no loss"
OWN_TOKENIZER = "the tokenizer of the base is used"

Keys = Mapping[str, str]  # reason: keys, separated by spaces


class KeyTable(NamedTuple):
    """What becomes of the keys of a tool that need no code of their own."""

    # key: (key of the recipe, how it is read)
    carried: Mapping[str, tuple[str, Callable[[Config, str], Any]]] = MappingProxyType({})
    no_effect: Keys = MappingProxyType({})
    same: Keys = MappingProxyType({})  # this tool does the same without the key, whatever its value
    # `key=value`: this value asks for nothing; without one, false, 0 and an empty value do. Null always does.
    not_offered: Keys = MappingProxyType({})
    other_task: Keys = MappingProxyType({})
    handled: str = ""  # keys that code handles, separated by spaces

    def known(self) -> set[str]:
        """Return every key of the table."""
        return {*self.grouped(), *self.handled.split()}

    def grouped(self) -> set[str]:
        """Return the keys that need no code."""
        groups = [*self.no_effect.values(), *self.same.values(), *self.not_offered.values(), *self.other_task.values()]
        return {*self.carried, *(word.partition("=")[0] for words in groups for word in words.split())}


def apply_table(draft: Draft, table: KeyTable) -> None:
    """Add the lines of the table's keys that the config has, except of `handled`, and carry their values."""
    for key, (to, read) in table.carried.items():
        if draft.config.get(key) not in (None, "", [], {}):
            draft.carry(key, to, read(draft.config, key))
    same = partial(draft.same, computed=True)
    for add, groups in (
        (draft.no_effect, table.no_effect),
        (same, table.same),
        (draft.refuse, table.not_offered),
        (draft.other_task, table.other_task),
    ):
        for reason, words in groups.items():
            for word in words.split():
                key, _, neutral = word.partition("=")
                value = draft.config.raw(key)
                if value is None:
                    continue  # `finish` says that it is not set
                if neutral and _is(value, neutral):
                    draft.same(key, f"the default of {draft.tool}, and what is done here")
                elif add == draft.other_task and as_switch(value) is False:
                    draft.same(key, "asks for nothing")
                elif neutral:
                    draft.refuse(key, reason, always=True)  # false and 0 are not what it is without the key
                else:
                    add(key, reason)


def _is(value: Any, written: str) -> bool:
    if isinstance(value, Unreadable):
        return False
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(written) == float(value)
        except ValueError:
            return False
    return str(value).lower() == written.lower()


def join(*tables: KeyTable) -> KeyTable:
    """Return one table of several; the keys of the first win."""
    owners: dict[str, int] = {}
    for index, table in enumerate(tables):
        for key in table.grouped():
            owners.setdefault(key, index)

    def merged(parts: list[Keys]) -> dict[str, str]:
        result: dict[str, str] = {}
        for index, part in enumerate(parts):
            for reason, words in part.items():
                own = [word for word in words.split() if owners[word.partition("=")[0]] == index]
                result[reason] = " ".join([*result.get(reason, "").split(), *own])
        return result

    return KeyTable(
        {key: entry for table in reversed(tables) for key, entry in table.carried.items()},
        merged([table.no_effect for table in tables]),
        merged([table.same for table in tables]),
        merged([table.not_offered for table in tables]),
        merged([table.other_task for table in tables]),
        " ".join(table.handled for table in tables),
    )
