"""Attention over packed rows on the CPU: each row sees itself only, and no score is computed across rows.

Rows of a packed batch lie end to end along the sequence. Rows of similar length are gathered into small padded
groups and multiplied as one batch of matrices; long rows go one by one through torch's flash kernel. On GPUs,
flash-attention does the same from the row boundaries, so this file is for the CPU alone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PACKED_ATTENTION = (
    "lora_rows"  # what the model's config calls it; transformers builds no mask for a name it does not know
)

# Above this length torch's flash kernel beats whole score matrices on the CPU (measured on 2 cores: 256 to 400).
LONG_ROW = 320
# A group's shortest row has this share of its longest, or lacks this many tokens: bounds the work lost to padding
# without splitting short rows into many tiny products.
MIN_LENGTH_RATIO = 0.75
MAX_PADDING = 48
# Keywords that models hand down to attention and that change no result here. All others are refused, because one that
# is not understood (a chunk size, a cap, a sink) is one that is left out.
IGNORED_KEYWORDS = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
}


class RowGroup(NamedTuple):
    """Rows of similar length, padded to the longest for one batched product."""

    gather: Tensor  # int64 [rows * length]: position in the pack of each padded slot (padding repeats slot 0)
    real: Tensor  # int64 [tokens]: padded slots that hold a token
    rows: int
    length: int  # tokens, of the longest row


class RowPlan(NamedTuple):
    """Where the rows of one packed batch lie, computed once per batch and used by every layer."""

    lengths: tuple[int, ...]  # tokens per row, in pack order
    groups: tuple[RowGroup, ...]
    long: tuple[slice, ...]
    order: Tensor  # int64 [T]: for each position of the pack, where the joined results of groups and long hold it


def plan_rows(lengths: Sequence[int]) -> RowPlan:
    """Group the rows of a pack by similar length; `lengths` are in tokens, in pack order."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    long = tuple(slice(start, start + n) for start, n in zip(starts[:-1], lengths, strict=True) if n > LONG_ROW)
    short = sorted((i for i, n in enumerate(lengths) if n <= LONG_ROW), key=lambda i: -lengths[i])
    groups = []
    while short:
        longest = lengths[short[0]]
        least = min(MIN_LENGTH_RATIO * longest, longest - MAX_PADDING)
        size = next((k for k, i in enumerate(short) if lengths[i] < least), len(short))
        groups.append(_group([(starts[i], lengths[i]) for i in short[:size]], longest))
        short = short[size:]
    places = [group.gather[group.real] for group in groups]
    places += [torch.arange(row.start, row.stop) for row in long]
    return RowPlan(tuple(lengths), tuple(groups), long, torch.argsort(torch.cat(places)))


def _group(rows: list[tuple[int, int]], length: int) -> RowGroup:
    slots = torch.arange(length)
    start = torch.tensor([s for s, _ in rows])[:, None]
    size = torch.tensor([n for _, n in rows])[:, None]
    is_real = (slots < size).flatten()
    gather = torch.where(slots < size, start + slots, start).flatten()
    return RowGroup(gather, is_real.nonzero().flatten(), len(rows), length)


class _ShortRows(torch.autograd.Function):
    """softmax(scale·QKᵀ + causal)V over one padded group; saves the probabilities, not the scores.

    Keys that pad a row lie behind every real query, so the causal mask hides them exactly, and padded queries
    are dropped from the output: no gradient reaches another row.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor) -> Tensor:
        """Query [N·K, G·L, D], key and value [N·K, L, D], mask [1, G·L, L] of 0 and -inf; returns [N·K, G·L, D]."""
        scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scale)
        weights = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale = scale
        return torch.bmm(weights, value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, weights = ctx.saved_tensors
        grad_value = torch.bmm(weights.transpose(1, 2), grad)
        grad_weights = torch.bmm(grad, value.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_query = torch.bmm(grad_scores, key).mul_(ctx.scale)
        grad_key = torch.bmm(grad_scores.transpose(1, 2), query).mul_(ctx.scale)
        return grad_query, grad_key, grad_value, None, None


def _group_attention(
    query: Tensor, key: Tensor, value: Tensor, *, group: RowGroup, scale: float, window: int | None
) -> Tensor:
    """Attention of one group; query [T, H, D], key [T, K, D], value [T, K, E]; returns [tokens, H, E]."""
    heads, kv_heads = query.shape[1], key.shape[1]
    share = heads // kv_heads  # query heads that share one key head
    rows, length = group.rows, group.length

    def padded(x: Tensor) -> Tensor:
        x = x.index_select(0, group.gather).view(rows, length, kv_heads, -1, x.shape[-1])
        return x.permute(0, 2, 3, 1, 4).reshape(rows * kv_heads, -1, x.shape[-1])

    mask = _causal(length, window, query.dtype).repeat(share, 1)[None]
    out: Tensor = _ShortRows.apply(padded(query), padded(key), padded(value), scale, mask)  # type: ignore[no-untyped-call]
    out = out.view(rows, kv_heads, share, length, -1).permute(0, 3, 1, 2, 4)
    return out.reshape(rows * length, heads, -1).index_select(0, group.real)


def _causal(length: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """0 where a query (row) may see a key (column), else -inf; [L, L]."""
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    if window is not None:
        hidden |= torch.ones(length, length, dtype=torch.bool).tril(-window)
    return torch.zeros(length, length, dtype=dtype).masked_fill_(hidden, float("-inf"))


def _long_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None) -> Tensor:
    """Attention of one row through torch's flash kernel; shapes as in `_group_attention`."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    masked = window is not None and query.shape[0] > window
    mask = _causal(query.shape[0], window, query.dtype) if masked else None
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=not masked, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)


def packed_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row_plan: RowPlan | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each row of a pack, as transformers' attention interface calls it.

    Args:
        module: the attention layer, unused.
        query: [1, H, T, D]; key and value [1, K, T, D or E], K dividing H.
        attention_mask: must be None: the plan says all there is to say.
        row_plan: rows of the pack, handed to the model's forward as a keyword argument.
        scaling: factor of QKᵀ; 1/sqrt(D) if None.
        sliding_window: keys a query sees at most, itself included; None for all.
        is_causal: refused if False.
        others: refused unless None or harmless.

    Returns:
        [1, T, H, E] and None in place of the weights.

    Raises:
        NotImplementedError: the model asks for something that changes the result and is not done here.
    """
    unmet = [name for name, value in others.items() if value is not None and name not in IGNORED_KEYWORDS]
    if is_causal is False:
        unmet.append("attention to later tokens")
    if row_plan is None:
        unmet.append("a forward pass that hands keyword arguments on to its attention layers")
    if dropout:
        unmet.append("attention dropout")
    if attention_mask is not None:
        unmet.append("an attention mask of its own")
    if unmet or row_plan is None:
        raise NotImplementedError(", ".join(unmet))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    results = [_group_attention(q, k, v, group=group, scale=scale, window=sliding_window) for group in row_plan.groups]
    results += [_long_attention(q[row], k[row], v[row], scale=scale, window=sliding_window) for row in row_plan.long]
    return torch.cat(results).index_select(0, row_plan.order)[None], None


ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, packed_attention_forward)
