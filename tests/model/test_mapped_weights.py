"""Weights of a loaded model do not change, and the process does not end, when their file is changed or cut off."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_cli.model.mapped_weights import MAPS, copy_mapped_weights
from tests.model import zoo
from tests.support import checkpoints

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_has_no_view_of_its_file(tmp_path: Path, dtype: torch.dtype):
    zoo.make("llama").to(dtype).save_pretrained(tmp_path)
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = mapped(ids).logits  # of the same memory alignment, so that they are equal to the last bit
    weights = {name: value.clone() for name, value in mapped.state_dict().items()}
    model = checkpoints.checkpoint(tmp_path).load(CPU, dtype=dtype).model.eval()
    os.truncate(tmp_path / "model.safetensors", 100)  # reading a view of the file would end this process
    for name, value in weights.items():
        assert torch.equal(model.state_dict()[name], value), name
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.skipif(not MAPS.is_file(), reason="this system does not list its memory maps")
def test_tied_weights_stay_tied_and_other_tensors_stay_where_they_are(tmp_path: Path):
    (tmp_path / "a").write_bytes(bytes(8 * 40_000))
    model = torch.nn.Sequential(
        torch.nn.Embedding(100, 400), torch.nn.Linear(400, 100, bias=False), torch.nn.Linear(3, 3)
    )
    mapped = torch.from_file(str(tmp_path / "a"), shared=False, size=40_000, dtype=torch.float64)
    model[0].weight = torch.nn.Parameter(mapped.view(100, 400))
    model[1].weight = model[0].weight
    before = [parameter.data_ptr() for parameter in model.parameters()]
    copy_mapped_weights(model)
    after = [parameter.data_ptr() for parameter in model.parameters()]
    assert after[0] != before[0]
    assert after[1:] == before[1:]
    assert model[1].weight is model[0].weight
