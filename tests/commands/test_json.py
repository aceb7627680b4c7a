"""--json: one strict JSON document on stdout and nothing else there, or a file; with an error, its document."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lora_cli.cli.app import with_json_value, without_json
from lora_cli.cli.usage_errors import HintedError
from lora_cli.commands import methods
from lora_cli.run import console, json_output
from lora_cli.setup.run_summary import summarize_run
from tests.commands.conftest import CommandResult, Lora, WriteRecipe


def refuse(name: str) -> None:
    pytest.fail(f"{name} is not JSON")


def document(result: CommandResult) -> dict[str, Any]:
    """Return the document on stdout, which has nothing else."""
    value = json.loads(result.out, parse_constant=refuse)
    assert isinstance(value, dict)
    return value


def test_a_document_controls_no_terminal(capfd: pytest.CaptureFixture[str]):
    value = {"a\x9b": "\x1b[2J\x07\x7f\u202e ünï"}
    json_output.print_document(value)
    text = capfd.readouterr().out
    assert not set(console.CONTROL) & set(map(ord, text))
    assert json.loads(text) == value


@pytest.mark.parametrize(
    ("words", "becomes"),
    [
        ("eval runs/a --json", "eval runs/a --json=-"),
        ("eval --json --answers 3 runs/a", "eval --json=- --answers 3 runs/a"),
        ("eval --json a.json runs/a", "eval --json=a.json runs/a"),
        ("eval --json a.jsonl runs/a", "eval --json=a.jsonl runs/a"),
        ("eval --json - runs/a", "eval --json=- runs/a"),
        ("eval --json=out runs/a", "eval --json=out runs/a"),
        ("eval --json -- runs/a", "eval --json=- -- runs/a"),
        ("eval -- --json", "eval -- --json"),
    ],
)
def test_the_file_of_json_can_be_left_out(words: str, becomes: str):
    assert with_json_value(words.split()) == becomes.split()
    kept = [word for word in becomes.split() if not word.startswith("--json=")]
    assert without_json(words.split()) == kept


@pytest.mark.parametrize("words", ["--json runs/a", "--json=", "--json a.json --json"])
def test_what_could_overwrite_something_is_refused(words: str):
    with pytest.raises(HintedError):
        with_json_value(words.split())


def test_commands_without_a_model(lora: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    recipes = document(lora("init", "--json"))["recipes"]
    assert {"name", "summary"} == set(recipes[0])
    assert document(lora("init", "quickstart", "--json")) == {"written": "quickstart.yaml"}
    assert document(lora("methods", "--json"))["methods"]["lora"]["keys"]["rank"] == 16
    assert document(lora("export", "--to", "list", "--json"))["formats"]["gguf"]["suffix"] == ".gguf"
    rate = document(lora("schema", "training.learning_rate", "--json"))
    assert (rate["type"], rate["exclusiveMinimum"]) == ("number", 0)
    assert document(lora("schema", "--json")) == document(lora("schema"))


def test_a_file_is_written_in_addition_to_the_text(lora: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = lora("methods").out
    for words in (["--json", "a.json"], ["--json=b"]):
        result = lora("methods", *words)
        assert result.out == text
    assert Path("a.json").read_text() == Path("b").read_text() == lora("methods", "--json").out
    assert (
        lora("methods", "--json", "missing/a.json").last_two[0]
        == "error: --json missing/a.json: there is no folder missing"
    )


def test_results_as_text_are_left_out_and_stdout_is_given_back(lora: Lora):
    result = lora("methods", "--json")
    assert result.err == ""
    assert lora("methods").out.startswith("lora: ")
    assert not json_output.is_reserved()


@pytest.mark.parametrize("words", ["schema foo --json", "check --json", "check missing.yaml --json", "eval x --json"])
def test_an_error_has_its_two_lines_and_its_document(words: str, lora: Lora):
    result = lora(*words.split())
    found = document(result)
    assert result.code == found["exit_code"] == 2
    assert result.last_two == [f"error: {found['error']}", f"hint: {found['hint']}"]
    assert set(found) == {"error", "hint", "details", "exit_code"}


def test_the_problems_of_a_recipe_are_in_the_document(recipe: WriteRecipe, lora: Lora):
    recipe({"training.learning_rate": -1, "adapter.rnk": 3})
    found = document(lora("check", "recipe.yaml", "--json"))
    assert len(found["details"]) == 2
    assert found["error"] == "2 problems in recipe.yaml"


def test_nothing_of_other_programs_reaches_stdout(
    lora: Lora, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """A library prints in Python or in C, and so does a process that it starts."""

    def noisy() -> dict[str, float]:
        print("from Python")
        os.system("echo from a process")
        console.out.print("a result as text")
        return {"nan": float("nan"), "infinity": float("inf"), "number": 0.1 + 0.2}

    monkeypatch.setattr(methods, "show_methods", noisy)
    result = lora("methods", "--json")
    assert document(result) == {"methods": {"nan": None, "infinity": None, "number": 0.1 + 0.2}}
    assert result.err == "from Python\nfrom a process\n"


def test_only_the_first_process_of_a_run_prints(lora: Lora, monkeypatch: pytest.MonkeyPatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert lora("methods", "--json").out == ""


@pytest.mark.slow
def test_a_run_from_check_to_export(recipe: WriteRecipe, lora: Lora):
    recipe({"output": "runs/b"})
    found = document(lora("check", "recipe.yaml", "--json"))
    assert found["steps"] == 4
    assert found["ledger"]["train"]["rows"] == 22
    assert found["memory"]["bytes"] > found["memory"]["parts"]["weights"] > 0
    assert "error" not in found
    assert document(lora("check", "recipe.yaml", "--no-model", "--json"))["sources"][0]["rows"] == 24
    trained = lora("train", "recipe.yaml", "--json")
    found = document(trained)
    assert (found["finished"], found["exit_code"], found["adapter"]) == (True, 0, "runs/b/adapter")
    assert found["steps_done"] == found["steps"] == 4
    assert [each["step"] for each in found["evaluations"]] == [0, 2, 4]
    assert found["last_step"]["loss"] == json.loads(Path("runs/b/metrics.jsonl").read_text().splitlines()[-2])["loss"]
    assert "step 4/4" in trained.err
    measured = document(lora("eval", "runs/b", "--json"))
    assert set(measured["results"]) == {"base", "adapter"}
    assert lora("eval", "runs/b", "--json", "figures.json").out.startswith(" ")
    assert json.loads(Path("figures.json").read_text()) == measured


@pytest.mark.slow
def test_commands_that_write_a_result(trained_run: Path, lora: Lora):
    merged = document(lora("merge", "runs/a", "--out", "merged", "--json"))
    assert (merged["out"], merged["unmerged"], merged["method"]) == ("merged", False, "lora")
    assert merged["verified"]["weights_equal"] is True
    assert (
        merged["bytes"] == sum(file.stat().st_size for file in Path("merged").glob("*.safetensors")) or merged["bytes"]
    )
    exported = document(lora("export", "runs/a", "--to", "peft", "--base", "base", "--out", "peft", "--json"))
    assert exported.pop("out") == "peft"
    assert exported == json.loads(Path("peft/export.json").read_text())
    shown = document(lora("adapter", "inspect", "runs/a", "--json"))
    assert len(shown["modules"]) == 14
    assert shown["modules"][0]["singular_values"]
    small = document(lora("adapter", "resize", "runs/a", "--rank", "2", "--out", "small", "--json"))
    assert (small["out"], small["rank"]) == ("small", {"min": 2, "max": 2})
    assert 0 < small["energy_kept"] < 1
    both = document(lora("adapter", "combine", "runs/a", "small", "--out", "both", "--json"))
    assert both["method"] == "concat"
    assert both["energy_kept"] == pytest.approx(1)


@pytest.mark.slow
def test_the_summary_of_a_run_that_was_stopped_or_failed(finished_run: Path, tmp_path: Path):
    stopped = summarize_run(finished_run, exit_code=130)
    assert (stopped["finished"], stopped["stopped"], stopped["adapter"], stopped["steps_done"]) == (
        False,
        True,
        None,
        4,
    )
    assert summarize_run(tmp_path, exit_code=143)["steps_done"] == 0
    assert set(summarize_run(tmp_path, exit_code=1)) >= {"error", "hint", "exit_code"}


@pytest.mark.slow
def test_a_run_that_cannot_start_gives_one_document(recipe: WriteRecipe, lora: Lora):
    recipe()
    Path("runs").write_text("a file in the way of the run folder")
    found = document(lora("train", "recipe.yaml", "--processes", "2", "--json"))
    assert found["exit_code"] == 2
    assert found["error"]
