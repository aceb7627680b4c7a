"""Files of torch.save are read without unpickling: tensors as they are, and a hostile or damaged file does nothing."""

import io
import os
import pickle
import pickletools
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora_cli.errors import LoraError
from lora_cli.model.foreign_adapters.npz_file import read_npz
from lora_cli.model.foreign_adapters.torch_file import read_torch_file


def refused(file: Path, **options: Any) -> str:
    with pytest.raises(LoraError) as error:
        read_torch_file(file, **options)
    assert error.value.hint
    return error.value.message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tensors_are_read_as_torch_reads_them(dtype: torch.dtype, tmp_path: Path):
    whole = torch.randn(6, 8).to(dtype)
    tensors = {
        "plain": whole, "view": whole[1:3], "transposed": whole.T, "number": torch.tensor(2.5, dtype=dtype),
        "parameter": nn.Parameter(torch.randn(3).to(dtype)), "empty": torch.zeros(0, 3, dtype=dtype),
    }  # fmt: skip
    torch.save(tensors, tmp_path / "a.bin")
    found = read_torch_file(tmp_path / "a.bin")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.detach()), name
        assert found[name].is_contiguous()


def test_the_state_dict_of_a_module_and_a_nested_one_are_read(tmp_path: Path):
    layer = nn.Linear(3, 2)
    for content, inner in ((layer.state_dict(), None), ({"model": layer.state_dict(), "step": 3}, "model")):
        torch.save(content, tmp_path / "a.pt")
        assert torch.equal(read_torch_file(tmp_path / "a.pt", inner=inner)["weight"], layer.weight)
    assert "a dictionary as model" in refused(tmp_path / "a.pt")


class Hostile:
    """Unpickling it creates a file."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("created-by-pickle",)


class Sets:
    """Unpickling it changes attributes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), {"update": None}, None, iter([(1, 2)])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (Hostile(), "a call of posix.mkdir"),
        ({"a": Hostile()}, "a call of posix.mkdir"),
        (OrderedDict(a=torch.zeros(2), b=[Hostile()]), "a call of posix.mkdir"),
        ({"a": Sets()}, "a number as a name"),
        ({"a": os.system}, "the name posix.system as a, not a tensor"),
        ({"a": torch.zeros(2, dtype=torch.int64)}, "a storage of torch.LongStorage"),
        ({"a": torch.zeros(2).to_sparse()}, "a call of torch.serialization._get_layout"),
        ({1: torch.zeros(2)}, "a number as a name"),
        ([torch.zeros(2)], "a list in place of a dictionary of tensors"),
        ({"a": {"b": torch.zeros(2)}}, "a dictionary as a, not a tensor"),
        ({"a": "text"}, "a text as a, not a tensor"),
        ({"a": nn.Linear(1, 1)}, "the instruction NEWOBJ"),
    ],
)
def test_anything_but_tensors_is_refused_and_nothing_is_run(
    content: Any, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "a.bin")
    message = refused(Path("a.bin"))
    assert message.startswith("a.bin: its pickle has ")
    assert problem in message
    assert os.listdir() == ["a.bin"]


