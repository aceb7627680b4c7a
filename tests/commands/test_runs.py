"""`lora runs`: each state, best and last loss, size, age and recipe; as a table and as JSON."""

import json
import os
import time
from pathlib import Path

import pytest

from lora_cli.commands.runs import describe_age
from lora_cli.run.folder import open_run
from tests.commands.conftest import Lora
from tests.report.recorded import step_record, write_run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four runs in the working folder: finished, stopped, failed, and one that has not begun."""
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/done"))
    write_run(Path("runs/more/halted"), steps=12, finished=False, changes={"steps": 100})
    write_run(Path("runs/failed"), steps=3, every=0, finished=False)
    Path("runs/failed/failed.json").write_text(json.dumps({"error": "the disk is \x1b[31mfull", "hint": None}))
    Path("runs/begun").mkdir()
    Path("runs/begun/.lora-lock").write_text("1\n")
    Path("runs/notes.txt").write_text("mine")
    return tmp_path


def test_json(folder: Path, lora: Lora):
    result = lora("runs", "--json")
    assert result.code == 0
    runs = {each["run"]: each for each in json.loads(result.out)["runs"]}
    assert {run: (each["state"], each["step"], each["steps"]) for run, each in runs.items()} == {
        "runs/done": ("finished", 40, 40),
        "runs/more/halted": ("stopped", 12, 100),
        "runs/failed": ("failed", 3, 3),
        "runs/begun": ("not started", 0, None),
    }
    done = runs["runs/done"]
    assert done["best"] == {"step": 30, "eval_loss": 1.3 + (0.75 - 0.7) ** 2}
    assert done["last_loss"] == step_record(40, steps=40)["loss"]
    assert done["recipe"] == "small.yaml"
    assert done["bytes"] == sum(p.stat().st_size for p in Path("runs/done").rglob("*") if p.is_file())
    assert 0 <= time.time() - done["changed"] < 600
    assert runs["runs/begun"]["best"] is None


def test_the_table(folder: Path, lora: Lora):
    os.utime("runs/done/metrics.jsonl", (1, 1))
    result = lora("runs")
    lines = result.out.splitlines()
    assert lines[0].split() == ["run", "state", "best", "loss", "last", "loss", "size", "changed", "recipe"]
    done = next(line for line in lines if line.lstrip().startswith("runs/done "))
    assert "finished after 40 steps" in done
    assert "1.3025 at 30" in done
    assert "█" in done
    assert "stopped at step 12 of 100" in result.out
    assert result.err == "runs/failed failed: the disk is \\x1b[31mfull\n"


def test_a_locked_run_is_running(folder: Path, lora: Lora):
    with open_run("runs/more/halted", resume=True):
        [run] = json.loads(lora("runs", "runs/more", "--json").out)["runs"]
    assert (run["state"], run["process"]) == ("running", str(os.getpid()))


def test_one_run_and_no_runs(folder: Path, lora: Lora):
    assert [each["run"] for each in json.loads(lora("runs", "runs/done", "--json").out)["runs"]] == ["runs/done"]
    Path("empty").mkdir()
    assert lora("runs", "empty").err == "empty has no runs\n"
    assert json.loads(lora("runs", "empty", "--json").out)["runs"] == []
    result = lora("runs", "nowhere")
    assert (result.code, result.last_two[0]) == (2, "error: there is no folder nowhere")


def test_links_make_no_run_appear_twice_and_break_nothing(folder: Path, lora: Lora):
    Path("runs/again").symlink_to(Path("runs/done").absolute())
    Path("runs/more/up").symlink_to(Path("runs").absolute())
    Path("runs/loop").symlink_to(Path("runs/loop").absolute())
    result = lora("runs", "--json")
    assert result.code == 0
    found = [each["run"] for each in json.loads(result.out)["runs"]]
    assert sorted(found) in (
        ["runs/again", "runs/begun", "runs/failed", "runs/more/halted"],
        ["runs/begun", "runs/done", "runs/failed", "runs/more/halted"],
    )


def test_a_report_makes_no_run_younger(folder: Path, lora: Lora):
    before = json.loads(lora("runs", "runs/done", "--json").out)["runs"][0]
    Path("runs/done/report.html").write_text("a page")
    os.utime("runs/done/report.html", (before["changed"] + 900, before["changed"] + 900))
    after = json.loads(lora("runs", "runs/done", "--json").out)["runs"][0]
    assert (after["changed"], after["bytes"]) == (before["changed"], before["bytes"] + 6)


def test_an_unreadable_log_hides_nothing_else(folder: Path, lora: Lora):
    Path("runs/done/metrics.jsonl").unlink()
    Path("runs/done/metrics.jsonl").symlink_to("x" * 300)
    result = lora("runs", "runs/done")
    assert "finished after 40 steps" in result.out
    assert "small.yaml" in result.out
    Path("runs/done/manifest.json").write_text("{")
    result = lora("runs", "runs/done")
    assert "finished" in result.out, "an adapter is written at the end"
    assert result.err.count("runs/done/manifest.json is not JSON") == result.err.count("runs/done") == 1


@pytest.mark.parametrize(("loss", "text"), [(5e31, "5e+31"), (3.2e-7, "3.2e-07"), (0.0, "0.0000")])
def test_a_loss_of_any_size_is_legible(folder: Path, lora: Lora, loss: float, text: str):
    Path("runs/done/metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss}) + "\n")
    assert f" {text} " in lora("runs", "runs/done").out


@pytest.mark.parametrize("name", ["metrics.jsonl", "manifest.json"])
@pytest.mark.parametrize("damage", [b"", b"[1", b"\xff", b'{"steps": "many"}\n'])
def test_damaged_runs_are_listed(folder: Path, lora: Lora, name: str, damage: bytes):
    (Path("runs/done") / name).write_bytes(damage)
    result = lora("runs", "--json")
    assert result.code == 0
    assert "runs/done" in [each["run"] for each in json.loads(result.out)["runs"]]


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (3 * 86400, "3 days")]
)
def test_ages(seconds: float, text: str):
    assert describe_age(seconds) == text
