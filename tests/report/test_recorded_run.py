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


def test_a_pipe_in_place_of_a_log_is_not_waited_for(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    for name in ("metrics.jsonl", "answers.jsonl"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    notes = read(folder).notes
    assert f"{folder}/metrics.jsonl is a pipe, not a file" in notes
    assert f"{folder}/answers.jsonl is a pipe, not a file" in notes


def test_a_log_in_another_order_is_sorted_and_told(tmp_path: Path):
    folder = write_run(tmp_path / "a", steps=5, every=0)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[2:], *lines[:4]]) + "\n")
    run = read(folder)
    assert [record["step"] for record in run.steps] == [1, 2, 3, 4, 5]
    assert run.notes[0] == "metrics.jsonl has 2 steps more than once: the last record is shown"
    assert not any("lacks" in note for note in run.notes)


def test_the_start_of_a_run_from_an_adapter_is_not_the_base(tmp_path: Path):
    from lora_cli.report.answers import answer_sources
    from lora_cli.report.tables import summary

    folder = write_run(tmp_path / "a", changes={"origins": [{"adapter": "runs/b", "digest": "0", "step": 20}]})
    (folder / "recipe.yaml").write_text("adapter: {method: lora, from: runs/b}\n")
    records = [{"step": 0, "eval_loss": 1.0}, {"step": 40, "eval_loss": 2.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    (folder / "answers.jsonl").write_text('{"step": 0, "where": "x", "prompt": "Who?", "answer": "I."}\n')
    run = read(folder)
    assert run.best == records[0]
    assert ("Loss before training, held-out rows", "1.0000") in summary(run)
    assert answer_sources(run)[0].prompts[0].answers[0].model == "start"


def test_commands_on_the_page_can_be_pasted(tmp_path: Path):
    folder = write_run(tmp_path / "my run; ls", steps=12, finished=False, changes={"steps": 100})
    run = read(folder)
    assert run.eval_command is None, "there is no adapter to measure"
    assert run.notes == [
        f"the run has not ended: lora train '{folder}/recipe.yaml' --resume goes on from its first step"
    ]
    done = read(write_run(tmp_path / "my run", changes={"ledger": {}}))
    assert done.eval_command == f"lora eval '{done.folder}' --data FILE --json '{done.folder}/eval.json'"


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
    folder = write_run(tmp_path / "a")
    (folder / "checkpoints" / "step-00000010").mkdir(parents=True)
    with pytest.raises(LoraError, match="is not the folder of a run") as caught:
        check_is_run(tmp_path)
    assert caught.value.hint == f"lora runs {tmp_path} lists the runs in it"
    for inside in ("adapter", "checkpoints/step-00000010", "recipe.yaml"):
        with pytest.raises(LoraError, match="is not") as caught:
            check_is_run(folder / inside)
        assert caught.value.hint == f"give its run: {folder}"
