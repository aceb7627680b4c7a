"""Errors of the operating system that the user can mend are one line and a hint; others keep their traceback."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_cli.run.folder import open_run
from lora_cli.run.os_errors import as_lora_error
from lora_cli.run.system_errors import VANISHED


def os_error(number: int, path: Path | str) -> OSError:
    return OSError(number, os.strerror(number), str(path))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOENT, errno.ENOTDIR])
def test_the_error_names_the_path(number: int):
    error = as_lora_error(os_error(number, "/some/file"))
    assert error is not None
    assert (error.message, error.exit_code) == (f"/some/file: {os.strerror(number)}", 1)
    assert error.hint


def test_a_vanished_file_of_safetensors_has_no_number():
    error = as_lora_error(FileNotFoundError("No such file or directory: a.safetensors"))
    assert error is not None
    assert (error.message, error.hint) == ("No such file or directory: a.safetensors", VANISHED)


def test_a_vanished_file_of_a_run_in_training_names_the_process(tmp_path: Path):
    file = tmp_path / "run" / "adapter" / "adapter_config.json"
    with open_run(tmp_path / "run"):
        error = as_lora_error(os_error(errno.ENOENT, file))
        assert error is not None
        assert error.hint == f"process {os.getpid()} is training in this run: wait for it, or copy the adapter first"
    error = as_lora_error(os_error(errno.ENOENT, file))
    assert error is not None
    assert error.hint == VANISHED


def test_a_vanished_working_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    error = as_lora_error(os_error(errno.ENOENT, "file"))
    assert error is not None
    assert error.message == "the working folder does not exist any more"


def test_other_errors_are_bugs():
    assert as_lora_error(os_error(errno.EBADF, "file")) is None
    assert as_lora_error(ConnectionError("no number")) is None


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (lambda: torch.empty(10**14), "this machine has too little memory: 372529.0 GiB could not be allocated"),
        (lambda: bytearray(1 << 60), "this machine has too little memory"),
        (
            lambda: raise_error(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")),
            "the GPU has too little memory: 2.00 GiB could not be allocated",
        ),
        (
            lambda: raise_error(RuntimeError("CUDA error: out of memory")),
            "this machine has too little memory",
        ),
        (
            lambda: raise_error(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")),
            "this machine has too little memory",
        ),
    ],
)
def test_memory_that_cannot_be_allocated(fail: Callable[[], object], message: str):
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        fail()
    error = as_lora_error(caught.value)
    assert error is not None
    assert error.message == message
    assert (error.hint, error.exit_code) == ("end other programs, or use a machine with more memory", 1)


def raise_error(error: Exception) -> None:
    raise error


def test_other_runtime_errors_are_bugs():
    assert as_lora_error(RuntimeError("shape mismatch")) is None
