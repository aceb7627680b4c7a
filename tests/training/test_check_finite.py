"""NaN and infinity are found in any tensor of floats before it is saved."""

import math

import pytest
import torch
from torch import Tensor

from lora_cli.training.check_finite import first_not_finite


def tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    largest = torch.full((3, 3), torch.finfo(dtype).max, dtype=dtype)
    return {
        "scalar": torch.tensor(3.0),
        "codes": torch.zeros(4, dtype=torch.uint8),
        "empty": torch.empty(0, 4),
        "a": torch.ones(8, 8, dtype=dtype),
        "largest": largest,
        "b": torch.ones(2, dtype=dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_only_values_that_are_not_finite_are_found(dtype: torch.dtype):
    assert first_not_finite(tensors(dtype)) is None
    assert first_not_finite({}) is None
    for value, found in ((math.nan, "b has NaN"), (math.inf, "b has an infinity"), (-math.inf, "b has an infinity")):
        damaged = tensors(dtype)
        damaged["b"][1] = value
        assert first_not_finite(damaged) == found
        damaged["a"][3, 3] = value
        assert first_not_finite(damaged) == found.replace("b", "a", 1)
