"""Falcon's attention through transformers' attention interface, which its own code does not use.

Falcon computes attention with torch's function for dense masks. That function has no fast kernel for Falcon 7B's single
key head, and the mask is made without the rows of a packed batch. Through the interface, Falcon gets the attention that
every other model has, ours for packed rows included. Falcon with ALiBi keeps its own.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

# Keyword arguments of the model's forward that Falcon does not hand down to its layers.
ROW_KEYWORDS = ("row_plan", "row_bounds", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class FalconInterfaceAttention(FalconAttention):  # type: ignore[misc]
    """FalconAttention, with the attention function that `_attn_implementation` of the config names."""

    rows: Mapping[str, Any]  # ROW_KEYWORDS of this forward pass, set by the model
    num_key_value_groups: int  # query heads that share a key head; the attention functions read it

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output [rows, tokens, hidden], and None for the attention weights unless `eager` computes them."""
        name = self.config._attn_implementation
        if name == "eager" or output_attentions:
            own: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states,
                alibi,
                attention_mask,
                position_ids=position_ids,
                layer_past=layer_past,
                use_cache=use_cache,
                output_attentions=output_attentions,
                position_embeddings=position_embeddings,
            )
            return own
        assert position_embeddings is not None, "without ALiBi, Falcon has rotary embeddings"
        query, key, value = self._heads(self.query_key_value(hidden_states))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        output, _ = ALL_ATTENTION_FUNCTIONS[name](
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.inv_norm_factor, **self.rows
        )
        return self.dense(output.flatten(2)), None

    def _heads(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split `fused` [rows, tokens, ...] into query [rows, H, tokens, D], and key and value [rows, K, tokens, D]."""
        if not self.new_decoder_architecture:
            query, key, value = self._split_heads(fused)
        else:  # the heads of each group, then its key and its value; Falcon's own code repeats these for each head
            groups = fused.unflatten(2, (-1, self.num_key_value_groups + 2, self.head_dim))
            query, key, value = groups[:, :, :, :-2].flatten(2, 3), groups[:, :, :, -2], groups[:, :, :, -1]
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def use_attention_interface(model: PreTrainedModel) -> None:
    """Have the attention layers of a Falcon without ALiBi use transformers' interface, in place; others stay."""
    layers = [module for module in model.modules() if type(module) is FalconAttention]
    if not layers or model.config.alibi:
        return
    for layer in layers:
        layer.__class__ = FalconInterfaceAttention
        layer.num_key_value_groups = layer.num_heads // layer.num_kv_heads
        layer.rows = {}

    passed: dict[str, Any] = {}  # what the model was called with, and does not pass on to its decoder

    def remember(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        passed.update(_row_keywords(kwargs))

    def hand_down(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        rows = {**passed, **_row_keywords(kwargs)}
        passed.clear()
        for layer in layers:
            layer.rows = rows  # until the next forward pass: layers may be recomputed in the backward pass

    if model.base_model is not model:
        model.register_forward_pre_hook(remember, with_kwargs=True)
    model.base_model.register_forward_pre_hook(hand_down, with_kwargs=True)
    # transformers' own method looks into the file of the model's code.
    model._can_set_attn_implementation = lambda: True


def _row_keywords(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in ROW_KEYWORDS if name in kwargs}
