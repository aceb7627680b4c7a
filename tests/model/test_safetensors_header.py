"""Headers and index of safetensors files: each kind of damage is one error that names the file."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from lora_cli.errors import LoraError
from lora_cli.model.safetensors_header import (
    INDEX_FILE,
    SINGLE_FILE,
    check_weights_are_floats,
    read_header,
    read_headers,
)

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.zeros(0, 5)}


def write(folder: Path, header: Any = None, *, length: int | None = None, body: bytes | None = None) -> Path:
    """Write a file whose header is replaced by `header`: JSON, a text or a function that changes the right one."""
    data = save(TENSORS, {"format": "pt"})
    size = int.from_bytes(data[:8], "little")
    right, tensors = json.loads(data[8 : 8 + size]), data[8 + size :]
    if callable(header):
        header(right)
        header = None
    text = (header if isinstance(header, str) else json.dumps(right if header is None else header)).encode()
    path = folder / SINGLE_FILE
    path.write_bytes(
        (len(text) if length is None else length).to_bytes(8, "little") + text + (tensors if body is None else body)
    )
    return path


def entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["a"].update(changes)


def swap(header: dict[str, Any]) -> None:
    header["a"], header["b"] = header["b"], header["a"]


DAMAGES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no JSON": ("{", {}, "its header is not JSON"),
    "nested too deeply": ("[" * 100_000, {}, "its header is not JSON"),
    "a list": ("[]", {}, "its header is not a JSON object"),
    "a name twice": ('{"a": {}, "a": {}}', {}, "its header has a twice"),
    "a length of zero": (None, {"length": 0}, "its header is not JSON"),
    "a length beyond the file": (None, {"length": 2**63}, "truncated, or not a safetensors file"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, {}, "entry of a has other keys"),
    "an entry that is a number": ({"a": 1}, {}, "entry of a has other keys"),
    "metadata that are numbers": ({"__metadata__": {"x": 1}}, {}, "the __metadata__ of its header are not texts"),
    "an unknown dtype": (entry(dtype="F128"), {}, "has the unknown dtype F128"),
    "a dtype that is a list": (entry(dtype=["F32"]), {}, "has the unknown dtype"),
    "a negative size": (entry(shape=[-2, -3]), {}, "has shape [-2, -3]: not a list of sizes"),
    "a size that is a truth value": (entry(shape=[True, 6]), {}, "has shape [True, 6]: not a list of sizes"),
    "a size that is no number": (entry(shape=["2", 3]), {}, "not a list of sizes"),
    "an offset above 2^63": (entry(data_offsets=[0, 2**70]), {}, "not a list of sizes"),
    "three offsets": (entry(data_offsets=[0, 8, 24]), {}, "not a begin and an end"),
    "offsets in the wrong order": (entry(data_offsets=[24, 0]), {}, "a ends at byte 0, before it begins at 24"),
    "overlapping tensors": (lambda h: h["b"].update(data_offsets=[16, 24]), {}, "overlap those of another tensor"),
    "a gap": (lambda h: h["b"].update(data_offsets=[32, 40]), {}, "leave out 8 before it"),
    "a shape that needs more bytes": (entry(shape=[2, 4]), {}, "a has 24 bytes, but 2x4 of F32 needs 32"),
    "a shape of 2^62": (entry(shape=[2**62, 4]), {}, "a has 24 bytes, but"),
    "a dtype of other width": (entry(dtype="F16"), {}, "a has 24 bytes, but 2x3 of F16 needs 12"),
    "a truncated body": (None, {"body": bytes(20)}, "truncated: "),
    "bytes after the last tensor": (None, {"body": bytes(64)}, "but its header describes"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_of_a_header_is_named_and_the_library_refuses_it_too(tmp_path: Path, name: str):
    header, options, message = DAMAGES[name]
    file = write(tmp_path, header, **options)
    with pytest.raises(LoraError) as caught:
        read_header(file, hint="fetch it")
    assert str(file) in caught.value.message
    assert message in caught.value.message
    assert caught.value.hint == "fetch it"
    if name != "a name twice":  # of which the library takes the last
        with pytest.raises(SafetensorError), safe_open(file, framework="pt"):
            pass


def test_entries_that_change_their_names_are_accepted(tmp_path: Path):
    """Only a digest of the file can tell."""
    assert read_header(write(tmp_path, swap))["a"].dtype == "BF16"


def test_a_whole_file_is_read_as_the_library_reads_it(tmp_path: Path):
    stored = read_header(write(tmp_path))
    with safe_open(tmp_path / SINGLE_FILE, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - a file is not a dictionary
            part = file.get_slice(name)
            assert (stored[name].dtype, list(stored[name].shape)) == (part.get_dtype(), part.get_shape())
    data = (tmp_path / SINGLE_FILE).read_bytes()
    assert data[stored["a"].begin :][: stored["a"].size] == TENSORS["a"].numpy().tobytes()


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=400), at=st.integers(0, 400))
def test_no_bytes_raise_anything_else(data: bytes, at: int, tmp_path_factory: pytest.TempPathFactory):
    right = save(TENSORS, {"format": "pt"})
    file = tmp_path_factory.mktemp("any") / SINGLE_FILE
    for content in (data, right[:at] + data + right[at:], right[:at] + data + right[at + len(data) :]):
        file.write_bytes(content)
        try:
            read_header(file)
        except LoraError:
            continue
        with safe_open(file, framework="pt"):  # accepts what we accept
            pass


# --- sharded models


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model of two shards, with one tensor each."""
    shards = {"model-00001-of-00002.safetensors": "a", "model-00002-of-00002.safetensors": "b"}
    for shard, name in shards.items():
        save_file({name: TENSORS[name]}, tmp_path / shard, {"format": "pt"})
    weight_map = {name: shard for shard, name in shards.items()}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def index(**weight_map: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def text(content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / INDEX_FILE).write_text(content)


def replace(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def swap_shards(folder: Path) -> None:
    (folder / FIRST).rename(folder / "x")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "x").rename(folder / SECOND)


SHARD_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing shard": (
        lambda folder: (folder / SECOND).unlink(),
        f"shard {SECOND} is missing; the index lists 2 shards",
    ),
    "swapped shards": (swap_shards, f"a is in {SECOND}, but the index lists it in {FIRST}"),
    "a tensor in no shard": (
        index(a=FIRST, b=SECOND, x=FIRST),
        f"x is not in any shard; the index lists it in {FIRST}",
    ),
    "a tensor in another shard": (
        index(a=SECOND, b=SECOND, c=FIRST),
        f"a is in {FIRST}, but the index lists it in {SECOND}",
    ),
    "a shard twice": (lambda folder: shutil.copy(folder / FIRST, folder / SECOND), "a is in two shards"),
    "a path upwards": (index(a="../x.safetensors"), "not a .safetensors file in its folder"),
    "an absolute path": (index(a="/dev/zero"), "not a .safetensors file in its folder"),
    "a pickle": (index(a="pytorch_model.bin"), "not a .safetensors file in its folder"),
    "a number": (index(a=1), "the file of a is 1: not a .safetensors file"),
    "a name of 5000 characters": (index(a="x" * 5000 + ".safetensors"), "is missing"),
    "no weight_map": (text("{}"), "has no weight_map"),
    "a weight_map that is a list": (text('{"metadata": {}, "weight_map": ["a"]}'), "has no weight_map"),
    "no metadata": (text(f'{{"weight_map": {{"a": "{FIRST}"}}}}'), "has no metadata"),
    "no JSON": (text("{"), "is not JSON"),
    "a list": (text("[]"), "has a list in place of a JSON object"),
    "an index that is a folder": (replace(INDEX_FILE, Path.mkdir), "is a folder, not a file"),
    "an index that is a pipe": (replace(INDEX_FILE, os.mkfifo), "is a pipe, not a file"),
    "an index that is a link to nothing": (
        replace(INDEX_FILE, lambda path: path.symlink_to("x")),
        "is a link to nothing",
    ),
    "a shard that is a folder": (replace(FIRST, Path.mkdir), "is a folder, not a file"),
    "a shard that is a pipe": (replace(FIRST, os.mkfifo), "is a pipe, not a file"),
    "a shard that is a link to nothing": (replace(FIRST, lambda path: path.symlink_to("x")), "is a link to nothing"),
    "a shard that is a link to itself": (
        replace(FIRST, lambda path: path.symlink_to(path.name)),
        "cannot be read: Too many",
    ),
    "an empty shard": (replace(FIRST, Path.touch), "truncated, or not a safetensors file"),
    "an index beside a single file": (write, f"has both {SINGLE_FILE} and {INDEX_FILE}"),
}


