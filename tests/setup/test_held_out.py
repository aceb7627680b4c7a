"""Rows that models are compared on are cut to a few tokens, and keep their labels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.data.dataset import Row
from lora_cli.data.label_mask import IGNORE_INDEX
from lora_cli.setup.held_out import _cut


def row(ids: int, labels: list[float], *, pair_tokens: int = 0) -> Row:
    return Row(np.arange(ids, dtype=np.int32), np.array(labels), "rows.jsonl:1", pair_tokens)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    labeled=st.lists(st.booleans(), min_size=2, max_size=40).filter(any),
    length=st.integers(2, 50),
)
def test_a_causal_lm_row_ends_with_its_last_label(labeled: list[bool], length: int):
    labels = [number if label else IGNORE_INDEX for number, label in enumerate(labeled)]
    cut = _cut(row(len(labels), labels), length, "causal-lm")
    last = max(number for number, label in enumerate(labeled) if label)
    assert cut.input_ids.tolist() == list(range(max(0, last + 1 - length), last + 1))
    assert cut.labels[-1] == last
    assert all(label in (number, IGNORE_INDEX) for number, label in zip(cut.input_ids, cut.labels, strict=True))


@pytest.mark.parametrize(
    ("task", "labels", "kept"),
    [
        ("seq-cls", [2.0], [2.0]),
        ("token-cls", [0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 2.0]),
        ("seq2seq-lm", [7.0, 8.0, 9.0, 10.0], [7.0, 8.0, 9.0]),
    ],
)
def test_other_rows_keep_their_first_tokens(task: str, labels: list[float], kept: list[float]):
    cut = _cut(row(5, labels), 3, task)  # type: ignore[arg-type]
    assert (cut.input_ids.tolist(), cut.labels.tolist()) == ([0, 1, 2], kept)


@pytest.mark.parametrize(("pair_tokens", "kept"), [(4, 2), (2, 0), (1, 0), (0, 0)])
def test_the_second_text_of_a_row_loses_its_last_tokens(pair_tokens: int, kept: int):
    assert _cut(row(5, [1.0], pair_tokens=pair_tokens), 3, "seq-cls").pair_tokens == kept
    assert _cut(row(5, [1.0], pair_tokens=pair_tokens), 9, "seq-cls").pair_tokens == pair_tokens
