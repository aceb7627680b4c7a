"""What is published or sent has no folders of this machine, and no secrets of addresses."""

import os
from pathlib import Path

import pytest

from lora_cli.run import redact
from lora_cli.run.redact import redact_secrets, redact_values, without_private


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GET http://bob:p%40ss-word@host:5/x?sig=3 as p@ss-word", "GET http://host:5/x as (not shown)"),
        ("key k3y of-it, twice: k3y of-it", "key (not shown), twice: (not shown)"),
        ("through tok3n-of-proxy", "through (not shown)"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic (not shown)"),
        ("-H 'Authorization: Bearer abcdefghi' -v", "-H 'Authorization: (not shown) -v"),
        ('{"api_key": "abcdef123", "a": 1}', '{"api_key": "(not shown)", "a": 1}'),
        ("token=xyz123abc&a=1, Password: hunter2x", "token=(not shown)&a=1, Password: (not shown)"),
        ("0123456789abcdef0123456789abcdef01234567", "(not shown)"),
        ("hf_abcdefghijkl", "(not shown)"),
        ("-" * 40, "-" * 40),
        ("in _validate_the_type_of_an_experiment_id(x)", "in _validate_the_type_of_an_experiment_id(x)"),
        ("pad_token: 5, 12 tokens: few", "pad_token: 5, 12 tokens: few"),
        ('File "/a/lib/wandb.py", line 3 in true', 'File "/a/lib/wandb.py", line 3 in true'),
    ],
)
def test_secrets_in_what_a_library_prints(text: str, expected: str, monkeypatch: pytest.MonkeyPatch):
    for name, value in {
        "WANDB_API_KEY": "k3y of-it",
        "MLFLOW_TRACKING_URI": "http://bob:p%40ss-word@host:5/x",
        "ALL_PROXY": "socks5://tok3n-of-proxy@host",
        "SSH_AUTH_SOCK": "/a",
        "USE_AUTH": "true",
    }.items():
        monkeypatch.setenv(name, value)
    redact._secrets_of_environment.cache_clear()
    assert redact_secrets(text) == expected
    redact._secrets_of_environment.cache_clear()


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