@pytest.mark.parametrize("name", SHARD_DAMAGES)
def test_each_damage_of_a_sharded_model_is_named(sharded: Path, name: str):
    change, message = SHARD_DAMAGES[name]
    change(sharded)
    with pytest.raises(LoraError) as caught:
        read_headers(sharded)
    assert message in caught.value.message
    assert str(sharded) in caught.value.message
    assert caught.value.hint


def test_a_link_to_a_file_is_followed_as_in_the_cache_of_the_hub(sharded: Path):
    (sharded / FIRST).rename(sharded / "blob")
    (sharded / FIRST).symlink_to("blob")
    assert sorted(read_headers(sharded)) == ["a", "b"]


def test_an_index_of_the_single_file_and_tensors_that_it_does_not_list_are_accepted(sharded: Path):
    """transformers loads every tensor of a shard."""
    index(a=FIRST)(sharded)
    assert sorted(read_headers(sharded)) == ["a"]
    save_file(TENSORS, sharded / FIRST, {"format": "pt"})
    assert sorted(read_headers(sharded)) == ["a", "b", "c"]
    write(sharded)
    index(a=SINGLE_FILE)(sharded)
    assert sorted(read_headers(sharded)) == ["a", "b", "c"]


def test_weights_that_are_stored_as_integers_are_refused(tmp_path: Path):
    names = {"a.weight": torch.int8, "a.bias": torch.bool, "b.weight": torch.bfloat16, "position_ids": torch.int64}
    save_file({name: torch.zeros(2, dtype=dtype) for name, dtype in names.items()}, tmp_path / SINGLE_FILE)
    with pytest.raises(LoraError, match=r"a\.weight is stored as I8, but config\.json has no quantization"):
        check_weights_are_floats(read_headers(tmp_path))
    save_file({"b.weight": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / SINGLE_FILE)
    check_weights_are_floats(read_headers(tmp_path))


def test_pickled_weights_are_refused_with_the_command_that_converts_them(tmp_path: Path):
    with pytest.raises(LoraError, match=r"has no model\.safetensors$"):
        read_headers(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(LoraError, match=r"has no model\.safetensors, only pytorch_model\.bin") as caught:
        read_headers(tmp_path)
    assert "save_pretrained" in str(caught.value.hint)