def write(file: Path, program: bytes, **entries: bytes) -> None:
    """Write an archive as torch.save does, with any pickle."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {"data.pkl": program, **entries}.items():
            archive.writestr(f"archive/{name.replace('__', '/')}", content)


def program_of(content: Any) -> bytes:
    """The pickle that torch.save writes for `content`."""
    file = io.BytesIO()
    torch.save(content, file)
    with zipfile.ZipFile(file) as archive:
        return archive.read("archive/data.pkl")


@pytest.mark.parametrize(
    "program",
    [
        b"cposix\nmkdir\n(S'created-by-pickle'\ntR.",  # the oldest protocol
        b"(S'created-by-pickle'\niposix\nmkdir\n.",
        b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
        b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93\x8c\x01x\x85R.",
        b"\x80\x02}X\x01\x00\x00\x00aX\x01\x00\x00\x00bs.extra",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.",  # attributes of a function
        b"\x80\x02ccollections\nOrderedDict\n.",
        b"\x80\x02" + b"(" * 10_000 + b".",
        b"\x80\x02\x8a\xff" + b"\xff" * 20,
        b"\x80\x02h\x05.",
        b"\x80\x02}}.",
        b"",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f",  # a text of 2^63 bytes
    ],
)
def test_hand_written_pickles_are_refused(program: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write(Path("a.bin"), program)
    refused(Path("a.bin"))
    assert os.listdir() == ["a.bin"]


def test_python_would_have_run_the_hostile_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """So the tests above could fail."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Hostile()))
    assert os.listdir() == ["created-by-pickle"]
    assert "mkdir" in {str(argument) for _, argument, _ in pickletools.genops(pickle.dumps(Hostile()))}


def change(program: bytes, old: bytes, new: bytes) -> bytes:
    assert program.count(old) >= 1
    return program.replace(old, new)


def test_sizes_that_the_file_does_not_have_are_refused(tmp_path: Path):
    file, storage = tmp_path / "a.bin", b"\0" * 24
    program = program_of({"a": torch.zeros(2, 3)})
    write(file, program, data__0=storage)
    assert read_torch_file(file)["a"].shape == (2, 3)
    write(file, program, data__0=storage[:20])
    assert "a needs 6 values of float32, and has an entry of 20 bytes" in refused(file)
    write(file, program)
    assert "has no entry" in refused(file)
    # A view that is larger than its storage: 2x3 of shape becomes 200x3, or its stride 3 becomes 200.
    write(file, change(program, b"K\x02K\x03\x86", b"K\xc8K\x03\x86"), data__0=storage)
    assert "a is larger than its storage" in refused(file)
    write(file, change(program, b"K\x03K\x01\x86", b"K\xc8K\x01\x86"), data__0=storage)
    assert "a is larger than its storage" in refused(file)
    # An expanded view: a stride of 0 would make 200 rows of memory out of one.
    expanded = change(change(program, b"K\x02K\x03\x86", b"K\xc8K\x03\x86"), b"K\x03K\x01\x86", b"K\x00K\x01\x86")
    write(file, expanded, data__0=storage)
    assert "a is larger than its storage" in refused(file)
    names = [f"{number:04}" for number in range(3000)]
    torch.save(dict.fromkeys(names, torch.zeros(5000)), file)  # 3000 copies of 20 kB out of one
    assert "its tensors have 60,000,000 bytes, and the file" in refused(file)


