"""A full or read-only disk gives an error and a hint, and keeps the existing files."""

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.commands.conftest import Lora, WriteRecipe

pytestmark = pytest.mark.slow

Limit = Callable[[int], AbstractContextManager[None]]


@contextmanager
def limit_file_size(size: int) -> Iterator[None]:
    """Make writing more than `size` bytes to a file fail, as on a full disk."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_keeps_earlier_checkpoints_and_resume_continues(trained_run: Path, lora: Lora):
    before = {p: p.read_bytes() for p in (trained_run / "checkpoints").rglob("*") if p.is_file()}
    arguments = ("train", "recipe.yaml", "--output", "runs/b", "--set", "training.max_steps=4")
    with limit_file_size(45_000):  # the adapter is 31 KB, the optimizer 62 KB
        result = lora(*arguments)
    assert (result.code, result.out) == (1, "")
    assert "Traceback" not in result.err
    assert result.last_two[0] == "error: runs/b: File too large"
    assert result.last_two[1].endswith("files written before are complete, and a run continues with --resume")
    assert list(Path("runs/b/checkpoints").iterdir()) == []
    resumed = lora(*arguments, "--resume")
    assert resumed.code == 0, resumed.err
    assert {p: p.read_bytes() for p in (trained_run / "checkpoints").rglob("*") if p.is_file()} == before
    name = "adapter/adapter_model.safetensors"
    assert (Path("runs/b") / name).read_bytes() == (trained_run / name).read_bytes()


def test_an_output_folder_that_cannot_be_created_is_refused(recipe: WriteRecipe, lora: Lora):
    result = lora("train", recipe(), "--output", "/proc/run")
    assert (result.code, result.out) == (2, "")
    assert result.last_two == [
        "error: /proc/run cannot be written: No such file or directory",
        "hint: set output to another folder",
    ]


def test_a_file_without_write_permission_is_an_error(trained_run: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    from lora_cli.run import atomic

    def denied(path: Path, data: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))  # file permissions do not stop root

    monkeypatch.setattr(atomic, "write_bytes", denied)
    result = lora("eval", "runs/a", "--json", "figures.json")
    assert result.code == 1
    assert result.last_two == [
        "error: figures.json: Permission denied",
        "hint: check its permissions, or choose another path; files written before are complete",
    ]
    assert "Traceback" not in result.err
