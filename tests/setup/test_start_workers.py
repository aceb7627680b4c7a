"""Starting workers: which process starts some, what a further start continues, what is passed on to the workers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from lora_cli.errors import LoraError
from lora_cli.recipe.schema import Recipe
from lora_cli.run.worker import RENDEZVOUS
from lora_cli.setup import start_workers as module
from lora_cli.setup.start_workers import StartRequest, resumes_after_restart, start_workers
from lora_cli.training import launch, process_group
from lora_cli.training.peers import Peers

RECIPE = Recipe.model_validate({"model": {"path": "base"}, "data": {"train": "rows.jsonl"}, "output": "runs/a"})
Starts = list[list[str]]


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Starts:
    """The arguments of each start of workers; each fails. The inputs of the run are not looked at."""
    found: Starts = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "check_before_rows", lambda _: None)
    monkeypatch.setattr(module, "load_inputs", lambda *_, **__: type("Inputs", (), {"template_date": None}))
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 0)

    def start(_: int, arguments: list[str], **options: Any) -> launch.Outcome:
        found.append(arguments)
        return launch.Outcome(1)

    monkeypatch.setattr(launch, "launch_workers", start)
    return found


def begin(starts: Starts, monkeypatch: pytest.MonkeyPatch, *, at: int) -> None:
    """Let start number `at` (from 0) write the records of the run before it fails."""
    launch_workers: Callable[[int, list[str]], launch.Outcome] = launch.launch_workers

    def start(processes: int, arguments: list[str], **options: Any) -> launch.Outcome:
        outcome = launch_workers(processes, arguments)
        if len(starts) == at + 1:
            Path("runs/a/recipe.yaml").unlink(missing_ok=True)
            Path("runs/a/recipe.yaml").write_text("a: 1")
        return outcome

    monkeypatch.setattr(launch, "launch_workers", start)


def test_one_process_without_restarts_trains_by_itself(starts: Starts):
    assert start_workers(RECIPE, StartRequest(False, False, ["train"])) is None
    assert starts == []


def test_the_only_worker_of_a_run_trains_by_itself(starts: Starts, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(process_group.SUPERVISED, "1")
    assert start_workers(RECIPE, StartRequest(False, False, ["train"])) is None


@pytest.mark.parametrize("option", [["--max-restarts", "2"], ["--max-restarts=2"]])
def test_a_worker_is_not_told_of_restarts(option: list[str], starts: Starts):
    request = StartRequest(False, False, ["train", *option, "recipe.yaml"], 2)
    assert start_workers(RECIPE, request) == 1
    assert starts == [["train", "recipe.yaml"]] * 3


@pytest.mark.parametrize(
    ("begun_at", "fresh", "earlier", "expected"),
    [
        (0, False, False, [[], ["--resume"], ["--resume"]]),
        (1, False, False, [[], [], ["--resume"]]),  # the first one died before the run had begun
        (0, True, True, [["--fresh"], ["--resume"], ["--resume"]]),
        (1, True, True, [["--fresh"], ["--fresh"], ["--resume"]]),  # the earlier run was still in place
    ],
)
def test_a_further_start_resumes_a_run_that_has_begun(
    begun_at: int, fresh: bool, earlier: bool, expected: Starts, starts: Starts, monkeypatch: pytest.MonkeyPatch
):
    if earlier:
        Path("runs/a").mkdir(parents=True)
        Path("runs/a/.lora-lock").touch()
        Path("runs/a/recipe.yaml").write_text("a: 1")
    begin(starts, monkeypatch, at=begun_at)
    arguments = ["--fresh"] if fresh else []
    assert start_workers(RECIPE, StartRequest(False, fresh, arguments, 2)) == 1
    assert starts == expected


def test_restarts_of_torchruns_workers_are_torchruns(monkeypatch: pytest.MonkeyPatch):
    for name in RENDEZVOUS:
        monkeypatch.setenv(name, "0" if "RANK" in name else "1")
    assert start_workers(RECIPE, StartRequest(False, False, [])) is None
    with pytest.raises(LoraError, match=r"^--max-restarts: ") as raised:
        start_workers(RECIPE, StartRequest(False, False, [], 1))
    assert "torchrun --max-restarts N" in str(raised.value.hint)


def test_workers_that_torchrun_starts_again_resume_a_run_that_they_have_begun():
    store: Any = HashStore()  # torchrun's, which lasts
    first, second = (Peers(store, rank=0, world_size=1) for _ in range(2))
    assert not resumes_after_restart(None)
    assert not resumes_after_restart(first)  # whatever is in the run folder
    first.mark_begun()
    assert resumes_after_restart(second)
