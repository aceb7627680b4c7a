"""Attention for rows that are padded on the right: torch's own, with masks that the host makes without the GPU.

For `sdpa`, transformers reads the mask of padding at each batch to see whether it is needed: the host waits for the
GPU. Here a causal mask has no padding, which no token of a row attends to, since it comes after all of them: torch's
kernels compute it without a mask. Any other mask is made if there is one of padding.
"""

from typing import Any

from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PADDED_ATTENTION = "lora_padded"  # value of `_attn_implementation` in the model's config


def padded_mask(
    *,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **options: Any,
) -> Tensor | None:
    """Return the mask of an attention, bool [rows, 1, L, L], or None for none; a function of transformers' interface.

    Args:
        attention_mask: bool [rows, L], True on tokens, which come before the padding.
        allow_is_causal_skip: whether the mask is a causal one, of all or of the nearest tokens before.
        allow_is_bidirectional_skip: whether it is the mask of padding alone.
        options: lengths and pattern of the mask.
    """
    mask: Tensor | None = sdpa_mask(
        attention_mask=None if allow_is_causal_skip else attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip and attention_mask is None,
        **options,
    )
    return mask


ALL_ATTENTION_FUNCTIONS.register(PADDED_ATTENTION, sdpa_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(PADDED_ATTENTION, padded_mask)
