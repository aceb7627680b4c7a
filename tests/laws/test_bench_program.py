"""scripts/bench: its table compares with lora's row and the limit of the same case, and tells what failed."""

from pathlib import Path
from typing import Any

import pytest

from tests.bench import run_bench
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
