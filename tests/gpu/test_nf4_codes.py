"""NF4 on the device = NF4 on the CPU: codes, scales, and the weights that they stand for.

The kernels may multiply by 1/scale where the others divide: a weight at the border of two codes may get either one.
"""

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor

from tests.gpu.tiny_runs import load_base
from tests.model import zoo

MAX_OTHER_CODES = 1e-3  # share of weights with the neighboring code
CPU = torch.device("cpu")


def codes(packed: Tensor) -> Tensor:
    """Return the codes, int16 [weights], of packed ones: two in a byte."""
    values = packed.cpu().flatten().to(torch.int16)
    return torch.stack((values >> 4, values & 15), dim=1).flatten()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_4_bit_codes_and_scales_are_those_of_the_cpu(tmp_path: Path, code: str, double: bool, device: torch.device):
    zoo.make("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    section = {"type": code, "double_quant": double}
    here, there = (load_base(tmp_path, place, dtype=torch.bfloat16, **section) for place in (device, CPU))
    others = dict(there.named_modules())
    found = {name: module for name, module in here.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert len(found) == 14
    for name, layer in found.items():
        expected, state = others[name].weight, layer.weight.quant_state
        assert layer.weight.device == state.absmax.device == device
        difference = (codes(layer.weight.data) - codes(expected.data)).abs()
        assert float((difference > 0).float().mean()) <= MAX_OTHER_CODES
        if code == "nf4":  # neighbors in value are neighbors in number
            assert int(difference.max()) <= 1
        if not double:
            assert torch.equal(state.absmax.cpu(), expected.quant_state.absmax)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [True, False])
def test_equal_nf4_codes_are_equal_weights(double: bool, dtype: torch.dtype, device: torch.device):
    weight = torch.randn(128, 192, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    expected = bnb.functional.dequantize_4bit(packed, state)
    state.to(device)
    found = bnb.functional.dequantize_4bit(packed.to(device), state)
    assert found.shape == weight.shape
    assert zoo.relative(found.cpu().double(), expected.double()) < (1e-6 if dtype == torch.float32 else 8e-3)
