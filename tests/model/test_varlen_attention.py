"""Attention of packed rows on GPUs, with an eager loop over the rows in place of torch's kernel (`eager_varlen.py`)."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_cli.model import loss, select_attention
from lora_cli.model.packed_attention import LONG_ROW, packed_attention_forward, plan_rows
from lora_cli.model.select_attention import TOLERANCE, choose_attention
from lora_cli.model.varlen_attention import VARLEN_ATTENTION, row_bounds, varlen_attention_forward
from tests.laws.test_packing import logits_packed, packed
from tests.model import zoo
from tests.support.eager_varlen import use_eager_varlen

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    use_eager_varlen(monkeypatch)


@pytest.mark.slow
def test_it_is_the_attention_of_each_row_with_its_gradients():
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(
        lengths=LENGTHS,
        heads=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
        dims=st.sampled_from([(8, 8), (12, 12), (12, 8), (8, 20)]),
        window=st.sampled_from([None, 1, 2, 8]),
        scale=st.sampled_from([None, 0.3]),
    )
    def law(
        lengths: list[int], heads: tuple[int, int], dims: tuple[int, int], window: int | None, scale: float | None
    ) -> None:
        generator = torch.Generator().manual_seed(sum(lengths))

        def draw(count: int, width: int) -> Tensor:
            shape = (1, count, sum(lengths), width)
            return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

        inputs = draw(heads[0], dims[0]), draw(heads[1], dims[0]), draw(heads[1], dims[1])
        options: dict[str, Any] = {"scaling": scale, "sliding_window": window}
        bounds, plan = row_bounds(lengths, torch.device("cpu")), plan_rows(lengths)
        found, _ = varlen_attention_forward(torch.nn.Module(), *inputs, None, row_bounds=bounds, **options)
        expected, _ = packed_attention_forward(torch.nn.Module(), *inputs, None, row_plan=plan, **options)
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, rtol=1e-11, atol=1e-11)
        weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
        gradients = (torch.autograd.grad((out * weights).sum(), inputs) for out in (found, expected))
        for one, other in zip(*gradients, strict=True):
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)

    law()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "deepseek3"])
def test_models_with_it_keep_rows_apart(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    model = zoo.make(family, dtype=dtype)
    monkeypatch.setattr(select_attention, "candidates", lambda *_, **__: [VARLEN_ATTENTION])
    check = choose_attention(model, "auto", packing=True)
    assert check is not None
    assert check.attention == model.config._attn_implementation == VARLEN_ATTENTION
    assert check.leak == 0
    assert check.difference <= TOLERANCE[dtype]


def test_no_gradient_flows_from_row_to_row():
    model = zoo.make("llama", attention=VARLEN_ATTENTION)
    lengths = [9, 1, 30, LONG_ROW + 5]
    embedded: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(
        lambda layer, args, out: embedded.append(out.requires_grad_()) or out
    )
    logits = logits_packed(model, packed(lengths)).split(lengths)
    for number, row in enumerate(logits):
        (gradient,) = torch.autograd.grad(row.square().sum(), embedded[-1], retain_graph=True)
        reached = [bool(part.abs().max() > 0) for part in gradient[0].split(lengths)]
        assert reached == [other == number for other in range(len(lengths))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"is_causal": False}, "later tokens"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"dropout": 0.1}, "attention dropout"),
        ({"row_bounds": None}, "keyword arguments"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, "custom attention mask"),
        ({"value": torch.zeros(1, 4, 3, 260)}, "heads of 264 dimensions"),
    ],
)
def test_options_that_the_kernel_does_not_support_raise(options: dict[str, Any], message: str):
    x = torch.zeros(1, 4, 3, 8)
    bounds = row_bounds([3], torch.device("cpu"))
    arguments = {"query": x, "key": x, "value": x, "attention_mask": None, "row_bounds": bounds, **options}
    with pytest.raises(NotImplementedError, match=message):
        varlen_attention_forward(torch.nn.Module(), **arguments)


def test_float32_is_refused_by_the_kernel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    x, bounds = torch.zeros(1, 4, 3, 8), row_bounds([3], torch.device("cpu"))
    with pytest.raises(NotImplementedError, match="attention in float32"):
        varlen_attention_forward(torch.nn.Module(), x, x, x, None, row_bounds=bounds)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_of_transformers_gets_the_borders_with_integers(attention: str):
    """Without them, transformers finds the rows anew in every layer, and waits for the device several times."""
    model = zoo.make("llama")
    model.config._attn_implementation_internal = attention
    inputs = loss.model_inputs(model, packed([3, 5, 2]))
    assert inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == [0, 3, 8, 10]
    assert inputs["cu_seq_lens_q"].dtype == torch.int32
    assert (inputs["max_length_q"], inputs["max_length_k"]) == (5, 5)
    assert type(inputs["max_length_q"]) is int
    seen: list[dict[str, Any]] = []

    def record(module: torch.nn.Module, query: Tensor, *_: Any, **options: Any) -> tuple[Tensor, None]:
        seen.append(options)
        return query.transpose(1, 2), None

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, attention, record)
        model(**inputs)
    assert len(seen) == model.config.num_hidden_layers
    assert all(options["cu_seq_lens_q"] is inputs["cu_seq_lens_q"] for options in seen)
    assert all(type(options["max_length_k"]) is int for options in seen)
