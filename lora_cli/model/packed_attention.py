"""Attention for packed rows (packing) by matrix products: each row attends to itself only.

The rows of a packed batch are concatenated along the sequence. Rows of similar length are gathered into small padded
groups and multiplied as one batch of matrices; each long row goes through torch's own kernels alone. It is made for the
CPU, and used on GPUs where flash attention (`varlen_attention.py`) does not run: older ones, and in float32.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_cli.model.device import to_device

# Value of `_attn_implementation` in the model's config. transformers creates no mask for a name that it does not know.
PACKED_ATTENTION = "lora_rows"

CPU = torch.device("cpu")
# Tokens. For longer rows torch's flash kernel is faster than full score matrices (break-even on 2 cores: 256 to 400).
LONG_ROW = 320
# A group's shortest row has at least this share of its longest row's tokens, or lacks at most this many tokens. This
# bounds the work lost to padding without splitting short rows into many small products.
MIN_LENGTH_RATIO = 0.75
MAX_PADDING = 48
# Keyword arguments that models pass to attention and that do not change the result here. All others raise an error,
# because ignoring an unknown one (a chunk size, a softcap, attention sinks) would give wrong results.
IGNORED_KEYWORDS = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "logits_to_keep",
}


class RowGroup(NamedTuple):
    """Rows of similar length, padded to the longest for one batched product."""

    gather: Tensor  # int64 [rows * length]: position in the pack of each slot; padding repeats the row's first
    real: Tensor  # int64 [tokens]: slots that are tokens, not padding
    rows: int
    length: int  # tokens of the longest row


class RowPlan(NamedTuple):
    """The positions of one packed batch's rows, computed once per batch and used by every layer."""

    lengths: tuple[int, ...]  # tokens per row, in pack order
    groups: tuple[RowGroup, ...]
    long: tuple[slice, ...]  # positions of each row longer than LONG_ROW
    order: Tensor  # int64 [T]: for each position of the pack, its index in the concatenated results of groups and long


def plan_rows(lengths: Sequence[int], device: torch.device = CPU) -> RowPlan:
    """Group the rows of a pack by similar length, with positions on `device`.

    Args:
        lengths: tokens per row, in pack order.
        device: of the attention; the copy to a GPU does not wait for it.
    """
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    long = tuple(slice(start, start + n) for start, n in zip(starts[:-1], lengths, strict=True) if n > LONG_ROW)
    short = sorted((i for i, n in enumerate(lengths) if n <= LONG_ROW), key=lambda i: -lengths[i])
    groups = []
    while short:
        longest = lengths[short[0]]
        min_length = min(MIN_LENGTH_RATIO * longest, longest - MAX_PADDING)
        count = next((k for k, i in enumerate(short) if lengths[i] < min_length), len(short))
        groups.append(_group([(starts[i], lengths[i]) for i in short[:count]], longest))
        short = short[count:]
    positions = [group.gather[group.real] for group in groups]
    positions += [torch.arange(row.start, row.stop) for row in long]
    order = torch.argsort(torch.cat(positions))
    moved = tuple(
        group._replace(gather=to_device(group.gather, device), real=to_device(group.real, device)) for group in groups
    )
    return RowPlan(tuple(lengths), moved, long, to_device(order, device))


def _group(rows: list[tuple[int, int]], length: int) -> RowGroup:
    """Build the group of `rows`, (start, tokens) each, padded to `length` tokens."""
    slots = torch.arange(length)
    start = torch.tensor([s for s, _ in rows])[:, None]
    size = torch.tensor([n for _, n in rows])[:, None]
    is_real = (slots < size).flatten()
    gather = torch.where(slots < size, start + slots, start).flatten()
    return RowGroup(gather, is_real.nonzero().flatten(), len(rows), length)


