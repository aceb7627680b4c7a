"""A full disk, or one that cannot be written, is told in two lines, and leaves what was there before."""

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.commands.conftest import Lora, WriteRecipe

Limit = Callable[[int], AbstractContextManager[None]]


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Writing more than `size` bytes to a file fails, as it does on a full disk."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_the_checkpoint_before_stays_and_resume_goes_on(trained: Path, lora: Lora):
    kept = {p: p.read_bytes() for p in (trained / "checkpoints").rglob("*") if p.is_file()}
    longer = ("train", "recipe.yaml", "--output", "runs/b", "--set", "training.max_steps=4")
    with no_file_above(45_000):  # the adapter is 31 KB, the optimizer 62 KB
        done = lora(*longer)
    assert (done.code, done.out) == (1, "")
    assert "Traceback" not in done.err
    assert done.last_two[0] == "error: runs/b: File too large"
    assert done.last_two[1].endswith("files written before are complete, and a run continues with --resume")
    assert list(Path("runs/b/checkpoints").iterdir()) == []
    resumed = lora(*longer, "--resume")
    assert resumed.code == 0, resumed.err
    assert {p: p.read_bytes() for p in (trained / "checkpoints").rglob("*") if p.is_file()} == kept
    name = "adapter/adapter_model.safetensors"
    assert (Path("runs/b") / name).read_bytes() == (trained / name).read_bytes()


def test_a_folder_that_cannot_be_written(recipe: WriteRecipe, lora: Lora):
    done = lora("train", recipe(), "--output", "/proc/run")
    assert (done.code, done.out) == (2, "")
    assert done.last_two == [
        "error: /proc/run cannot be written: No such file or directory",
        "hint: set output to another folder",
    ]


def test_a_permission_that_is_taken_away(trained: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    from lora_cli.run import atomic

    def denied(path: Path, data: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))  # root may do everything

    monkeypatch.setattr(atomic, "write_bytes", denied)
    done = lora("eval", "runs/a", "--json", "figures.json")
    assert done.code == 1
    assert done.last_two == [
        "error: figures.json: Permission denied",
        "hint: check its permissions, or choose another path; files written before are complete",
    ]
    assert "Traceback" not in done.err
