"""What processes of a run compare: versions, recipes, GPUs, rows, weights and checkpoints; a difference is named."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from lora_cli.recipe.schema import Recipe
from lora_cli.training import agreement
from lora_cli.training.peers import Peers, RunError

GIB = 2**30


def recipe(**training: Any) -> Recipe:
    return Recipe.model_validate({"model": {"path": "base"}, "data": {"train": "rows.jsonl"}, "training": training})


@pytest.fixture
def peers() -> list[Peers]:
    """Two processes of one run, on machines a and b."""
    store = HashStore()
    found = [Peers(store, rank=rank, world_size=2) for rank in range(2)]
    for each in found:
        each.hosts, each._store = ["a", "b"], found[0]._store
    return found


def start(peers: list[Peers], *records: dict[str, Any]) -> list[str]:
    told: list[str] = []
    agreement.check_start(peers[0], records, info=told.append)
    return told


def record(**changes: Any) -> dict[str, Any]:
    return {**agreement.start_record(recipe(), torch.device("cpu")), **changes}


def gpu(number: int, name: str = "H200", memory: float = 140) -> dict[str, Any]:
    return record(gpu={"name": name, "memory": int(memory * GIB), "uuid": str(number)})


def test_equal_processes_start_without_a_word(peers: list[Peers]):
    assert start(peers, record(), record()) == []
    assert start(peers, gpu(1), gpu(2, memory=140.4)) == []


def test_other_versions_are_refused(peers: list[Peers]):
    other = record(versions={**record()["versions"], "torch": "2.0.1"})
    with pytest.raises(RunError, match=r"^process 1 \(b\) has another torch than process 0 \(a\): 2\.0\.1, not "):
        start(peers, record(), other)


def test_another_recipe_is_refused_with_its_keys(peers: list[Peers]):
    other = agreement.start_record(recipe(seed=1, max_steps=3, epochs=None), torch.device("cpu"))
    with pytest.raises(RunError) as raised:
        start(peers, record(), other)
    assert raised.value.message.startswith("process 1 (b) has another training.")
    assert "training.seed" in raised.value.message
    assert raised.value.hint == "start all processes with the same recipe and the same options"


def test_unequal_gpus_are_told(peers: list[Peers]):
    assert start(peers, gpu(1), gpu(2, "RTX 4090", 24)) == [
        "note: unequal devices: process 0 (a): H200, 140.0 GiB; process 1 (b): RTX 4090, 24.0 GiB; each step takes the "
        "time of the slowest, and must fit on the smallest"
    ]
    assert "process 1 (b): H200, 100.0 GiB" in start(peers, gpu(1), gpu(2, memory=100))[0]


def test_two_processes_on_one_gpu_are_refused(peers: list[Peers]):
    assert start(peers, gpu(1), gpu(1)) == []  # of two machines
    for each in peers:
        each.hosts = ["a", "a"]
    with pytest.raises(RunError, match=r"^processes 0, 1 \(a\) have the same GPU$"):
        start(peers, gpu(1), gpu(1))


def test_the_record_has_the_properties_of_the_gpu(monkeypatch: pytest.MonkeyPatch):
    found = SimpleNamespace(name="H200", total_memory=140 * GIB, uuid="4711")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    assert agreement.start_record(recipe(), torch.device("cuda", 1))["gpu"] == {
        "name": "H200",
        "memory": 140 * GIB,
        "uuid": "4711",
    }


STATE = {"data": "d", "model": "m", "total_steps": 9}


def compare(peers: list[Peers], other: dict[str, Any], *, steps: tuple[int | None, int | None]) -> list[RunError]:
    """Return the errors of both processes; the second has `other` values and checkpoint `steps[1]`."""
    errors: list[RunError] = []

    def check(rank: int) -> None:
        try:
            agreement.check_inputs_equal(
                peers[rank], {**STATE, **(other if rank else {})}, step=steps[rank], output="runs/a"
            )
        except RunError as error:
            errors.append(error)

    thread = threading.Thread(target=check, args=(1,))
    thread.start()
    check(0)
    thread.join()
    return errors


def test_equal_inputs_pass(peers: list[Peers]):
    assert compare(peers, {}, steps=(4, 4)) == []
    agreement.check_inputs_equal(None, STATE, step=None, output="runs/a")


@pytest.mark.parametrize(
    ("other", "steps", "message"),
    [
        ({"data": "x"}, (None, None), "process 1 (b) has other rows (data) than process 0 (a)"),
        ({"model": "x"}, (None, None), "process 1 (b) has other weights of the base (model.path) than process 0 (a)"),
        ({"total_steps": 8}, (None, None), "process 1 (b) has other number of steps than process 0 (a)"),
        (
            {"data": "x"},
            (50, None),
            "process 1 (b) resumes from no checkpoint, process 0 (a) from the checkpoint of step 50 of runs/a",
        ),
    ],
)
def test_a_machine_with_other_files_is_named_by_all_processes(
    other: dict[str, Any], steps: tuple[int | None, int | None], message: str, peers: list[Peers]
):
    errors = compare(peers, other, steps=steps)
    assert [error.message for error in errors] == [message] * 2
    assert all("on a disk that all machines share" in str(error.hint) for error in errors)
