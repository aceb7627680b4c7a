"""Wrong weights of a merged model are found: flipped bits, missing, foreign and reshaped tensors; right ones pass."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lora_cli.merging import check_weights, streamed_models, verify
from lora_cli.merging.streamed_models import AdaptedModel, Streams
from lora_cli.model import safetensors_io
from lora_cli.model.adapter_files import open_adapter
from lora_cli.model.saved_adapter import SavedAdapter
from tests.merging.test_stream import convert_to_bf16, merge, randomize
from tests.model import zoo
from tests.support import checkpoints

CHANGED = "model.layers.1.mlp.down_proj.weight"
UNCHANGED = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, an adapter and the merged model, all in bf16."""
    path = tmp_path_factory.mktemp("merged")
    zoo.make("llama").save_pretrained(path / "base")
    convert_to_bf16(path / "base")
    base: PreTrainedModel = checkpoints.load(path / "base")
    model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear"))
    randomize(model)
    model.save_pretrained(str(path / "adapter"))
    merge(path / "base", path / "adapter", path / "out")
    return path


@pytest.fixture(scope="module")
def streams() -> Iterator[Streams]:
    with verify.open_streams() as opened:
        yield opened


def saved(folder: Path) -> SavedAdapter:
    return SavedAdapter(open_adapter(folder / "adapter"), checkpoints.checkpoint(folder / "base"))


@pytest.fixture(scope="module")
def adapted(folder: Path, streams: Streams) -> AdaptedModel:
    return streamed_models.open_adapted(saved(folder), {}, streams)


def found(folder: Path, adapted: AdaptedModel, streams: Streams, *, out: Path | None = None) -> list[tuple[str, str]]:
    merged = streamed_models.open_merged(saved(folder), out or folder / "out", streams)
    return [tuple(mismatch) for mismatch in check_weights.mismatches(adapted, merged, streams)]


def test_a_right_merge_has_no_mismatch(folder: Path, adapted: AdaptedModel, streams: Streams):
    assert found(folder, adapted, streams) == []
    assert found(folder, adapted, streams) == []  # LoRA's factors are whole again after a check


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(name=st.sampled_from([CHANGED, UNCHANGED]), place=st.integers(0, 63), bit=st.integers(0, 15))
def test_any_flipped_bit_is_found(
    name: str, place: int, bit: int, folder: Path, adapted: AdaptedModel, streams: Streams
):
    info = safetensors_io.list_tensors(folder / "out")[name]
    with info.file.open("r+b", buffering=0) as file:
        at = info.begin + 2 * place + bit // 8
        before = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([before[0] ^ 1 << bit % 8]), at)
        try:
            mismatches = found(folder, adapted, streams)
        finally:
            os.pwrite(file.fileno(), before, at)
    if name == CHANGED and bit == 0 and not mismatches:
        return  # a value half-way between two bf16 numbers may be rounded to either
    assert [mismatch[0] for mismatch in mismatches] == [name]
    assert "differs from " in mismatches[0][1]


def test_missing_foreign_and_reshaped_tensors_are_found(
    folder: Path, adapted: AdaptedModel, streams: Streams, tmp_path: Path
):
    tensors = load_file(folder / "out/model.safetensors")
    del tensors[UNCHANGED]
    tensors["model.foreign"] = torch.zeros(3)
    tensors[CHANGED] = tensors[CHANGED].T.contiguous()
    out = tmp_path / "out"
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text((folder / "out/config.json").read_text())
    assert sorted(found(folder, adapted, streams, out=out)) == [
        ("model.foreign", "is neither in the base nor in the adapter"),
        (UNCHANGED, "is missing"),
        (CHANGED, "has the shape [128, 64], not [64, 128]"),
    ]


VALUES = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-1e4, max_value=1e4)


@settings(deadline=None, derandomize=True)
@given(st.lists(VALUES, min_size=1, max_size=20), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_rounding_once_is_explained_and_two_units_are_not(values: list[float], dtype: torch.dtype):
    expected = torch.tensor(values)
    rounded = expected.to(dtype)
    assert check_weights._error_ratio(rounded, expected) <= 1
    limits = torch.finfo(dtype)
    largest = int(expected.abs().argmax())
    unit = limits.eps * max(abs(values[largest]), limits.smallest_normal)
    wrong = rounded.double()
    wrong[largest] += 4 * unit + 3e-5 * abs(values[largest])
    assert check_weights._error_ratio(wrong.to(dtype), expected) > 1


def test_a_value_that_is_not_finite_is_not_explained():
    assert check_weights._error_ratio(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
    assert check_weights._error_ratio(torch.tensor([2]), torch.tensor([1.0])) == float("inf")
    assert check_weights._error_ratio(torch.tensor([1]), torch.tensor([1.0])) == 0


@pytest.mark.parametrize("count", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.int64])
def test_bits_are_compared_in_every_dtype_and_length(dtype: torch.dtype, count: int):
    values = torch.arange(count).to(dtype)
    assert check_weights._equal_bits(values, values.clone())
    padded = torch.cat([values, values])
    assert check_weights._equal_bits(padded[count:], values)  # wherever it is in memory
    if count:
        other = values.clone()
        other[-1] = 1 if not other[-1] else 0
        assert not check_weights._equal_bits(values, other)
        assert check_weights._count_different(values, other) == 1