def test_damaged_archives_and_other_formats_are_refused(tmp_path: Path):
    file = tmp_path / "a.bin"
    torch.save({"a": torch.arange(1000.0)}, file)
    whole = file.read_bytes()
    for size in (0, 2, 30, 600, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(file)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # within the values
    file.write_bytes(flipped)
    assert "cannot be read: Bad CRC-32" in refused(file)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    assert "is compressed" in refused(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("archive/data.pkl", b"")
    assert "twice" in refused(file)
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(150):
            archive.writestr(f"{'a' * 60_000}{number}", b"")
    assert "its list of entries has 9,00" in refused(file)
    torch.save({"a": torch.zeros(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(LoraError) as error:
        read_torch_file(file)
    assert error.value.message.endswith("has the format of torch before 1.6, which is not read")
    assert "weights_only=True" in str(error.value.hint)
    write(file, program_of({"a": torch.zeros(2)}), data__0=b"\0" * 8, byteorder=b"big")
    assert "big-endian" in refused(file)
    assert "does not exist" in refused(tmp_path / "absent.bin")


def test_a_program_takes_no_longer_than_its_length(tmp_path: Path):
    """Each of these has a long list, and as many instructions: 10^10 steps if each of them read the list."""
    count = 100_000
    pairs = b"]q\x00(" + b"X\x01\x00\x00\x00aK\x01\x86" * count + b"e"
    for program in (b")" * count + b"(t" * count, pairs + b"ccollections\nOrderedDict\nh\x00\x85R" * count):
        write(tmp_path / "a.bin", b"\x80\x02" + program + b".")
        before = time.perf_counter()
        refused(tmp_path / "a.bin")
        assert time.perf_counter() - before < 10


def test_places_that_an_archive_does_not_have_are_refused(tmp_path: Path):
    file = tmp_path / "a.bin"
    torch.save({"a": torch.arange(4.0)}, file)
    whole = file.read_bytes()
    first = whole.index(b"PK\x01\x02")
    places = [0xFFFFFFFE, 0x7FFFFFFF, len(whole) - 2, first]
    for field, values in ((42, places), (20, places), (24, places)):  # where it is, its size, and both unpacked
        for value in values:
            changed = bytearray(whole)
            changed[first + field : first + field + 4] = value.to_bytes(4, "little")
            file.write_bytes(changed)
            refused(file)
    end = whole.rindex(b"PK\x06\x06")  # the list of entries: its size, and where it is
    for field in (40, 48):
        for value in (2**64 - 1, 2**63 - 1, 2**63, len(whole) + 1, 8 << 20):
            changed = bytearray(whole)
            changed[end + field : end + field + 8] = value.to_bytes(8, "little")
            file.write_bytes(changed)
            refused(file)


@pytest.mark.parametrize(
    "header",
    [
        *(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}" for shape in (
            "(0, -4)", "(-1, -4)", "(0, 10000000000000000000000)", "(True, True)", f"({'1, ' * 100})", "(1L,", "1", "(",
        )),
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }",
        "{'descr': '<f4', 'shape': (1,), }", "(" * 5000, "", "x = 1",
    ],
)  # fmt: skip
def test_headers_of_npz_that_describe_no_array_are_refused(header: str, tmp_path: Path):
    file, text = tmp_path / "a.npz", header.encode()
    for content in (b"", b"\0" * 4, b"\0" * 64):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content)
        with pytest.raises(LoraError) as error:
            read_npz(file)
        assert error.value.hint


def test_arrays_of_npz_are_read_and_objects_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float16),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    }  # fmt: skip
    np.savez("a.npz", **arrays)
    found = read_npz(Path("a.npz"))
    assert {name: torch.from_numpy(array).equal(found[name]) for name, array in arrays.items()} == dict.fromkeys(
        arrays, True
    )
    half = torch.randn(2, 3).bfloat16()
    np.savez("a.npz", a=half.view(torch.int16).numpy().view("V2"))  # as mlx writes it
    assert torch.equal(read_npz(Path("a.npz"))["a"], half)
    hostile = np.array([Hostile()], dtype=object)
    for name, content in {"o": hostile, "i": np.zeros(2, np.int64)}.items():
        np.savez("a.npz", **{name: content})
        with pytest.raises(LoraError, match=r"has values of (object|int64), not float32"):
            read_npz(Path("a.npz"))
    np.savez_compressed("a.npz", **arrays)
    with pytest.raises(LoraError, match="is compressed"):
        read_npz(Path("a.npz"))
    with zipfile.ZipFile("a.npz", "w") as archive:
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 1000000000), }"
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(LoraError, match="has 0 bytes for the shape"):
        read_npz(Path("a.npz"))
    assert os.listdir() == ["a.npz"]


def test_values_of_a_tensor_do_not_depend_on_the_others(tmp_path: Path):
    """Views of one storage get memory of their own, as safetensors needs it."""
    whole = torch.arange(4.0)
    torch.save({"a": whole[:2], "b": whole[2:]}, tmp_path / "a.bin")
    found: dict[str, Tensor] = read_torch_file(tmp_path / "a.bin")
    found["a"].zero_()
    assert found["b"].tolist() == [2, 3]
