"""The metrics log is readable after a kill, and a resumed run continues it from its checkpoint."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.run import metrics_log
from lora_cli.run.metrics_log import MetricsLog, read_metrics, remove_evaluation, truncate_after
from lora_cli.run.read_file import UnreadableError, read_text
from lora_cli.run.set_aside import set_aside_damaged
from tests.faults.damage import damages
from tests.faults.test_disk import limit_file_size


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
    told: list[str] = []
    truncate_after(path, 3, info=told.append, complete_from=1)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    truncate_after(path, 0, info=told.append, complete_from=1)
    assert path.read_bytes() == b""
    assert told == []  # what a kill leaves is no damage


def test_missing_log_reads_as_empty(tmp_path: Path):
    told: list[str] = []
    truncate_after(tmp_path / "m", 3, info=told.append)
    assert read_metrics(tmp_path / "m") == []
    assert not (tmp_path / "m").exists()
    assert told == []
    truncate_after(tmp_path / "m", 3, info=told.append, complete_from=1)
    assert told == [f"{tmp_path}/m lacks the records of 3 of 3 steps, the first is step 1"]


RECORD = b'{"step": 1, "loss": 2.0}'
BAD_LINES = {
    "no JSON": b"step 2",
    "a list": b"[2]",
    "a number": b"2",
    "no step": b'{"loss": 1.0}',
    "a step as text": b'{"step": "2", "loss": 1.0}',
    "a step as fraction": b'{"step": 2.5, "loss": 1.0}',
    "a step as truth value": b'{"step": true, "loss": 1.0}',
    "a negative step": b'{"step": -2, "loss": 1.0}',
    "not a number": b'{"step": 2, "loss": NaN}',
    "a block of zeros": bytes(4096),
    "zeros before a record": bytes(100) + RECORD,
    "not UTF-8": b'{"step": 2, "where": "\xff\xfe"}',
    "UTF-16": '{"step": 2}'.encode("utf-16"),
    "nested": b'{"step": 2, "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a huge step": b'{"step": ' + b"9" * 5000 + b"}",
    "half a record and a whole one": b'{"step": 2, "lo' + RECORD,
    "an empty line": b"",
}


@pytest.mark.parametrize("kind", BAD_LINES)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_damaged_log_is_set_aside_and_its_readable_records_are_kept(tmp_path: Path, kind: str, at: int):
    path = tmp_path / "metrics.jsonl"
    lines = [RECORD, b'{"step": 3, "loss": 1.0}']
    lines.insert(at, BAD_LINES[kind])
    damaged = b"".join(line + b"\n" for line in lines) + b'{"step": 4, "lo'
    path.write_bytes(damaged)
    told: list[str] = []
    truncate_after(path, 3, info=told.append, complete_from=1)
    assert told == [
        f"{path} is damaged: line {at + 1} is no record of a step; set aside as metrics.damaged-1.jsonl, 2 readable "
        "records are kept"
    ]
    assert [record["step"] for record in read_metrics(path)] == [1, 3]
    assert (tmp_path / "metrics.damaged-1.jsonl").read_bytes() == damaged
    with MetricsLog(path) as log:
        log.write({"step": 4})
    assert [record["step"] for record in read_metrics(path)] == [1, 3, 4]


def test_a_line_without_end_takes_no_memory(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics_log, "MAX_LINE_BYTES", 1000)
    path.write_bytes(path.read_bytes() + b"a" * 5000 + b'\n{"step": 6}\n' + b"b" * 5000)
    told: list[str] = []
    truncate_after(path, 9, info=told.append)
    assert told[0].startswith(f"{path} is damaged: line 6 has 5,001 bytes; set aside as metrics.damaged-1.jsonl, 6 ")
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", ["folder-in-place", "fifo-in-place", "dangling-link-in-place"])
def test_what_is_in_the_place_of_a_log_is_set_aside(path: Path, kind: str):
    (damage,) = damages(path, seed=0, kinds=[kind])
    damage.apply(path)
    assert read_metrics(path) == []
    for number in (1, 2):
        told: list[str] = []
        truncate_after(path, 5, info=told.append, complete_from=1)
        assert told[0].startswith(f"{path} is damaged: "), told
        assert told[0].endswith(f"; set aside as metrics.damaged-{number}.jsonl, 0 readable records are kept")
        assert path.read_bytes() == b""
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("left", range(5))
def test_missing_records_of_steps_are_told(path: Path, left: int):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:left]))
    told: list[str] = []
    truncate_after(path, 5, info=told.append, complete_from=1)
    assert told == [f"{path} lacks the records of {5 - left} of 5 steps, the first is step {left + 1}"]


@settings(deadline=None)
@given(data=st.binary(max_size=300), at=st.integers(0, 5))
def test_no_bytes_in_a_log_raise_or_change_another_record(data: bytes, at: int, tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    lines = [b'{"step": %d, "loss": 0.5}\n' % step for step in range(1, 6)]
    path.write_bytes(b"".join(lines[:at]) + data + b"\n" + b"".join(lines[at:]))
    truncate_after(path, 5, info=lambda line: None)
    kept = path.read_bytes().splitlines(keepends=True)
    assert [line for line in kept if line in lines] == lines


def test_a_full_disk_names_the_log(path: Path):
    log = MetricsLog(path)
    with limit_file_size(path.stat().st_size + 10), pytest.raises(OSError, match="File too large") as caught:
        log.write({"step": 6, "loss": 0.1})
    log.close()
    assert caught.value.filename == str(path)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5]


def test_the_evaluation_of_one_step_is_removed(path: Path):
    with MetricsLog(path) as log:
        for step in (4, 5):
            log.write({"step": step, "eval_loss": 1.0})
    before = read_metrics(path)
    remove_evaluation(path, 5)
    assert read_metrics(path) == before[:-1]
    remove_evaluation(path, 3)
    assert read_metrics(path) == before[:-1]


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_a_log_that_the_system_refuses_to_open_is_not_taken_for_a_damaged_one(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "m"
    path.write_text('{"step": 1}\n')

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr("lora_cli.run.read_file.os.open", fail)
        for read in (read_metrics, lambda path: truncate_after(path, 1, info=pytest.fail)):
            with pytest.raises(UnreadableError, match="cannot be read"):
                read(path)
        with pytest.raises(UnreadableError, match="cannot be read"):
            set_aside_damaged(path, read_text, info=pytest.fail)
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_a_link_to_itself_in_place_of_a_log_is_set_aside(tmp_path: Path):
    path, told = tmp_path / "m", []
    path.symlink_to(path)
    set_aside_damaged(path, read_text, info=told.append)
    assert not os.path.lexists(path)
    assert len(told) == 1


def test_a_follower_reads_each_record_once_also_from_a_new_log(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    follower = metrics_log.MetricsFollower(path)
    assert follower.read() == []
    with MetricsLog(path) as log:
        log.write({"step": 1})
        assert follower.read() == [{"step": 1}]
        assert follower.read() == []
        log.write({"step": 2})
    with path.open("ab") as file:
        file.write(b'{"step": 3, "lo')
    assert follower.read() == [{"step": 2}]
    with path.open("ab") as file:
        file.write(b'ss": 1}\n{"step": 4}\nno record\n')
    assert follower.read() == [{"step": 3, "loss": 1}, {"step": 4}]
    truncate_after(path, 2, info=lambda _: None)
    assert follower.read(reopen=False) == []
    assert follower.read() == [{"step": 1}, {"step": 2}]
    path.rename(tmp_path / "moved.jsonl")
    with (tmp_path / "moved.jsonl").open("ab") as file:
        file.write(b'{"step": 3}\n')
    assert follower.read() == [{"step": 3}]
    follower.close()


@pytest.mark.parametrize("reopen", [True, False])
def test_a_follower_whose_descriptor_a_library_has_taken_goes_on(reopen: bool, tmp_path: Path):
    path, other = tmp_path / "m.jsonl", tmp_path / "other"
    other.write_text('{"step": 7}\n' * 100)
    follower = metrics_log.MetricsFollower(path)
    with MetricsLog(path) as log:
        log.write({"step": 1})
        assert follower.read() == [{"step": 1}]
        descriptor = follower._descriptor
        assert descriptor is not None
        os.close(descriptor)
        log.write({"step": 2})
        assert follower.read(reopen=reopen) == [{"step": 2}]
        with other.open("rb") as file:
            descriptor = follower._descriptor
            assert descriptor is not None
            os.dup2(file.fileno(), descriptor)
        log.write({"step": 3})
        assert follower.read(reopen=reopen) == [{"step": 3}]
    assert os.read(descriptor, 11) == b'{"step": 7}'  # not closed
    os.close(descriptor)
    follower.close()
