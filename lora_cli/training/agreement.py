"""Compare what the processes of a run have: versions, recipe and GPUs before they connect; rows and weights after."""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from lora_cli.recipe.problem import shorten
from lora_cli.recipe.schema import Recipe
from lora_cli.run.console import format_bytes
from lora_cli.training.peers import Peers, RunError

PACKAGES = ("lora-cli", "torch", "transformers", "peft")  # other versions give other numbers, or another protocol
SAME_SIZE = 0.02  # GPUs whose memory differs by less than this share count as equal: the driver takes a part
SHARED = "put it on a disk that all machines share, or copy it to the same path on each machine"


def start_record(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Return what the other processes compare at the start, as JSON."""
    record: dict[str, Any] = {"versions": _versions(), "recipe": _flatten(recipe.model_dump(mode="json")), "gpu": None}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        record["gpu"] = {"name": found.name, "memory": found.total_memory, "uuid": str(found.uuid)}
    return record


def check_start(peers: Peers, records: Sequence[Mapping[str, Any]], *, info: Callable[[str], None]) -> None:
    """Compare the records of all processes, by rank, with that of the first one; tell of unequal GPUs.

    Raises:
        RunError: versions or recipes differ, or two processes have the same GPU.
    """
    for rank, record in enumerate(records):
        for kind, hint in (
            ("versions", "install the same versions on all machines"),
            ("recipe", "start all processes with the same recipe and the same options"),
        ):
            first, own = records[0][kind], record[kind]
            if first != own:
                names = [name for name in {**first, **own} if first.get(name) != own.get(name)]
                raise RunError(
                    f"{peers.name(rank)} has another {names[0]} than {peers.name(0)}: "
                    f"{shorten(str(own.get(names[0])))}, not {shorten(str(first.get(names[0])))}{_and_more(names)}",
                    hint=hint,
                )
    _check_gpus(peers, [record["gpu"] for record in records], info=info)


def check_inputs_equal(peers: Peers | None, state: Mapping[str, Any], *, step: int | None, output: str) -> None:
    """Compare checkpoint, rows and weights of all processes; each has read them on its own machine.

    Args:
        peers: the processes; None: a run of one, where nothing can differ.
        state: of the run, see `run_records.resume_state`.
        step: of the checkpoint that the run is resumed from; None: from the first step.
        output: path of the run folder.

    Raises:
        RunError: another process has found others than the first one.
    """
    if peers is None:
        return
    compared = {"checkpoint": step, "rows": state["data"], "weights": state["model"], "steps": state["total_steps"]}
    found = peers.exchange("inputs", compared)
    for rank, values in enumerate(found):
        name = next((name for name in compared if values[name] != found[0][name]), None)
        if name is None:
            continue
        if name == "checkpoint":
            sees = f"resumes from {_checkpoint(values[name])}, {peers.name(0)} from {_checkpoint(found[0][name])}"
            raise RunError(f"{peers.name(rank)} {sees} of {output}", hint=f"{output}: {SHARED}")
        noun = {"rows": "rows (data)", "weights": "weights of the base (model.path)", "steps": "number of steps"}[name]
        raise RunError(
            f"{peers.name(rank)} has other {noun} than {peers.name(0)}", hint=f"all must read the same files: {SHARED}"
        )


def _checkpoint(step: int | None) -> str:
    return "no checkpoint" if step is None else f"the checkpoint of step {step}"


def _check_gpus(peers: Peers, gpus: Sequence[Mapping[str, Any] | None], *, info: Callable[[str], None]) -> None:
    users: dict[tuple[str, str], list[int]] = {}
    for rank, gpu in enumerate(gpus):
        if gpu is None:
            continue
        users.setdefault((peers.hosts[rank], gpu["uuid"]), []).append(rank)
    if shared := next((ranks for ranks in users.values() if len(ranks) > 1), None):
        raise RunError(
            f"{peers.names(shared)} have the same GPU",
            hint="start at most one process per GPU: torchrun --nproc-per-node, accelerate launch --num_processes; "
            "CUDA_VISIBLE_DEVICES must name the GPUs of the machine",
        )
    kinds: dict[str, list[int]] = {}
    for rank, gpu in enumerate(gpus):
        kinds.setdefault(_describe(gpu, gpus), []).append(rank)
    if len(kinds) > 1:
        listed = "; ".join(f"{peers.names(ranks)}: {kind}" for kind, ranks in kinds.items())
        info(f"note: unequal devices: {listed}; each step takes the time of the slowest, and must fit on the smallest")


def _describe(gpu: Mapping[str, Any] | None, gpus: Sequence[Mapping[str, Any] | None]) -> str:
    """Return name and memory of a GPU, with the memory of the first GPU of its name that is about as large."""
    if gpu is None:
        return "CPU"
    alike = [
        other["memory"]
        for other in gpus
        if other and other["name"] == gpu["name"] and abs(other["memory"] / gpu["memory"] - 1) < SAME_SIZE
    ]
    return f"{gpu['name']}, {format_bytes(alike[0])}"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from its sources
            found[name] = "not installed"
    return found


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested mapping by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _and_more(names: Sequence[str]) -> str:
    return f"; also {', '.join(names[1:])}" if len(names) > 1 else ""
