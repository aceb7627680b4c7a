"""Attention for packed rows (packing) on GPUs: torch's variable-length flash attention, from the borders of the rows.

No score across rows is computed, and no mask exists: with `sdpa`, each layer would keep one of tokens x tokens. The
borders are made once a batch, on the device, and every layer uses them without waiting for the device.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_cli.model.device import to_device
from lora_cli.model.packed_attention import unsupported_options

# Value of `_attn_implementation` in the model's config. transformers creates no mask for a name that it does not know.
VARLEN_ATTENTION = "lora_varlen"
MIN_CAPABILITY = (8, 0)  # of a GPU (Ampere): the kernel needs its instructions
DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
HEAD_DIM_MULTIPLE = 8  # the kernel takes no other dimension: others are padded with zeros, which change no score


class RowBounds(NamedTuple):
    """The borders of one packed batch's rows, made once per batch and used by every layer."""

    starts: Tensor  # int32 [rows + 1], on the device: the position of each row's first token, and the total
    longest: int  # tokens of the longest row


def is_flash(attention: str) -> bool:
    """Return whether the attention of this name is a build of flash attention, of a package or a kernel of the hub."""
    return "flash" in attention


def runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel runs on `device` with queries of `dtype`."""
    return device.type == "cuda" and dtype in DTYPES and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def row_bounds(lengths: Sequence[int], device: torch.device) -> RowBounds:
    """Return the borders of rows of `lengths` tokens, in pack order; the copy to a GPU does not wait for it."""
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return RowBounds(to_device(starts, device), max(lengths))


def _widened(x: Tensor, width: int) -> Tensor:
    """Return x [T, H, D] with heads of `width` dimensions; x itself if it has them, as padding by nothing copies."""
    return x if x.shape[-1] == width else functional.pad(x, (0, width - x.shape[-1]))


def varlen_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row_bounds: RowBounds | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention inside each row of a pack; a function for transformers' attention interface.

    Args:
        module: the attention layer, unused.
        query: [1, H, T, D], float16 or bfloat16.
        key: [1, K, T, D], where K divides H.
        value: [1, K, T, E].
        attention_mask: must be None: `row_bounds` replaces it.
        row_bounds: borders of the rows, passed to the model's forward as a keyword argument.
        scaling: factor of QKᵀ; 1/sqrt(D) if None.
        sliding_window: largest number of keys that a query attends to, itself included; None for all.
        kwargs: must change nothing, see `unsupported_options`.

    Returns:
        The output [1, T, H, E] in the dtype of the query, and None for the attention weights.

    Raises:
        NotImplementedError: the model requests an option that changes the result and is not implemented here, or has
            heads that the kernel does not take.
    """
    unsupported = unsupported_options(kwargs, attention_mask=attention_mask, has_rows=row_bounds is not None)
    width, value_width = query.shape[-1], value.shape[-1]
    padded = -(-max(width, value_width) // HEAD_DIM_MULTIPLE) * HEAD_DIM_MULTIPLE
    if padded > MAX_HEAD_DIM:
        unsupported.append(f"heads of {padded} dimensions")
    if query.dtype not in DTYPES:
        unsupported.append(f"attention in {str(query.dtype).removeprefix('torch.')}")
    if unsupported or row_bounds is None:
        raise NotImplementedError(f"not supported: {', '.join(unsupported)}")
    q, k, v = (_widened(x[0].transpose(0, 1), padded) for x in (query, key, value))
    out = varlen_attn(
        q,
        k,
        v,
        row_bounds.starts,
        row_bounds.starts,
        row_bounds.longest,
        row_bounds.longest,
        scale=width**-0.5 if scaling is None else scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)  # without the auxiliary results
    return out[None, ..., :value_width], None


ALL_ATTENTION_FUNCTIONS.register(VARLEN_ATTENTION, varlen_attention_forward)
