"""Errors of the operating system: recognized in the exceptions of all libraries, reported with the result's path."""

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_cli.errors import LoraError
from lora_cli.run import atomic
from lora_cli.run.system_errors import HINTS, as_os_error, describe, system_error
from lora_cli.run.workspace import remove_leftovers
from tests.faults.test_disk import limit_file_size
from tests.inputs.tiny_tokenizers import CHATML, build


def error_of(action) -> Exception:
    with pytest.raises(Exception, match="File too large") as caught, limit_file_size(100):
        action()
    return caught.value


def test_exceptions_of_rust_libraries_have_the_number_of_the_system(tmp_path: Path):
    tokenizer = build("<|im_start|>", eos="<|im_end|>", template=CHATML).backend_tokenizer
    for error in (
        error_of(lambda: save_file({"a": torch.zeros(1000)}, tmp_path / "a.safetensors")),
        error_of(lambda: tokenizer.save(str(tmp_path / "tokenizer.json"))),
    ):
        assert not isinstance(error, OSError)
        found = system_error(error)
        assert found is not None
        assert (found.errno, found.strerror) == (errno.EFBIG, "File too large")


def test_exceptions_of_torch_have_the_number_of_the_system(tmp_path: Path):
    with pytest.raises(RuntimeError) as caught:
        torch.from_file(str(tmp_path / "missing"), size=1)
    found = system_error(caught.value)
    assert found is not None
    assert found.errno == errno.ENOENT


def test_a_missing_file_of_safetensors_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError) as caught:
        load_file(tmp_path / "missing.safetensors")
    found = system_error(caught.value)
    assert found is not None
    assert describe(found) == f"{tmp_path}/missing.safetensors: No such file or directory"


def test_any_error_is_about_the_result_if_its_folder_has_vanished(tmp_path: Path):
    def write() -> None:
        with atomic.folder(tmp_path / "out" / "result") as partial:
            shutil.rmtree(tmp_path / "out")
            raise ValueError(f"{partial} is no model")

    (tmp_path / "out").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        write()
    assert describe(caught.value) == f"{tmp_path}/out/result: No such file or directory"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [None, ValueError("a"), RuntimeError("shape (28)"), OSError("no number"), LoraError("a (os error 28)")],
    ids=repr,
)
def test_other_exceptions_are_no_system_errors(error: Exception | None):
    assert system_error(error) is None


@pytest.mark.parametrize("write", [atomic.write_text, atomic.write_json])
def test_a_failed_write_names_the_result_and_leaves_nothing(write, tmp_path: Path):
    with pytest.raises(OSError, match="File too large") as caught, limit_file_size(100):
        write(tmp_path / "result.json", "a" * 1000)
    assert describe(caught.value) == f"{tmp_path}/result.json: File too large"
    assert list(tmp_path.iterdir()) == []


def test_a_missing_parent_is_named_by_the_result(tmp_path: Path):
    with pytest.raises(FileNotFoundError) as caught:
        atomic.write_text(tmp_path / "gone" / "result.json", "a")
    assert describe(caught.value) == f"{tmp_path}/gone/result.json: No such file or directory"


def test_a_file_that_is_read_while_a_result_is_written_keeps_its_name(tmp_path: Path):
    with pytest.raises(FileNotFoundError) as caught, atomic.folder(tmp_path / "out"):
        (tmp_path / "input").read_bytes()
    assert describe(caught.value) == f"{tmp_path}/input: No such file or directory"


def test_a_full_disk_tells_what_was_written_and_is_free(tmp_path: Path):
    def write() -> None:
        with atomic.folder(tmp_path / "out") as partial:
            (partial / "a").write_bytes(b"a" * 2048)
            raise OSError(errno.ENOSPC, "of a library", "another name")

    with pytest.raises(OSError, match="No space left") as caught:
        write()
    assert describe(caught.value).startswith(f"{tmp_path}/out: No space left on device (2 KiB of it were written, ")
    assert describe(caught.value).endswith(" are free)")


def test_exceptions_without_a_hint_pass_unchanged(tmp_path: Path):
    for error in (ValueError("a"), OSError(errno.EDOM, "a"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, as_os_error(tmp_path / "a"):
            raise error
        assert caught.value is error
    assert errno.EDOM not in HINTS


def test_a_removed_working_folder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError) as caught:
        os.getcwd()
    assert describe(caught.value) == "the working folder does not exist any more"


def test_a_process_without_free_descriptors_is_one_error(tmp_path: Path):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
    try:
        with pytest.raises(OSError, match="Too many open files") as caught:
            atomic.write_text(tmp_path / "result", "a")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert describe(caught.value) == f"{tmp_path}/result: Too many open files"
    remove_leftovers(tmp_path)  # without a descriptor, the folder could not be listed
    assert list(tmp_path.iterdir()) == []
