"""A base with NaN or infinity in any weight is refused by name wherever its weights are read."""

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_cli.data.class_labels import ClassLabels
from lora_cli.errors import LoraError
from lora_cli.model import gguf_base
from lora_cli.model.finite import describe_not_finite, first_not_finite, is_finite
from lora_cli.recipe.schema import QuantizationSpec
from tests.model import families
from tests.model.test_gguf_base import no_output, packed_and_dequantized, write_gguf
from tests.support import checkpoints

BAD = [float("nan"), float("inf"), float("-inf")]


def with_bad_value(folder: Path, out: Path, name: str, *, value: float = BAD[0]) -> Path:
    """Copy a model and set one value of its tensor `name`, in the last row."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(1,), (7, 3), (300, 257)])
def test_one_bad_value_is_found_anywhere(dtype: torch.dtype, shape: tuple[int, ...]):
    largest = torch.finfo(dtype).max
    for at in (0, -1):
        for bad in BAD if dtype.itemsize > 1 else BAD[:1]:
            values = torch.full(shape, largest, dtype=torch.float64).to(dtype)
            assert is_finite(values)
            values.view(-1)[at] = bad
            assert not is_finite(values)
            assert first_not_finite([("a", torch.zeros(3)), ("b", values), ("c", values)]) == "b"


def test_integers_empty_tensors_and_largest_values_are_finite():
    tensors = [torch.zeros(0), torch.full((4,), 255, dtype=torch.uint8), torch.full((5000, 9), 65504.0).half()]
    assert first_not_finite((str(n), tensor) for n, tensor in enumerate(tensors)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_described(dtype: torch.dtype):
    tensors = {
        "scalar": torch.tensor(3.0),
        "codes": torch.zeros(4, dtype=torch.uint8),
        "a": torch.ones(8, 8, dtype=dtype),
        "b": torch.ones(2, dtype=dtype),
    }
    assert describe_not_finite(tensors) is None
    assert describe_not_finite({}) is None
    for value, found in zip(BAD, ("has NaN", "has an infinity", "has an infinity"), strict=True):
        tensors["a"][3, 3] = 1
        tensors["b"][1] = value
        assert describe_not_finite(tensors) == f"b {found}"
        tensors["a"][3, 3] = value
        assert describe_not_finite(tensors) == f"a {found}"


NAMES = ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"]
QUANTIZATIONS = {
    "none": None,
    "nf4": QuantizationSpec(bits=4),
    "nf4 in 16-bit storage": QuantizationSpec(bits=4, storage_dtype="bfloat16"),
    "8 bits": QuantizationSpec(bits=8),
}


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_loaded_base_is_checked_also_before_it_is_quantized(
    tmp_path: Path, tiny_folder: Path, name: str, quantization: str, value: float
):
    folder = with_bad_value(tiny_folder, tmp_path / "bad", name, value=value)
    with pytest.raises(LoraError) as caught:
        checkpoints.load(folder, dtype=torch.bfloat16, quantization=QUANTIZATIONS[quantization])
    assert caught.value.message == f"{folder}: {name} has values that are not finite (NaN or infinite)"
    assert caught.value.exit_code == 2


def test_scales_of_a_prequantized_base_are_checked(tmp_path: Path, tiny_folder: Path):
    model = checkpoints.load(tiny_folder, quantization=QuantizationSpec(bits=4, double_quant=False))
    model.save_pretrained(tmp_path / "nf4")
    assert checkpoints.load(tmp_path / "nf4") is not None
    name = "model.layers.0.mlp.up_proj.weight"
    folder = with_bad_value(tmp_path / "nf4", tmp_path / "bad", f"{name}.absmax")
    with pytest.raises(LoraError, match=f"{name} has values that are not finite"):
        checkpoints.load(folder)


def test_packed_experts_are_checked_before_they_are_packed(tmp_path: Path):
    family = families.FAMILIES["qwen3-moe"]
    families.write(family, tmp_path / "moe")
    names = sorted(name for name in load_file(tmp_path / "moe/model.safetensors") if ".experts." in name)
    folder = with_bad_value(tmp_path / "moe", tmp_path / "bad", names[-1])
    with pytest.raises(LoraError, match=r"experts\.\w+ has values that are not finite"):
        checkpoints.load(folder, dtype=torch.bfloat16, quantization=QuantizationSpec(bits=4))


def test_a_tensor_that_the_task_does_not_use_is_checked_too(tmp_path: Path, tiny_folder: Path):
    labels = ClassLabels("single", ("a", "b"))
    assert checkpoints.load(tiny_folder, task="seq-cls", labels=labels) is not None
    folder = with_bad_value(tiny_folder, tmp_path / "bad", "lm_head.weight")
    with pytest.raises(LoraError, match=r"lm_head\.weight has a value that is not finite"):
        checkpoints.load(folder, task="seq-cls", labels=labels)


def spoil_scale(path: Path, name: str) -> None:
    """Set the fp16 scale of the last Q8_0 block of a tensor in a GGUF file to NaN."""
    tensor = next(each for each in gguf.GGUFReader(str(path)).tensors if each.name == name)
    begin, size = int(tensor.data_offset), int(tensor.n_bytes)
    data = bytearray(path.read_bytes())
    data[begin + size - 34 : begin + size - 32] = np.float16(np.nan).tobytes()
    path.write_bytes(bytes(data))


def test_a_gguf_file_is_checked_before_it_is_cached(tmp_path: Path):
    write_gguf(tmp_path / "tiny.gguf", "Q8_0")
    spoil_scale(tmp_path / "tiny.gguf", "blk.1.ffn_up.weight")
    with pytest.raises(LoraError) as caught:
        gguf_base.unpack_gguf(tmp_path / "tiny.gguf", dtype=torch.float32, cache=tmp_path / "cache", info=no_output)
    assert caught.value.message.startswith(f"{tmp_path}/tiny.gguf: model.layers.1.mlp.up_proj.weight has values")
    assert [path.name for path in tmp_path.glob("cache/gguf/*") if not path.name.startswith(".lock-")] == []


def test_packed_gguf_layers_are_dequantized_for_the_check(monkeypatch: pytest.MonkeyPatch):
    packed, dequantized = packed_and_dequantized("Q8_0")
    monkeypatch.setattr(gguf_base, "UNPACK_BYTES", 200)  # several parts for each layer
    values = dict[str, list[torch.Tensor]]()
    for name, part in gguf_base.packed_values(packed):
        values.setdefault(name, []).append(part)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(torch.cat(values[name]), dequantized.get_parameter(name).flatten())
    assert first_not_finite(gguf_base.packed_values(packed)) is None
    packed.get_parameter(name).data[-1, :2] = torch.tensor([float("nan")], dtype=torch.float16).view(torch.uint8)
    assert first_not_finite(gguf_base.packed_values(packed)) == name
