"""Bytes that a forward pass in training saves for its backward pass: how they grow with tokens and with each form.

They are measured without weights, see `measure_activations.py`; Korthikanti et al. (arXiv:2205.05198, section 4.1)
count them by hand.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from lora_cli.model.packed_attention import LONG_ROW
from lora_cli.recipe.tasks import TaskName


class TrainingSetup(NamedTuple):
    """What decides, besides the model, how much is saved."""

    dtype: torch.dtype  # of activations
    packed: bool  # rows are packed, not padded
    on_cpu: bool
    row: int  # of `row_tokens`
    # Layers with LoRA run as one step, but not over weights that PEFT multiplies, or in another dtype than the model's:
    # the dtype of their factors then, else None.
    unfused: torch.dtype | None = None
    attention: str = "auto"  # `model.attention` of the recipe, or the implementation that a loaded model has
    task: TaskName = "causal-lm"
    target: int = 0  # tokens of the longest target of an encoder-decoder; 0: as many as the row has


def row_tokens(lengths: Iterable[int], *, packed: bool) -> int:
    """Return the tokens of a row that stands for rows of `lengths` tokens: the one that takes the most for each token.

    Packed rows longer than LONG_ROW take less than shorter ones, whose scores `packed_attention.py` keeps.
    """
    counts = [int(length) for length in lengths]
    if not packed:
        return max(counts, default=1)
    return max((count for count in counts if count <= LONG_ROW), default=LONG_ROW + 1)


class Growth(NamedTuple):
    """Bytes that grow with the tokens of a batch."""

    fixed: float = 0
    linear: float = 0  # for each token
    square: float = 0  # for each pair of tokens: scores or masks of attention over a whole pack

    def at(self, tokens: int) -> int:
        """Return the bytes for a batch of `tokens`."""
        return max(0, round(self.fixed + tokens * (self.linear + tokens * self.square)))


def growth_through(points: Sequence[tuple[int, float]]) -> Growth:
    """Return the growth with these bytes at these numbers of tokens, three of each."""
    (x, first), (y, second), (z, third) = points
    slope = (second - first) / (y - x)
    square = ((third - second) / (z - y) - slope) / (z - x)
    linear = slope - square * (x + y)
    return Growth(first - x * (linear + x * square), linear, square)


class ActivationBytes(NamedTuple):
    """Bytes of saved tensors."""

    layers: tuple[Growth, ...]  # of each decoder layer
    layer_input: int  # for each token, of the input of a layer: all that a recomputed layer saves
    outside: Growth  # of the parts around the layers
    temporary: tuple[Growth, ...]  # of tensors that exist only while one layer runs backward: the largest of these
    chunked: bool = True  # whether logits exist in chunks, see `head_loss.py`; else they are in `outside`
    dense: int = 0  # of experts, while one layer runs backward: see `dense_expert_bytes`
    unmeasured: str = ""  # why the model was not run, so that the bytes are rough; empty if it was

    def saved(self, tokens: int, *, every: int | None = None, offload: bool = False) -> int:
        """Return the bytes on the device at the peak of a batch of `tokens`.

        That is the begin of the backward pass, or the moment when a layer is computed again: what later layers have
        saved is freed by then.

        Args:
            tokens: of the batch, padding included.
            every: of how many layers one is recomputed; None: none is. transformers recomputes the first of each group.
            offload: the inputs of recomputed layers wait in host memory, all but two that are on their way.
        """
        own = self.layer_input * tokens
        held = self.outside.at(tokens) + (min(2, len(self.layers)) * own if offload else 0)
        peak = 0
        for number, growth in enumerate(self.layers):
            recomputed, layer = every is not None and number % every == 0, growth.at(tokens)
            peak = max(peak, held + own + layer) if recomputed else peak
            held += layer if not recomputed else 0 if offload else own
        return max(peak, held)

    def temporary_at(self, tokens: int) -> int:
        """Return the bytes that exist only while one layer runs backward, in a batch of `tokens`."""
        return self.dense + max((growth.at(tokens) for growth in self.temporary), default=0)

    def offloaded(self, *, every: int) -> int:
        """Return the bytes per token of the inputs that wait in host memory."""
        return self.layer_input * len(self.layers[::every])
