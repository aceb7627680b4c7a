"""`lora report` of real runs: what training, eval, merge and export record is on the page; where it may be written."""

import json
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from lora_cli.commands import report
from lora_cli.evaluation import bootstrap
from lora_cli.report.page import CONTROL_PICTURES
from lora_cli.run.folder import open_run
from lora_cli.run.run_results import PAGE_MARK
from tests.commands.conftest import Lora, WriteRecipe, rows
from tests.report.recorded import evaluation, write_run


def table_rows(page: str, caption: str) -> list[list[str]]:
    """Return the texts of the first table whose caption begins with `caption`."""
    table = next(t for t in re.findall(r"<table>.*?</table>", page, re.DOTALL) if f"<caption>{caption}" in t)
    body = re.findall(r"<tr>.*?</tr>", table.partition("<tbody>")[2], re.DOTALL)
    return [[unescape(cell) for cell in re.findall(r"<bdi>(.*?)</bdi>", row, re.DOTALL)] for row in body]


@pytest.fixture
def page_of(lora: Lora, chart_cache: None):
    """Return a function that makes the report of runs and returns the page."""

    def make(*arguments: str) -> str:
        result = lora("report", *arguments)
        assert result.code == 0, result.err
        return Path(result.out.strip().splitlines()[-1]).read_text()

    return make


