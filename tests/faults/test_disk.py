"""A full or read-only disk gives an error and a hint, and keeps the existing files."""

import os
import re
import resource
import shutil
import signal
import subprocess
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


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Mount a file system of `size` bytes at `folder`; skip the test where this user may not."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


OUTPUTS = {
    "train": ["train", "recipe.yaml", "--output", "out/x"],
    "merge": ["merge", "runs/a", "--out", "out/x"],
    "safetensors": ["export", "runs/a", "--to", "safetensors", "--quantize", "f16", "--out", "out/x"],
    "gguf": ["export", "runs/a", "--to", "gguf", "--out", "out/x.gguf"],
    "gguf-adapter": ["export", "runs/a", "--to", "gguf-adapter", "--out", "out/x.gguf"],
    "ollama": ["export", "runs/a", "--to", "ollama", "--out", "out/x"],
    "onnx": ["export", "runs/a", "--to", "onnx", "--out", "out/x"],
    "peft": ["export", "runs/a", "--to", "peft", "--out", "out/x"],
    "vllm": ["export", "runs/a", "--to", "vllm", "--out", "out/x"],
    "resize": ["adapter", "resize", "runs/a/adapter", "--out", "out/x", "--rank", "2"],
    "combine": ["adapter", "combine", "runs/a/adapter", "runs/a/adapter", "--out", "out/x"],
    "inspect": ["adapter", "inspect", "runs/a", "--json", "out/x.json", "--plot", "out/x.png"],
    "eval": ["eval", "runs/a", "--json", "out/x.json", "--answers", "2", "--predictions", "out/p.jsonl"],
}
# Bytes that a file, or the disk, may have. The tiny model has 500 KB, its adapter 33 KB, its tokenizer 20 KB.
SIZES = [4_096, 9_000, 18_000, 30_000, 36_000, 50_000, 100_000, 300_000, 520_000, 700_000]
FULL = re.compile(
    r"error: out/[xp]\S*: ("
    r"File too large"
    r"|No space left on device \(.+ of it were written, .+ are free\)"
    r"|[\d.]+ \w+ \([\d,]+ bytes\) are needed for .+, and [\d.]+ \w+ \([\d,]+ bytes\) are free)"
)


@pytest.mark.parametrize("kind", ["file size", "disk"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_every_writer_ends_in_one_line_when_the_disk_is_full(trained_run: Path, lora: Lora, name: str, kind: str):
    """Each size stops another write: of tensors, a tokenizer, a config, a graph, a plot, a log."""
    failed = 0
    out = Path("out")
    for size in SIZES:
        out.mkdir()
        with small_disk(out, size) if kind == "disk" else limit_file_size(size):
            result = lora(*OUTPUTS[name])
            left = sorted(path.name for path in out.rglob("*"))
            shutil.rmtree(out / "x", ignore_errors=True)
        assert result.code in (0, 1), (size, result.err)
        assert "Traceback" not in result.err, size
        assert "Exception ignored" not in result.err, size
        assert not [path for path in left if path.startswith(".tmp-")], (size, left)
        shutil.rmtree(out)
        if result.code == 0:
            break
        failed += 1
        assert FULL.fullmatch(result.last_two[0]), (size, result.last_two)
        assert result.last_two[1].startswith("hint: "), result.last_two
        assert name in ("train", "inspect", "eval") or left == [], (size, left)
    assert failed or (name, kind) == ("eval", "file size")  # whose files are smaller
    assert result.code == 0 or name in ("merge", "safetensors", "gguf", "ollama", "onnx"), "needs more than the largest"


def test_a_full_cache_keeps_what_was_encoded(recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    recipe()
    monkeypatch.setenv("LORA_CACHE", "out")
    with limit_file_size(4_000):
        result = lora("check", "recipe.yaml")
    assert result.code == 1
    assert re.fullmatch(
        r"error: the cache cannot be written: out/encoded/[0-9a-f]{32}: File too large", result.last_two[0]
    )
    assert result.last_two[1] == "hint: free some space, or set LORA_CACHE to a folder on another disk"
    assert lora("check", "recipe.yaml").code == 0


def test_a_checkpoint_that_does_not_fit_is_refused_before_the_first_step(
    recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    recipe()
    Path("runs").mkdir()
    with small_disk(Path("runs"), 100_000):
        result = lora("train", "recipe.yaml")
        assert os.listdir("runs/a") == [".lora-lock"]
    assert result.code == 1
    assert re.fullmatch(
        r"error: runs/a: \d+ KiB \([\d,]+ bytes\) are needed for 2 checkpoints \(\d+ KiB\), the adapter \(\d+ KiB\) "
        r"and the log \(1 KiB\), and 9\d KiB \([\d,]+ bytes\) are free",
        result.last_two[0],
    ), result.err
    assert result.last_two[1].endswith("or lower training.keep_checkpoints")
    assert "step 1/4" not in result.err


def test_a_full_disk_keeps_earlier_checkpoints_and_resume_continues(trained_run: Path, lora: Lora):
    before = {p: p.read_bytes() for p in (trained_run / "checkpoints").rglob("*") if p.is_file()}
    arguments = ("train", "recipe.yaml", "--output", "runs/b", "--set", "training.max_steps=4")
    with limit_file_size(45_000):  # the adapter is 31 KB, the optimizer 62 KB
        result = lora(*arguments)
    assert (result.code, result.out) == (1, "")
    assert "Traceback" not in result.err
    assert result.last_two[0] == "error: runs/b/checkpoints/step-00000002: File too large"
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
