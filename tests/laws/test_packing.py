"""Law: packed rows equal separate rows: the same logits, and no gradient from one row to another."""

import argparse
import bisect
import csv
import heapq
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from lora_cli.data.collate import Batch, collate_packed
from lora_cli.model import packed_attention
from lora_cli.model.loss import LossFunction
from lora_cli.model.packed_attention import LONG_ROW, packed_attention_forward
from tests.model import zoo

# Short rows, rows close to the limits of the groups and of the flash kernel, long rows.
LENGTHS = st.lists(
    st.one_of(st.integers(1, 12), st.integers(1, 400), st.sampled_from([LONG_ROW - 1, LONG_ROW, LONG_ROW + 1])),
    min_size=1,
    max_size=6,
)


def packed(lengths: list[int], vocabulary: int = zoo.VOCABULARY) -> Batch:
    rows = zoo.rows_of(lengths, vocabulary=vocabulary)
    return collate_packed([rows[i] for i in range(len(rows))], range(len(rows)), 0)


def logits_packed(model: PreTrainedModel, batch: Batch) -> Tensor:
    return model(**LossFunction(model).inputs(batch)).logits[0]


def logits_separate(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the logits [T, vocabulary] of each row alone, with the model's own eager attention."""
    model.set_attn_implementation("eager")
    return torch.cat([model(ids[None]).logits[0] for ids in batch.input_ids[0].split(batch.lengths)])


@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        (family, packed_attention.PACKED_ATTENTION)
        for family in zoo.FAMILIES
        if family not in ("gemma2", "gpt-oss", "bloom", "mamba")
    ]
    + [(family, "sdpa") for family in ("llama", "mistral", "gemma3", "deepseek3")]
    + [("gemma2", "eager")],
)
@torch.no_grad()
def test_packed_rows_have_the_logits_of_separate_rows(family: str, implementation: str):
    model = zoo.make(family)

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(LENGTHS)
    def law(lengths: list[int]) -> None:
        batch = packed(lengths)
        model.set_attn_implementation(implementation)
        logits = logits_packed(model, batch)
        assert zoo.relative(logits, logits_separate(model, batch)) < 1e-5

    law()


@pytest.mark.parametrize("implementation", [packed_attention.PACKED_ATTENTION, "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_no_gradient_flows_from_row_to_row(family: str, implementation: str):
    model = zoo.make(family, attention=implementation)
    lengths = [9, 1, 30, LONG_ROW + 5, 5, 29]
    batch = packed(lengths)
    embedded: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(
        lambda layer, args, out: embedded.append(out.requires_grad_()) or out  # the leaf that gradients are taken at
    )
    logits = logits_packed(model, batch).split(lengths)
    for number, row in enumerate(logits):
        weights = torch.randn(row.shape, generator=torch.Generator().manual_seed(number))
        (gradient,) = torch.autograd.grad((row * weights).sum(), embedded[-1], retain_graph=True)
        reached = [bool(part.abs().max() > 0) for part in gradient[0].split(lengths)]
        assert reached == [other == number for other in range(len(lengths))]


@pytest.mark.slow
@torch.no_grad()
def test_the_demo_model_isolates_rows_of_real_text(demo: PreTrainedModel, demo_folder: Path):
    # Text, because with random ids eager and sdpa differ by 1.4e-5 even on a single row.
    text = "\n".join(module.__doc__ for module in (argparse, json, heapq, csv, bisect))
    ids = AutoTokenizer.from_pretrained(demo_folder)(text, return_tensors="pt")["input_ids"]
    lengths = [24, LONG_ROW + 4, 1, 17]
    batch = packed(lengths)._replace(input_ids=ids[:, : sum(lengths)])
    separate = logits_separate(demo, batch)
    for implementation in (packed_attention.PACKED_ATTENTION, "sdpa"):
        demo.set_attn_implementation(implementation)
        assert zoo.relative(logits_packed(demo, batch), separate) < 1e-5, implementation


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None) -> Tensor:
    """Compute attention by definition, head by head: query [H, T, D], key [K, T, D], value [K, T, E] to [T, H, E]."""
    queries_per_key = query.shape[0] // key.shape[0]
    distance = torch.arange(query.shape[1])[:, None] - torch.arange(query.shape[1])[None]
    is_visible = (distance >= 0) & (distance < (window or 1 << 30))
    heads = []
    for head in range(query.shape[0]):
        scores = query[head] @ key[head // queries_per_key].T * scale
        heads.append(
            torch.softmax(scores.masked_fill(~is_visible, -torch.inf), dim=-1) @ value[head // queries_per_key]
        )
    return torch.stack(heads, dim=1)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=LENGTHS,
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (4, 1)]),
    dims=st.sampled_from([(8, 8), (8, 4), (4, 12)]),
    window=st.sampled_from([None, 1, 2, 8, 350]),
    scale=st.sampled_from([None, 0.3]),
)
def test_packed_attention_is_softmax_attention_of_each_row(
    lengths: list[int], heads: tuple[int, int], dims: tuple[int, int], window: int | None, scale: float | None
):
    generator = torch.Generator().manual_seed(sum(lengths))
    total = sum(lengths)

    def draw(count: int, width: int) -> Tensor:
        return torch.randn(1, count, total, width, generator=generator, dtype=torch.float64).requires_grad_()

    inputs = draw(heads[0], dims[0]), draw(heads[1], dims[0]), draw(heads[1], dims[1])
    plan = packed_attention.plan_rows(lengths)
    output, _ = packed_attention_forward(
        torch.nn.Module(), *inputs, None, row_plan=plan, scaling=scale, sliding_window=window
    )
    expected = torch.cat(
        [
            softmax_attention(*(x[0] for x in row), scale=scale or dims[0] ** -0.5, window=window)
            for row in zip(*(x.split(lengths, dim=2) for x in inputs), strict=True)
        ]
    )[None]
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    assert torch.allclose(output, expected, rtol=1e-11, atol=1e-11)
    for gradient, reference in zip(
        torch.autograd.grad((output * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(gradient, reference, rtol=1e-10, atol=1e-10)


@given(LENGTHS)
def test_a_row_plan_has_every_position_once_and_little_padding(lengths: list[int]):
    plan = packed_attention.plan_rows(lengths)
    parts = [group.gather[group.real] for group in plan.groups]
    parts += [torch.arange(row.start, row.stop) for row in plan.long]
    positions = torch.cat(parts)
    assert torch.equal(positions[plan.order], torch.arange(sum(lengths)))
    assert sorted(row.stop - row.start for row in plan.long) == sorted(n for n in lengths if n > LONG_ROW)
    for group in plan.groups:
        rows = np.split(group.gather.numpy(), group.rows)
        shortest = min(len(set(row.tolist())) for row in rows)
        assert shortest >= min(
            packed_attention.MIN_LENGTH_RATIO * group.length, group.length - packed_attention.MAX_PADDING
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"chunk_size": 16}, "chunk_size"),  # like every unknown keyword argument
        ({"is_causal": False}, "later tokens"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"dropout": 0.1}, "attention dropout"),
        ({"row_plan": None}, "keyword arguments"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, "custom attention mask"),
    ],
)
def test_options_that_packed_attention_does_not_support_raise(options: dict[str, object], message: str):
    x = torch.zeros(1, 4, 3, 8)
    options = {"attention_mask": None, "row_plan": packed_attention.plan_rows([3]), **options}
    with pytest.raises(NotImplementedError, match=message):
        packed_attention_forward(torch.nn.Module(), x, x, x, **options)