@pytest.fixture
def chart_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the chart library, which takes seconds to make: tests/report/test_browser.py runs it."""
    monkeypatch.setattr("lora_cli.commands.report.chart_library", lambda info: "/* charts */")


def test_the_page_has_what_the_run_has_recorded(trained_run: Path, page_of):
    page = page_of("runs/a")
    manifest = json.loads((trained_run / "manifest.json").read_text())
    records = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    assert [row[1] for row in table_rows(page, "Evaluations")] == [
        f"{each['eval_loss']:.4f}" for each in records if "eval_loss" in each
    ]
    ledger = manifest["ledger"]
    for split in ("train", "eval"):
        histogram = ledger[split]["histogram"]
        assert sum(histogram["rows"]) == ledger[split]["rows"]
        assert histogram["first"] == ledger[split]["lengths"]["min"]
    bars = table_rows(page, "Rows by their tokens")
    assert sum(int(rows) for split, _, rows in bars if split == "train") == ledger["train"]["rows"]
    assert (
        sum(int(row[4].replace(",", "")) for row in table_rows(page, "Layers that carry"))
        == (manifest["trainable_parameters"])
    )
    mask = manifest["label_mask"][0]
    marked = "".join(re.findall(r"<span>(.*?)</span>", page.partition("<mark>")[2].partition("</mark>")[0], re.DOTALL))
    first, stop = mask["loss"][0]
    assert unescape(marked) == "".join(mask["tokens"][first:stop])
    assert (
        unescape(marked)
        .strip()
        .startswith(rows(24)[int(mask["where"].rpartition(":")[2]) - 1]["messages"][1]["content"])
    )
    assert all(each["peak_memory"] > 0 for each in records if "loss" in each)
    kinds = {row[0] for row in table_rows(page, "Size and rank of the updates")}
    assert kinds == {row[0] for row in table_rows(page, "Layers that carry")}
    assert "No answers are recorded" in page


@pytest.mark.slow
def test_answers_intervals_and_verdicts_of_the_adapter_are_found(trained_run: Path, lora: Lora, page_of):
    assert lora("eval", "runs/a", "--data", "rows.jsonl", "--answers", "2", "--json", "runs/a/eval.json").code == 0
    assert lora("merge", "runs/a", "--out", "runs/merged").code == 0
    assert lora("export", "runs/a", "--to", "peft", "--out", "runs/peft", "--verify", "file").code == 0
    measured = json.loads((trained_run / "eval.json").read_text())
    digest = json.loads((trained_run / "adapter/checksums.json").read_text())["files"]["adapter_model.safetensors"]
    assert measured["adapters"] == {"adapter": digest["sha256"]}
    loss, units = np.array(measured["losses_of_rows"]["adapter"]), np.array(measured["units_of_rows"])
    assert loss.sum() / units.sum() == pytest.approx(measured["results"]["adapter"]["loss"], rel=1e-12)
    verdict = json.loads(Path("runs/merged/merge.json").read_text())
    assert verdict["adapter"] == digest["sha256"]
    assert verdict["logits"]["retained"] == pytest.approx(1, abs=0.01)

    page = page_of("runs/a")
    low, high = bootstrap.mean_interval(loss, units)[1:]
    assert f"{low:.4f} to {high:.4f}" in page
    for prompt in measured["answers"]:
        assert prompt["answers"]["adapter"]["text"].translate(CONTROL_PICTURES) in unescape(page)
    assert ["logits", "not compared"] not in table_rows(page, "Merge: merged")
    assert [row[1] for row in table_rows(page, "Export: peft")] != []
    assert "Merge: merged" in page_of("runs/a", "--out", "again.html")


def test_answers_during_training_are_side_by_side(trained_run: Path, page_of):
    records = [
        {"step": step, "where": "rows.jsonl:1", "prompt": "Who?", "references": ["A fox."], "answer": f"after {step}"}
        for step in (0, 2, 4)
    ]
    (trained_run / "answers.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    page = page_of("runs/a")
    answers = re.findall(r'<div class="answer"><h5><bdi>(.*?)</bdi>.*?dir="auto">(.*?)</div>', page, re.DOTALL)
    assert answers == [("base", "after 0"), ("step 4", "after 4"), ("step 2", "after 2")]


def test_a_run_that_keeps_the_best_step_has_an_interval(recipe: WriteRecipe, lora: Lora, page_of):
    changes = {"training.keep": "best", "training.max_steps": 2, "training.eval_every": 1, "data.eval": 0.5}
    assert lora("train", recipe(changes)).code == 0
    page = page_of("runs/a")
    assert "95% interval of the adapter&#39;s loss" in page or "95% interval of the adapter's loss" in page
    assert "checkpoint step-0000000" in page


def test_a_run_without_an_adapter_needs_no_torch(tmp_path: Path):
    write_run(tmp_path / "a", finished=False)
    code = (
        "import sys; from pathlib import Path; from lora_cli.commands import report, runs\n"
        "report.chart_library = lambda info: ''\n"
        "report.report([Path('a')], report.ReportRequest(Path('a.html'), False, [], [], False, 0))\n"
        "runs.runs(Path('.')); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True).returncode == 0


def test_where_the_page_may_be_written(trained_run: Path, lora: Lora, page_of):
    assert page_of("runs/a").startswith(PAGE_MARK)
    assert Path("runs/a/report.html").is_file()
    page = page_of("runs/a")
    assert page_of("runs/a") == page, "a report is replaced, and equal files give an equal page"
    Path("mine.html").write_text("<html>my own page")
    for out, problem in (
        ("mine.html", "exists, and is no report"),
        ("missing/a.html", "there is no folder missing"),
        ("runs", "is a folder"),
    ):
        result = lora("report", "runs/a", "--out", out)
        assert (result.code, problem in result.last_two[0]) == (2, True), result.err
    assert Path("mine.html").read_text() == "<html>my own page"


def test_the_page_is_printed(trained_run: Path, lora: Lora, chart_cache: None):
    assert lora("report", "runs/a").code == 0
    printed = lora("report", "runs/a", "--out", "-")
    assert printed.code == 0, printed.err
    assert printed.out == (trained_run / "report.html").read_text()
    assert not Path("-").exists()


def test_the_end_of_a_process_is_news_for_a_watched_page(tmp_path: Path):
    folder = write_run(tmp_path / "a", finished=False)
    with open_run(folder, resume=True):
        training = report._version([folder])
    assert report._version([folder]) != training, "though no file has changed"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nowhere"], "nowhere is not a folder"),
        (["base"], "base is not the folder of a run"),
        (["runs/a", "runs/a"], "runs/a is given twice"),
        (["runs/a", "runs/../runs/a"], "runs/a is given twice"),
        (["runs/a", "--eval", "other.json"], "--eval other.json measured none of these runs' adapters"),
        (["runs/a", "--watch", "--out", "a.html"], "--watch serves the page"),
        (["runs/a", "--port", "80"], "--port is for --watch"),
        (["runs/a", "--out", "-", "--open"], "--out - prints the page, and --open needs a file"),
        (["runs/a", "--out", "-", "--json"], "--out - prints the page, and --json prints to stdout too"),
        (["runs/a", "--eval", "nothing.json"], "--eval nothing.json is not a file"),
        (["runs/a", "--verdict", "nothing"], "--verdict nothing does not exist"),
    ],
)
def test_mistakes(trained_run: Path, lora: Lora, chart_cache: None, arguments: list[str], problem: str):
    Path("other.json").write_text(json.dumps(evaluation(losses=[1.0] * 8)))
    result = lora("report", *arguments)
    assert result.code == 2
    assert problem in result.last_two[0]
    assert result.last_two[1].startswith("hint: ")


def test_a_run_that_fails_says_so(recipe: WriteRecipe, lora: Lora, page_of, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lora_cli.commands.train.checkpoint.save_checkpoint", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lora("train", recipe())
    listed = json.loads(lora("runs", "--json").out)["runs"]
    assert [(each["state"], each["step"]) for each in listed] == [("failed", 2)]
    assert "ZeroDivisionError" in listed[0]["error"]
    assert "the run failed: ZeroDivisionError" in page_of("runs/a")
    monkeypatch.undo()
