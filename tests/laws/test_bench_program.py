"""scripts/bench: its table compares with lora's row and the limit of the same case, and tells what failed."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.bench import run_bench, run_scale
from tests.bench.cases import WAYS, Case


def result(rate: float, memory: int = 2**30) -> dict[str, Any]:
    return {"tokens_per_second": rate, "operations_per_second": rate * 1e9, "peak_memory": memory, "last_loss": 2.5}


def test_ways_run_in_turn_and_medians_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("rows.jsonl", "model.gguf"):
        (tmp_path / name).touch()
    options = run_bench._parse(
        ["--data", str(tmp_path / "rows.jsonl"), "--model", str(tmp_path / "model.gguf"), "--rounds", "3"]
    )
    rates = {"limit": [90.0, 100.0, 80.0], "lora": [70.0, 60.0, 50.0], "trl": [20.0, 30.0, 10.0], "peft": [30.0] * 3}
    asked: list[str] = []

    def measure(arguments: list[str], until: float | None) -> dict[str, Any]:
        base, dtype, way = arguments[2:5]
        assert (base, dtype) == ("nf4", "float32")
        asked.append(way)
        if way == "trl-packed":
            return {"error": "out of memory"}
        return result(rates[way][asked.count(way) - 1])

    monkeypatch.setattr(run_bench, "run_json", measure)
    records = run_bench._measure(Case("nf4", "float32"), options)
    assert asked == ["limit", *WAYS] * 3
    lines = run_bench.table(records).splitlines()[2:]
    assert [[cell.strip() for cell in line.strip("|").split("|")][2:6] for line in lines] == [
        ["products only", "100", "", ""],
        ["lora", "60", "100%", "60%"],
        ["TRL, padded", "20", "33%", "20%"],
        ["TRL, packed", "out of memory", "", ""],
        ["PEFT, padded", "30", "50%", "30%"],
    ]
    assert lines[1].endswith("| 60 | 1.0 GiB | 2.5000 |")


def test_missing_files_and_one_step_are_told(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    with pytest.raises(SystemExit):
        run_bench._parse(["--data", str(tmp_path / "nothing.jsonl")])
    assert "nothing.jsonl is not there; scripts/quickstart makes" in capsys.readouterr().err


def test_scale_compares_the_medians_of_runs_with_those_of_one_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name in ("rows.jsonl", "model.gguf"):
        (tmp_path / name).touch()
    files = ["--data", str(tmp_path / "rows.jsonl"), "--model", str(tmp_path / "model.gguf")]
    options = run_bench._parse([*files, "--scale", "--steps", "3"])
    monkeypatch.setattr(run_scale, "available_cores", lambda: 4)
    asked: list[tuple[int, str]] = []

    def train(command: list[str], **_: Any) -> Any:
        recipe = yaml.safe_load(Path(command[-1]).read_text())
        spec, training = recipe["distributed"], recipe["training"]
        assert training["tokens_per_step"] == 4 * training["tokens_per_batch"]
        asked.append((spec["processes"], spec["strategy"]))
        rate = {"auto": 100, "ddp": 90, "fsdp": 80}[spec["strategy"]]
        steps = [{"step": 1, "loss": 1.0, "tokens": 1, "seconds": 9.0}]  # not counted
        steps += [{"step": n, "loss": 1.0, "tokens": rate, "seconds": 1.0} for n in (2, 3)]
        folder = Path(recipe["output"])
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(run_scale.subprocess, "run", train)
    assert run_scale.run(options) == 0
    assert asked == [(1, "auto"), (4, "ddp"), (4, "fsdp")] * 3
    printed = capsys.readouterr()
    assert "| 4 processes, fsdp | 80 | 80% |" in printed.out + printed.err