class _ShortRows(torch.autograd.Function):
    """softmax(scale·QKᵀ + mask)V for one padded group; saves the probabilities, not the scores.

    Padding keys come after every real query of their row, so the causal mask hides them exactly. The outputs of padding
    queries are dropped. So no gradient reaches another row.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor) -> Tensor:
        """Query [N·K, G·L, D], key [N·K, L, D], value [N·K, L, E], mask [1, G·L, L] of 0, -inf; to [N·K, G·L, E]."""
        scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scale)
        weights = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale = scale
        return torch.bmm(weights, value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key and value, in their shapes."""
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
    """Compute attention for one group: query [T, H, D], key [T, K, D], value [T, K, E]; returns [tokens, H, E]."""
    heads, kv_heads = query.shape[1], key.shape[1]
    queries_per_key = heads // kv_heads  # query heads that share one key head
    rows, length = group.rows, group.length

    def padded(x: Tensor) -> Tensor:
        x = x.index_select(0, group.gather).view(rows, length, kv_heads, -1, x.shape[-1])
        return x.permute(0, 2, 3, 1, 4).reshape(rows * kv_heads, -1, x.shape[-1])

    mask = _causal(length, window, query).repeat(queries_per_key, 1)[None]
    out: Tensor = _ShortRows.apply(padded(query), padded(key), padded(value), scale, mask)  # type: ignore[no-untyped-call]
    out = out.view(rows, kv_heads, queries_per_key, length, -1).permute(0, 3, 1, 2, 4)
    return out.reshape(rows * length, heads, -1).index_select(0, group.real)


def _causal(length: int, window: int | None, like: Tensor) -> Tensor:
    """Return [L, L], of dtype and device of `like`: 0 where a query (row) may attend to a key (column), else -inf."""
    visible = torch.ones(length, length, dtype=torch.bool, device=like.device)
    hidden = visible.triu(1)
    if window is not None:
        hidden |= visible.tril(-window)
    return like.new_zeros(length, length).masked_fill_(hidden, float("-inf"))


def _long_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None) -> Tensor:
    """Compute attention for one row with torch's flash kernel; shapes as in `_group_attention`."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    queries_per_key = q.shape[1] // k.shape[1]
    if q.device.type == "cuda" and queries_per_key > 1:
        # Without flash attention, torch has no kernel for grouped queries, and would compute full score matrices.
        k, v = (x.repeat_interleave(queries_per_key, dim=1) for x in (k, v))
    windowed = window is not None and query.shape[0] > window
    mask = _causal(query.shape[0], window, query) if windowed else None
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=not windowed, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)


def unsupported_options(kwargs: Mapping[str, Any], *, attention_mask: Tensor | None, has_rows: bool) -> list[str]:
    """Return the options of a call of an attention function that change its result, and that ours do not have.

    Args:
        kwargs: keyword arguments that the function does not name: None, `dropout` 0, `is_causal` true, and those of
            IGNORED_KEYWORDS change nothing.
        attention_mask: of the call.
        has_rows: whether the rows were passed on to the attention.
    """
    known = {*IGNORED_KEYWORDS, "dropout", "is_causal"}
    unsupported = [name for name, value in kwargs.items() if value is not None and name not in known]
    if kwargs.get("is_causal") is False:
        unsupported.append("attention to later tokens")
    if not has_rows:
        unsupported.append("a forward pass that does not pass keyword arguments to its attention layers")
    if kwargs.get("dropout"):
        unsupported.append("attention dropout")
    if attention_mask is not None:
        unsupported.append("a custom attention mask")
    return unsupported


def packed_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row_plan: RowPlan | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention inside each row of a pack; a function for transformers' attention interface.

    Args:
        module: the attention layer, unused.
        query: [1, H, T, D].
        key: [1, K, T, D], where K divides H.
        value: [1, K, T, E].
        attention_mask: must be None: `row_plan` replaces it.
        row_plan: rows of the pack, passed to the model's forward as a keyword argument.
        scaling: factor of QKᵀ; 1/sqrt(D) if None.
        sliding_window: largest number of keys that a query attends to, itself included; None for all.
        kwargs: must change nothing, see `unsupported_options`.

    Returns:
        The output [1, T, H, E] in the dtype of the query, and None for the attention weights.

    Raises:
        NotImplementedError: the model requests an option that changes the result and is not implemented here.
    """
    unsupported = unsupported_options(kwargs, attention_mask=attention_mask, has_rows=row_plan is not None)
    if unsupported or row_plan is None:
        raise NotImplementedError(f"not supported: {', '.join(unsupported)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    results = [_group_attention(q, k, v, group=group, scale=scale, window=sliding_window) for group in row_plan.groups]
    results += [_long_attention(q[row], k[row], v[row], scale=scale, window=sliding_window) for row in row_plan.long]
    return torch.cat(results).index_select(0, row_plan.order)[None], None


ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, packed_attention_forward)
