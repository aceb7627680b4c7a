"""Headers of GGUF files: counts, lengths, types and offsets that cannot be right are refused, in time and memory."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.errors import LoraError
from lora_cli.model.gguf_header import read_gguf_header

LLAMA = {"general.architecture": "llama", "llama.block_count": 2}
WEIGHTS = np.arange(64, dtype=np.float32).reshape(2, 32)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def value(content: Any) -> bytes:
    """Return a metadata value with its type, as in the format."""
    match content:
        case bytes():
            return content
        case bool():
            return struct.pack("<IB", 7, content)
        case int():
            return struct.pack("<IQ", 10, content)
        case float():
            return struct.pack("<If", 6, content)
        case str():
            return struct.pack("<I", 8) + text(content)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(content)) + b"".join(map(text, content))
        case list():
            return struct.pack("<IIQ", 9, 10, len(content)) + struct.pack(f"<{len(content)}Q", *content)
    raise AssertionError(content)


def tensor(name: str, shape: tuple[int, ...] = (2, 32), kind: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


def gguf_bytes(
    metadata: dict[str, Any] | list[tuple[str, Any]] = LLAMA,
    tensors: list[bytes] | None = None,
    *,
    version: int = 3,
    counts: tuple[int | None, int | None] = (None, None),
    body: bytes = WEIGHTS.tobytes(),
) -> bytes:
    """Return a GGUF file; `counts` replace the numbers of tensors and metadata entries."""
    entries = list(metadata.items()) if isinstance(metadata, dict) else metadata
    table = [tensor("token_embd.weight")] if tensors is None else tensors
    right = (len(table), len(entries))
    written = [right[i] if counts[i] is None else counts[i] for i in range(2)]
    head = b"GGUF" + struct.pack("<IQQ", version, *written)
    head += b"".join(text(key) + value(content) for key, content in entries) + b"".join(table)
    return head + bytes(-len(head) % 32) + body


TOKENS = {**LLAMA, "tokenizer.ggml.tokens": ["a", "b"]}
BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it does not begin with GGUF"),
    "another format": (b"PK\3\4" + bytes(100), "it does not begin with GGUF"),
    "version 1": (gguf_bytes(version=1), "it is of version 1; versions 2 and 3"),
    "another byte order": (gguf_bytes(version=3 << 24), "or of a machine with another byte order"),
    "2^63 tensors": (gguf_bytes(counts=(2**63, None)), "it announces 9,223,372,036,854,775,808 tensors"),
    "2^64 - 1 entries": (gguf_bytes(counts=(None, 2**64 - 1)), "18,446,744,073,709,551,615 metadata entries"),
    "one entry too many": (gguf_bytes(counts=(None, 3)), "is not a GGUF file that can be read"),
    "a text of 2^62 bytes": (gguf_bytes({**LLAMA, "a": struct.pack("<IQ", 8, 2**62)}), "bytes of text, more than"),
    "an array of 2^62 texts": (gguf_bytes({**LLAMA, "a": struct.pack("<IIQ", 9, 8, 2**62)}), "texts, more than"),
    "an array of 2^62 numbers": (gguf_bytes({**LLAMA, "a": struct.pack("<IIQ", 9, 12, 2**62)}), "numbers, more than"),
    "an array of arrays": (gguf_bytes({**LLAMA, "a": struct.pack("<IIQ", 9, 9, 1)}), "an array has values of type 9"),
    "a value of type 99": (gguf_bytes({**LLAMA, "a": struct.pack("<IQ", 99, 1)}), "a value has the unknown type 99"),
    "a truth value of 7": (gguf_bytes({**LLAMA, "a": struct.pack("<IB", 7, 7)}), "a truth value is 7"),
    "text in another encoding": (gguf_bytes([(b"\xff\xfe", 1)]), "a text is not UTF-8"),
    "a key twice": (gguf_bytes([*LLAMA.items(), ("llama.block_count", 3)]), "llama.block_count is there twice"),
    "no architecture": (gguf_bytes({"a": 1}), "its metadata have no general.architecture"),
    "an architecture that is a number": (gguf_bytes({"general.architecture": 1}), "general.architecture = 1"),
    "a part of several files": (gguf_bytes({**LLAMA, "split.count": 3}), "it is one of several parts"),
    "ten million layers": (
        gguf_bytes({**LLAMA, "llama.block_count": 10**7}, [tensor("blk.1.a")]), "llama.block_count is 10000000",
    ),
    "fewer layers than tensors": (
        gguf_bytes(tensors=[tensor("blk.2.a")]), "it has tensors of 3 layers, and llama.block_count is 2",
    ),
    "no number of layers": (
        gguf_bytes({"general.architecture": "llama"}, [tensor("blk.1.a")]), "llama.block_count is missing",
    ),
    "layers in a text": (gguf_bytes({**LLAMA, "llama.block_count": "2"}), "llama.block_count = 2"),
    "no width": (gguf_bytes({**LLAMA, "llama.embedding_length": 0}), "llama.embedding_length = 0"),
    "a width of 2^63": (gguf_bytes({**LLAMA, "llama.embedding_length": 2**63}), "llama.embedding_length = 9223372"),
    "NaN": (gguf_bytes({**LLAMA, "llama.rope.freq_base": float("nan")}), "llama.rope.freq_base = nan"),
    "an alignment of 3": (gguf_bytes({**LLAMA, "general.alignment": 3}), "general.alignment = 3"),
    "tokens that are numbers": (gguf_bytes({**LLAMA, "tokenizer.ggml.tokens": [1, 2]}), "tokens = [1, 2]"),
    "too few token types": (gguf_bytes({**TOKENS, "tokenizer.ggml.token_type": [1]}), "token_type = [1]"),
    "an end beyond the tokens": (gguf_bytes({**TOKENS, "tokenizer.ggml.eos_token_id": 2}), "eos_token_id = 2"),
    "more tokens than embeddings": (
        gguf_bytes({**LLAMA, "tokenizer.ggml.tokens": ["a", "b", "c"]}), "3 tokens, but embeddings of 2",
    ),
    "a tensor twice": (gguf_bytes(tensors=[tensor("a"), tensor("a")]), "the tensor a is there twice"),
    "five dimensions": (gguf_bytes(tensors=[tensor("a", (1, 1, 1, 2, 32))]), "the tensor a has 5 dimensions"),
    "2^32 - 1 dimensions": (gguf_bytes(tensors=[text("a") + b"\xff" * 40]), "has 4,294,967,295 dimensions"),
    "a dimension of zero": (gguf_bytes(tensors=[tensor("a", (0, 32))]), "the impossible shape 0x32"),
    "a shape of 2^80": (gguf_bytes(tensors=[tensor("a", (2**40, 2**40))]), "the impossible shape"),
    "a row that is no number of blocks": (gguf_bytes(tensors=[tensor("a", (2, 31), 8)]), "the impossible shape 2x31"),
    "an unknown type": (gguf_bytes(tensors=[tensor("a", kind=77)]), "the tensor a has the unknown type 77"),
    "an offset beyond the file": (gguf_bytes(tensors=[tensor("a", offset=2**40)]), "the file is truncated"),
    "an offset between two units": (gguf_bytes(tensors=[tensor("a", offset=4)]), "not a multiple of 32"),
    "overlapping tensors": (gguf_bytes(tensors=[tensor("a"), tensor("b", offset=32)]), "the bytes of b overlap"),
    "a truncated body": (gguf_bytes(body=WEIGHTS.tobytes()[:-1]), "the file is truncated"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_each_damage_is_named(tmp_path: Path, name: str):
    content, message = BAD[name]
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(LoraError) as caught:
        read_gguf_header(tmp_path / "x.gguf")
    assert message in caught.value.message
    assert str(tmp_path / "x.gguf") in caught.value.message
    assert caught.value.message.isprintable()
    assert caught.value.hint


def test_a_whole_file_is_read_as_the_gguf_package_reads_it(tmp_path: Path):
    (tmp_path / "x.gguf").write_bytes(gguf_bytes({**TOKENS, "a": 1.5, "b": True, "c": [1, 2]}))
    header = read_gguf_header(tmp_path / "x.gguf")
    reader = gguf.GGUFReader(str(tmp_path / "x.gguf"))
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata == fields
    assert header.architecture == "llama"
    (only,) = reader.tensors
    info = header.tensors[only.name]
    assert (info.begin, info.size, info.type) == (only.data_offset, only.n_bytes, only.tensor_type)
    assert info.shape == tuple(only.shape.tolist()[::-1])


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("nowhere"), Path.touch])
def test_only_regular_files_are_opened(tmp_path: Path, make: Callable[[Path], object]):
    make(tmp_path / "x.gguf")
    with pytest.raises(LoraError, match=r"x\.gguf"):
        read_gguf_header(tmp_path / "x.gguf")


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=60), at=st.integers(0, 250))
def test_no_bytes_raise_anything_else(data: bytes, at: int, tmp_path_factory: pytest.TempPathFactory):
    right = gguf_bytes(TOKENS)
    file = tmp_path_factory.mktemp("any") / "x.gguf"
    for content in (right[:at] + data + right[at:], right[:at] + data + right[at + len(data) :]):
        file.write_bytes(content)
        try:
            header = read_gguf_header(file)
        except LoraError:
            continue
        assert all(tensor.begin + tensor.size <= len(content) for tensor in header.tensors.values())
