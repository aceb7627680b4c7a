"""Small files of unknown origin: only regular files of a bounded size are read, and errors name them."""

import os
from pathlib import Path

import pytest

from lora_cli.errors import LoraError
from lora_cli.run.read_file import as_json, open_regular, printable, read_bytes, read_json_object, read_text


def test_a_json_object_is_read(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json_object(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON: Expecting value: line 1 column 1 (char 0)"),
        (b"[1]", "has a list in place of a JSON object"),
        (b"null", "has null in place of a JSON object"),
        (b"1e999", "has a number in place of a JSON object"),
        (b'{"a": \xff}', "is not UTF-8 text: byte 6 is wrong"),
        (b"[" * 200_000, "is not JSON: nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
    ],
)
def test_other_contents_are_refused(content: bytes, message: str, tmp_path: Path):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(LoraError) as error:
        read_json_object(file)
    assert error.value.message.startswith(f"{file} {message}")


def test_a_pipe_is_refused_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LoraError, match="is a pipe, not a file"):
        read_text(tmp_path / "pipe")


def test_folders_devices_and_missing_files_are_refused(tmp_path: Path):
    for path, message in (
        (tmp_path, "is a folder"), (Path("/dev/zero"), "is a device"), (tmp_path / "none", "does not exist"),
        (tmp_path / ("x" * 300), "cannot be read: File name too long"),
    ):  # fmt: skip
        with pytest.raises(LoraError, match=message):
            open_regular(path)


def test_the_size_is_bounded(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", limit=5) == b"12345"
    with pytest.raises(LoraError, match="more than 4 bytes"):
        read_bytes(tmp_path / "a", limit=4)


def test_values_are_shown_in_one_line_without_control_characters():
    assert printable("a\x1b[2J\nb\u202e") == "a\\x1b[2J\\nb\\u202e"
    assert printable([1, "x"]) == "[1, 'x']"
    assert printable("a" * 300, 5) == "aaaaa..."
    assert [as_json(value) for value in ("1", 1, None, float("nan"), {"a": "ü"})] == [
        '"1"',
        "1",
        "null",
        "NaN",
        '{"a": "ü"}',
    ]
