"""Lost messages end nothing, results that cannot be written are an error, and no character is a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LORA = [sys.executable, "-m", "lora_cli"]
SCRIPT = "from lora_cli.run.streams import *\nimport os, sys\nwith standard_streams():\n    "


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a shell command, in which `$LORA` and `$PYTHON` are commands."""
    script = command.replace("$LORA", " ".join(LORA)).replace("$PYTHON", sys.executable)
    return subprocess.run(["bash", "-c", script], capture_output=True, check=False, env={**os.environ, **environment})


@pytest.mark.parametrize(
    ("redirection", "reason"), [(">&-", "Bad file descriptor"), ("> /dev/full", "No space left on device")]
)
def test_a_result_that_cannot_be_written_is_an_error(redirection: str, reason: str):
    result = shell(f"$LORA methods {redirection}")
    assert result.returncode == 1
    assert result.stderr.decode().splitlines() == [
        f"error: standard output cannot be written: {reason}",
        "hint: redirect it to another file; other files that were written are complete",
    ]


def test_a_reader_that_has_seen_enough_is_no_error_message():
    result = shell("$LORA schema | true; echo ${PIPESTATUS[0]}")
    assert (result.stdout, result.stderr) == (b"1\n", b"")


@pytest.mark.parametrize("redirection", ["2>&-", "2> /dev/full", "2> >(true)"])
def test_lost_messages_do_not_change_the_exit_code(redirection: str):
    assert shell(f"$LORA train missing.yaml {redirection}").returncode == 2
    assert shell(f"$LORA methods {redirection}").returncode == 0


def test_a_stream_that_was_closed_does_not_write_into_the_next_file(tmp_path: Path):
    file = tmp_path / "file"
    body = f"file = open({str(file)!r}, 'w'); print('message', file=sys.stderr); os.write(2, b'more')"
    assert shell(f'$PYTHON -c "{SCRIPT}{body}" 0<&- 2>&-').returncode == 0
    assert file.read_bytes() == b""


def test_a_closed_stdin_is_empty():
    assert shell(f'$PYTHON -c "{SCRIPT}print(repr(sys.stdin.read()))" 0<&-').stdout == b"''\n"


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "C"}],
)
@pytest.mark.parametrize("text", ["é", "\U0001f600", "\udcff"])
def test_characters_that_the_encoding_lacks_are_escaped(environment: dict[str, str], text: str):
    for stream in ("stdout", "stderr"):
        result = shell(f'$PYTHON -c "{SCRIPT}print({text!a}, file=sys.{stream})"', **environment)
        assert result.returncode == 0, result.stderr
        escaped = text.encode("ascii", errors="backslashreplace")
        assert (result.stdout + result.stderr).strip() in (escaped, text.encode(errors="replace"))


def test_a_non_blocking_pipe_loses_nothing():
    body = "os.set_blocking(1, False); sys.stdout.write('x' * 1000000)"
    assert shell(f'$PYTHON -c "{SCRIPT}{body}" | (sleep 0.1; wc -c)').stdout.strip() == b"1000000"
