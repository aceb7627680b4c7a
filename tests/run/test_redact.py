"""What is published or sent has no folders of this machine, and no secrets of addresses."""

import os
from pathlib import Path

import pytest

from lora_cli.run.redact import redact_values, without_private


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/model", "org/model"),
        ("data/rows.jsonl", "data/rows.jsonl"),
        ("/home/someone/models/tiny", "tiny"),
        ("~/models/tiny", "tiny"),
        ("/srv/rows.jsonl:17: a bad row", "rows.jsonl:17: a bad row"),
        ("https://user:password@host:8080/rows.jsonl?X-Amz-Signature=secret", "https://host:8080/rows.jsonl"),
        ("s3://bucket/rows.jsonl", "s3://bucket/rows.jsonl"),
        ("see https://u:p@host/a?b=c for more", "see https://host/a for more"),
        ("data.train=https://u:p@host/x?sig=1", "data.train=https://host/x"),
        ("/no_think", "/no_think"),
        ("/no_think Answer in and/or", "/no_think Answer in and/or"),
        ("{% if a %}/no_think{% endif %}\n/x", "{% if a %}/no_think{% endif %}\n/x"),
        (".*layers\\.[0-9]+\\.(q|v)_proj", ".*layers\\.[0-9]+\\.(q|v)_proj"),
    ],
)
def test_text(text: str, expected: str):
    assert redact_values({"a": [text]}) == {"a": [expected]}
    assert redact_values({text: 1}) == {expected: 1}


def test_folders_within_a_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "work")
    text = f"rows of {tmp_path}/work/a.jsonl and {tmp_path}/b.jsonl"
    assert redact_values(text) == "rows of a.jsonl and b.jsonl"
    assert redact_values([1.5, None, True]) == [1.5, None, True]
    assert os.fspath(tmp_path) not in str(redact_values({text: text}))


def test_arguments_and_texts_of_rows_are_not_sent():
    manifest = {"command": ["train", "/a/b"], "label_mask": [{"tokens": ["secret"]}], "seed": 1}
    assert without_private(manifest) == {"seed": 1}
