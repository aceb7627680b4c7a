"""The config says whether packed rows stay separate, and stateful layers get the borders of the rows."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.errors import LoraError
from lora_cli.model import packing_support, select_attention
from lora_cli.model.packing_support import packing_obstacle, stateful_layers
from tests.model import families
from tests.model.families import FAMILIES
from tests.support.checkpoints import CPU

CUDA = torch.device("cuda")


def by_row(function: Callable[..., Any], *, sequence_dim: int) -> Callable[..., Any]:
    """Return `function`, a kernel in torch for one row, as one that starts anew at each border that it is given."""

    def kernel(*inputs: Any, cu_seqlens: Any = None, seq_idx: Any = None, **options: Any) -> Any:
        if cu_seqlens is not None:
            lengths = cu_seqlens.diff().tolist()
        elif seq_idx is not None:
            lengths = seq_idx[0].bincount().tolist()
        else:
            return function(*inputs, **options)

        def split(value: Any) -> list[Any]:
            has_tokens = isinstance(value, torch.Tensor) and value.dim() > sequence_dim
            has_tokens = has_tokens and value.shape[sequence_dim] == sum(lengths)
            return list(value.split(lengths, sequence_dim)) if has_tokens else [value] * len(lengths)

        columns = [split(value) for value in inputs]
        named = {name: split(value) for name, value in options.items()}
        results = [
            function(*(column[row] for column in columns), **{name: values[row] for name, values in named.items()})
            for row in range(len(lengths))
        ]
        if isinstance(results[0], tuple):
            return torch.cat([result[0] for result in results], sequence_dim), None
        return torch.cat(results, sequence_dim)

    return kernel


@pytest.mark.parametrize("name", ["qwen3.5", "lfm2", "olmo-hybrid"])
def test_row_borders_reach_the_kernels_which_keep_packed_rows_apart(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The GPU kernels take the borders; here, the same functions in torch are called row by row in their place."""
    model = families.load(FAMILIES[name], families.write(FAMILIES[name], tmp_path)).model
    with pytest.raises(LoraError, match="can't keep packed sequences apart without"):
        select_attention.choose_attention(model, "auto", packing=True)
    module = importlib.import_module(type(model).__module__)
    for kernel, sequence_dim in (("causal_conv1d_fn", 2), ("torch_chunk_gated_delta_rule", 1)):
        if hasattr(module, kernel):
            monkeypatch.setattr(module, kernel, by_row(getattr(module, kernel), sequence_dim=sequence_dim))
    check = select_attention.choose_attention(model, "auto", packing=True)
    assert check is not None
    assert check.attention == "sdpa"
    assert check.leak == 0
    assert check.difference < 1e-5


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].task == "causal-lm"])
def test_every_family_without_packing_has_a_reason(name: str):
    obstacle = packing_obstacle(families.config_of(FAMILIES[name]), CPU)
    assert (obstacle is None) is FAMILIES[name].packs


def test_on_a_gpu_the_kernels_decide(monkeypatch: pytest.MonkeyPatch):
    config = families.config_of(FAMILIES["qwen3.5"])
    assert stateful_layers(config) == ("linear_attention",)
    installed: set[str] = set()
    monkeypatch.setattr(packing_support, "find_spec", lambda name: name if name in installed else None)
    assert "need causal_conv1d and fla or mamba_ssm" in (packing_obstacle(config, CUDA) or "")
    installed.add("causal_conv1d")
    assert "need fla or mamba_ssm" in (packing_obstacle(config, CUDA) or "")
    assert packing_obstacle(families.config_of(FAMILIES["lfm2"]), CUDA) is None  # convolutions alone
    installed.add("fla")
    assert packing_obstacle(config, CUDA) is None
    # Its kernels take no borders, whatever is installed.
    assert "carry state" in (packing_obstacle(families.config_of(FAMILIES["jamba"]), CUDA) or "")
