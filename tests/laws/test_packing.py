"""Law: rows packed into one batch are rows apart: the same logits, and no gradient from one to another."""

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

# Short rows, rows about the borders of the groups and of the flash kernel, long rows.
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


def logits_apart(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Each row alone through the model's eager attention, as transformers wrote it."""
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
def test_packed_rows_have_the_logits_of_rows_apart(family: str, implementation: str):
    model = zoo.make(family)

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(LENGTHS)
    def law(lengths: list[int]) -> None:
        batch = packed(lengths)
        model.set_attn_implementation(implementation)
        got = logits_packed(model, batch)
        assert zoo.relative(got, logits_apart(model, batch)) < 1e-5

    law()


@pytest.mark.parametrize("implementation", [packed_attention.PACKED_ATTENTION, "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_no_gradient_crosses_from_row_to_row(family: str, implementation: str):
    model = zoo.make(family, attention=implementation)
    lengths = [9, 1, 30, LONG_ROW + 5, 5, 29]
    batch = packed(lengths)
    seen: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(
        lambda layer, args, out: seen.append(out.requires_grad_()) or out  # the first leaf: all that a row sees
    )
    logits = logits_packed(model, batch).split(lengths)
    for number, row in enumerate(logits):
        weights = torch.randn(row.shape, generator=torch.Generator().manual_seed(number))
        (gradient,) = torch.autograd.grad((row * weights).sum(), seen[-1], retain_graph=True)
        reached = [bool(part.abs().max() > 0) for part in gradient[0].split(lengths)]
        assert reached == [other == number for other in range(len(lengths))]


@torch.no_grad()
def test_the_demo_model_keeps_real_rows_apart(demo: PreTrainedModel, demo_folder: Path):
    # Text, not random ids: those drive the model where eager and sdpa differ by 1.4e-5 on a row alone.
    text = "\n".join(module.__doc__ for module in (argparse, json, heapq, csv, bisect))
    ids = AutoTokenizer.from_pretrained(demo_folder)(text, return_tensors="pt")["input_ids"]
    lengths = [24, LONG_ROW + 4, 1, 17]
    batch = packed(lengths)._replace(input_ids=ids[:, : sum(lengths)])
    apart = logits_apart(demo, batch)
    for implementation in (packed_attention.PACKED_ATTENTION, "sdpa"):
        demo.set_attn_implementation(implementation)
        assert zoo.relative(logits_packed(demo, batch), apart) < 1e-5, implementation


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None) -> Tensor:
    """The definition, head by head, for one row: query [H, T, D], key [K, T, D], value [K, T, E]; [T, H, E]."""
    share = query.shape[0] // key.shape[0]
    distance = torch.arange(query.shape[1])[:, None] - torch.arange(query.shape[1])[None]
    seen = (distance >= 0) & (distance < (window or 1 << 30))
    heads = []
    for head in range(query.shape[0]):
        scores = query[head] @ key[head // share].T * scale
        heads.append(torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1) @ value[head // share])
    return torch.stack(heads, dim=1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=LENGTHS,
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (4, 1)]),
    dims=st.sampled_from([(8, 8), (8, 4), (4, 12)]),
    window=st.sampled_from([None, 1, 2, 8, 350]),
    scale=st.sampled_from([None, 0.3]),
)
def test_row_attention_is_softmax_attention_of_each_row(
    lengths: list[int], heads: tuple[int, int], dims: tuple[int, int], window: int | None, scale: float | None
):
    generator = torch.Generator().manual_seed(sum(lengths))
    total = sum(lengths)

    def draw(count: int, width: int) -> Tensor:
        return torch.randn(1, count, total, width, generator=generator, dtype=torch.float64).requires_grad_()

    inputs = draw(heads[0], dims[0]), draw(heads[1], dims[0]), draw(heads[1], dims[1])
    plan = packed_attention.plan_rows(lengths)
    got, _ = packed_attention_forward(
        torch.nn.Module(), *inputs, None, row_plan=plan, scaling=scale, sliding_window=window
    )
    expected = torch.cat(
        [
            softmax_attention(*(x[0] for x in row), scale=scale or dims[0] ** -0.5, window=window)
            for row in zip(*(x.split(lengths, dim=2) for x in inputs), strict=True)
        ]
    )[None]
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    assert torch.allclose(got, expected, rtol=1e-11, atol=1e-11)
    for mine, reference in zip(
        torch.autograd.grad((got * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(mine, reference, rtol=1e-10, atol=1e-10)


@given(LENGTHS)
def test_a_row_plan_holds_every_position_once_and_pads_little(lengths: list[int]):
    plan = packed_attention.plan_rows(lengths)
    held = [group.gather[group.real] for group in plan.groups]
    held += [torch.arange(row.start, row.stop) for row in plan.long]
    joined = torch.cat(held)
    assert torch.equal(joined[plan.order], torch.arange(sum(lengths)))
    assert sorted(row.stop - row.start for row in plan.long) == sorted(n for n in lengths if n > LONG_ROW)
    for group in plan.groups:
        rows = np.split(group.gather.numpy(), group.rows)
        shortest = min(len(set(row.tolist())) for row in rows)
        assert shortest >= min(
            packed_attention.MIN_LENGTH_RATIO * group.length, group.length - packed_attention.MAX_PADDING
        )


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"chunk_size": 16}, "chunk_size"),  # as any keyword that it does not know
        ({"is_causal": False}, "later tokens"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"dropout": 0.1}, "attention dropout"),
        ({"row_plan": None}, "keyword arguments"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, "mask of its own"),
    ],
)
def test_what_row_attention_would_get_wrong_it_refuses(asked: dict[str, object], named: str):
    x = torch.zeros(1, 4, 3, 8)
    options = {"attention_mask": None, "row_plan": packed_attention.plan_rows([3]), **asked}
    with pytest.raises(NotImplementedError, match=named):
        packed_attention_forward(torch.nn.Module(), x, x, x, **options)
