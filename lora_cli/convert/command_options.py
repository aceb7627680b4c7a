"""Options of a command in the names of its tool's config, and the lines of what a command has beside them. No torch."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lora_cli.convert.config import Config
from lora_cli.convert.draft import Draft

Values = dict[str, Any]
# Options of `trl sft` that it passes to accelerate.
ACCELERATE = (
    "accelerate_config", "num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port",
    "gpu_ids", "config_file",
)  # fmt: skip
MACHINES = ("nnodes", "num_machines", "num_nodes", "node_rank", "machine_rank")


def with_names_of_config(config: Config, tool: str, known: frozenset[str]) -> Config:
    """Return a command's options under the keys of the tool's config.

    Args:
        config: the options, as written.
        tool: as in --from.
        known: keys of the tool's config.
    """
    values = {key: _copied(value) for key, value in config.values.items()}
    for key in [key for key, value in values.items() if key.startswith("no_") and value is True]:
        if key not in known and key.removeprefix("no_") in known:
            values[key.removeprefix("no_")] = not values.pop(key)
    if change := CHANGES.get(tool):
        change(values)
    places = dict(config.places)
    for key in values:
        places.setdefault(key, next(iter(config.places.values()), str(config.file)))
    return replace(config, values=values, places=places)


def carry_command(draft: Draft) -> None:
    """Add the lines of what a command has beside options: its launcher, other words and other commands."""
    for name in ("num_processes", "nproc_per_node", "num_gpus"):
        count = draft.config.get(f"launcher.{name}")
        if isinstance(count, int):
            draft.carry(f"launcher.{name}", "distributed.processes", count)
    for name in MACHINES:
        draft.no_effect(f"launcher.{name}", "start `lora train` on each machine: rows per step count all of them")
    for key, _ in draft.config.leaves():
        if key.startswith("launcher."):
            draft.no_effect(key, "how processes are started: `distributed:` has the options here")
    draft.refuse("arguments", "belongs to no option, and is not read; accepted: without it")
    for name in draft.config.names("further runs"):
        draft.refuse(f"further runs.{name}", "a recipe is one run: convert it on its own; accepted: the first run")
    draft.no_effect("unread cells", "magics, other languages and lines that start no training are not read")
    for name in draft.config.names("other commands"):
        draft.no_effect(f"other commands.{name}", "is not the command that trains")


def _litgpt(values: Values) -> None:
    """`litgpt finetune_lora FOLDER --data JSON --data.json_path x`: the arguments of a class are in init_args."""
    for section in ("data", "optimizer"):
        options = values.get(section)
        if isinstance(options, dict):
            own = {key: value for key, value in options.items() if key in ("class_path", "init_args")}
            others = {key: value for key, value in options.items() if key not in own}
            values[section] = {**own, "init_args": {**own.get("init_args", {}), **others}} if others else own
    if "checkpoint_dir" not in values and (words := values.get("arguments")):
        values["checkpoint_dir"] = words.pop(0)
        if not words:
            del values["arguments"]


def _axolotl(values: Values) -> None:
    """`axolotl train config.yml --launcher torchrun`."""
    if isinstance(values.get("launcher"), str):
        values["launcher"] = {"program": values["launcher"]}


def _trl(values: Values) -> None:
    """`trl sft --num_processes 2`."""
    moved = {key: values.pop(key) for key in ACCELERATE if key in values}
    if moved:
        launcher = values.get("launcher", {})
        values["launcher"] = {**(launcher if isinstance(launcher, dict) else {"program": launcher}), **moved}


CHANGES: dict[str, Callable[[Values], None]] = {"litgpt": _litgpt, "axolotl": _axolotl, "trl": _trl}


def _copied(value: Any) -> Any:
    return {key: _copied(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value
