"""Fixture that writes a recipe into the temporary folder of the test."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | bytes], Path]:
    monkeypatch.chdir(tmp_path)  # so that messages have the relative path "r.yaml"

    def to_file(text: str | bytes) -> Path:
        path = Path("r.yaml")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return to_file
