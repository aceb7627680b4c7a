"""The metrics log is readable after a kill, and a resumed run continues it from its checkpoint."""

from pathlib import Path

import pytest

from lora_cli.errors import LoraError
from lora_cli.run.metrics_log import MetricsLog, read_metrics, truncate_after


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(1, 6):
            log.write({"step": step, "loss": 1 / step, "note": "ü\n"})
    return path


def test_record_is_in_the_file_when_write_returns(tmp_path: Path):
    log = MetricsLog(tmp_path / "m")
    log.write({"step": 1})
    assert read_metrics(tmp_path / "m") == [{"step": 1}]
    log.close()


def test_reopened_log_is_appended_to(path: Path):
    with MetricsLog(path) as log:
        log.write({"step": 6})
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), [float("nan")]])
def test_value_that_is_not_finite_raises_and_writes_nothing(path: Path, value: object):
    before = path.read_bytes()
    with MetricsLog(path) as log, pytest.raises(ValueError, match="JSON compliant"):
        log.write({"step": 6, "loss": value})
    assert path.read_bytes() == before


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_incomplete_last_line_is_dropped(path: Path, cut: int):
    path.write_bytes(path.read_bytes()[:-cut])
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]
    with MetricsLog(path) as log:
        log.write({"step": 7})
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 7]


def test_truncate_after_a_step(path: Path):
    path.write_bytes(path.read_bytes() + b'{"step": 6, "lo')
    truncate_after(path, 3)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    truncate_after(path, 0)
    assert path.read_bytes() == b""


def test_missing_log_reads_as_empty(tmp_path: Path):
    truncate_after(tmp_path / "m", 3)
    assert read_metrics(tmp_path / "m") == []
    assert not (tmp_path / "m").exists()


def test_invalid_line_is_reported_with_its_number(path: Path):
    path.write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    with pytest.raises(LoraError, match=r"metrics.jsonl:2: not a JSON object"):
        read_metrics(path)
