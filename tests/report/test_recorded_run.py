"""Runs in any state are read: finished, running, stopped, failed, without steps, damaged; what is missing is told."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lora_cli.errors import LoraError
from lora_cli.report.recorded_run import RecordedRun, check_is_run, read_run
from lora_cli.run.folder import open_run
from tests.report.recorded import ADAPTER, evaluation, write_run


def read(folder: Path, *checkpoints: int) -> RecordedRun:
    return read_run(folder, name="a", checkpoints=checkpoints)


def test_a_finished_run(tmp_path: Path):
    run = read(write_run(tmp_path / "a"))
    assert run.state.describe() == "finished after 40 steps"
    assert [record["step"] for record in run.steps] == list(range(1, 41))
    assert run.best == {"step": 30, "eval_loss": 1.3 + (0.75 - 0.7) ** 2, "eval_accuracy": 0.5}
    assert run.adapter == ADAPTER
    assert run.notes == []


def test_a_stopped_run_tells_how_to_go_on(tmp_path: Path):
    run = read(write_run(tmp_path / "a", steps=12, finished=False, changes={"steps": 100}), 5, 10)
    assert run.state.describe() == "stopped at step 12 of 100"
    assert run.notes == [f"the run has not ended: lora train {tmp_path}/a/recipe.yaml --resume goes on from step 10"]


def test_a_locked_run_is_running(tmp_path: Path):
    folder = write_run(tmp_path / "a", steps=12, finished=False, changes={"steps": 100})
    with open_run(folder, resume=True):
        run = read(folder, 10)
        assert run.state.describe() == "running, step 12 of 100"
        assert run.state.process == str(os.getpid())
    assert read(folder, 10).state.name == "stopped"


def test_the_error_that_ends_a_run_is_recorded_and_a_continued_run_forgets_it(tmp_path: Path):
    folder = write_run(tmp_path / "a", steps=12, finished=False)

    def train() -> None:
        with open_run(folder, resume=True) as opened:
            opened.begin()
            raise LoraError("the loss is not finite", hint="lower it")

    with pytest.raises(LoraError):
        train()
    run = read(folder)
    assert (run.state.name, run.state.error, run.state.hint) == ("failed", "the loss is not finite", "lower it")
    assert "the run failed: the loss is not finite (hint: lower it)" in run.notes
    with open_run(folder, resume=True) as opened:
        opened.begin()
    assert read(folder).state.name == "stopped"


def test_an_error_before_the_training_changes_nothing(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    with pytest.raises(LoraError), open_run(folder, resume=True):
        raise LoraError("the rows changed")
    assert read(folder).state.name == "finished"


def test_a_run_without_steps(tmp_path: Path):
    run = read(write_run(tmp_path / "a", steps=0, every=0, finished=False))
    assert run.state.describe() == "no step yet"
    assert run.notes == ["metrics.jsonl has no step: there are no curves"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "manifest.json", "recipe.yaml", "adapter/checksums.json"])
@pytest.mark.parametrize("damage", [None, b"", b"{", b"\xff\xfe\x00", b'["a", 1]\n', b"[" * 5000])
def test_a_damaged_file_is_a_note(tmp_path: Path, name: str, damage: bytes | None):
    folder = write_run(tmp_path / "a")
    if damage is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(damage)
    notes = read(folder).notes
    assert any(name.rpartition("/")[2] in note for note in notes) or (name, damage) == ("recipe.yaml", b"")


def test_lines_that_cannot_be_read_are_counted(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[3] = lines[3][:20]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 41, "lo')
    notes = read(folder).notes
    assert f"metrics.jsonl: 1 of {len(lines)} lines cannot be read, and are left out" in notes
    assert "metrics.jsonl lacks 1 of 40 steps" in notes


@pytest.mark.parametrize("key", ["ledger", "coverage", "label_mask", "result", "versions", "machine", "base", "steps"])
@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [[]], {"train": 1}, [{"tokens": [1]}]])
def test_a_manifest_can_have_any_value(tmp_path: Path, key: str, value: Any):
    from lora_cli.report.page import Report, ReportedRun, render_page

    run = read(write_run(tmp_path / "a", changes={key: value}))
    assert "<html" in render_page(Report([ReportedRun(run)], {}, "now"), library="")


def test_results_of_lora_eval_in_the_run_folder_are_found(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    (folder / "eval.json").write_text(json.dumps(evaluation(losses=[1.0] * 8)))
    (folder / "other.json").write_text(json.dumps(evaluation(losses=[1.0] * 8, adapter="cd" * 32)))
    (folder / "notes.json").write_text('{"rows": 1}')
    found = read(folder).measurements
    assert [(each.file, each.of_adapter) for each in found] == [("eval.json", True), ("other.json", False)]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(LoraError, match="is not a folder"):
        check_is_run(tmp_path / "missing")
    with pytest.raises(LoraError, match="is not the folder of a run"):
        check_is_run(tmp_path)
