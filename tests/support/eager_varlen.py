"""An eager loop over the rows in place of torch's variable-length attention kernel, which has no CPU form.

The loop checks the arguments as the kernel does: dtypes, shapes, the device of the borders, Python integers.
"""

import pytest
import torch
from torch import Tensor

from lora_cli.model import varlen_attention

STUB_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def eager_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """Compute what torch's `varlen_attn` documents, row by row: query [T, H, D], key and value [T, K, D]."""
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert query.shape[-1] % 8 == 0
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert query.dtype == key.dtype == value.dtype
    assert cu_seq_q is cu_seq_k
    assert (cu_seq_q.dtype, cu_seq_q.device, cu_seq_q.ndim) == (torch.int32, query.device, 1)
    assert type(max_q) is int
    lengths = cu_seq_q.diff().tolist()
    assert max_q == max_k == max(lengths)
    assert sum(lengths) == len(query)
    assert window_size[1] == 0
    assert enable_gqa == (query.shape[1] != key.shape[1])
    rows = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        visible = (distance >= 0) & ((window_size[0] < 0) | (distance <= window_size[0]))
        rows.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v))
    return torch.cat(rows)


def use_eager_varlen(patch: pytest.MonkeyPatch) -> None:
    """Replace torch's kernel by the loop, which takes more dtypes, until `patch` is undone."""
    patch.setattr(varlen_attention, "varlen_attn", eager_varlen)
    patch.setattr(varlen_attention, "DTYPES", STUB_DTYPES)
