"""The program behind scripts/gpu: runs without a GPU, and its JSON has what a reader of the results needs."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.gpu import run_gpu
from tests.gpu.cases import SHAPES, WAYS
from tests.gpu.measure import PREPARE

KEYS = {"date", "device", "versions", "lacks", "product_rate", "laws", "speed"}
MEASURED = {
    "shape", "base", "way", "tokens_per_second", "operations_per_second", "peak_memory", "steps", "seconds", "tokens",
    "supervised", "first_loss", "last_loss", "dtype", "how",
}  # fmt: skip


@pytest.mark.slow
def test_the_program_runs_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    file = tmp_path / "gpu.json"
    # No GPU, also on a machine that has one; one base, and one quick file of laws, are enough here.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k equal_nf4_codes")
    monkeypatch.setitem(SHAPES, "tiny", SHAPES["tiny"]._replace(bases=("nf4",)))
    assert run_gpu.main(["--shape", "tiny", "--steps", "2", "--json", str(file)]) == 0
    printed = capfd.readouterr().out
    report = json.loads(file.read_text())
    assert report.keys() == KEYS
    assert report["device"]["type"] == "cpu"
    assert report["product_rate"]["operations_per_second"] > 0
    assert any(line.startswith("no CUDA GPU") for line in report["lacks"])
    assert [(law["law"], law["failed"]) for law in report["laws"]] == [("equal nf4 codes are equal weights", 0)]
    assert [(r["base"], r["way"]) for r in report["speed"]] == [("nf4", way.title) for way in WAYS.values()]
    measured = [record for record in report["speed"] if "error" not in record]
    assert {record["way"] for record in measured} >= {"lora", "lora, PEFT's LoRA layers", "PEFT"}
    assert all(record.keys() == MEASURED for record in measured)
    assert all(record["error"].startswith("left out: ") for record in report["speed"] if "error" in record)
    assert "lora, no prefetch" in printed
    assert "left out: needs a GPU" in printed


def test_every_way_has_a_function():
    assert PREPARE.keys() == WAYS.keys()


def test_results_are_counted_by_law():
    results = ElementTree.fromstring(
        """<testsuites><testsuite>
        <testcase name="test_rows_are_apart[a]"/>
        <testcase name="test_rows_are_apart[b]"><failure message="assert 1 == 2&#10;more"/></testcase>
        <testcase name="test_rows_are_apart[c]"><skipped message="needs a GPU"/></testcase>
        <testcase name="test_saved"><error message="no fixture"/></testcase>
        </testsuite></testsuites>"""
    )
    laws = run_gpu.count_cases(results)
    first = {"law": "rows are apart", "passed": 1, "failed": 1, "skipped": 1}
    assert laws[0] == {**first, "messages": ["[b]: assert 1 == 2", "needs a GPU"]}
    assert laws[1] == {"law": "saved", "passed": 0, "failed": 1, "skipped": 0, "messages": ["no fixture"]}
    assert "rows are apart" in run_gpu.law_table(laws)


def test_a_measurement_without_a_result_is_a_line():
    record = {"shape": "long", "base": "nf4", "way": "PEFT", "error": "out of memory"}
    assert run_gpu.speed_table([record]).splitlines()[-1].endswith("out of memory")


def test_what_follows_the_time_limit_is_left_out():
    assert run_gpu.run_json(["-c", "print(1)"], until=0.0) == {"error": "left out: no time was left"}


def test_a_process_that_fails_gives_its_error():
    assert run_gpu.run_json(["-c", "raise ValueError('no head')"], until=None) == {"error": "ValueError: no head"}
    assert run_gpu.run_json(["-c", "import sys; sys.exit(3)"], until=None) == {"error": "ended with exit code 3"}


@pytest.mark.parametrize("steps", ["0", "1"])
def test_one_step_is_not_enough(steps: str):
    with pytest.raises(SystemExit):
        run_gpu.main(["--steps", steps])
