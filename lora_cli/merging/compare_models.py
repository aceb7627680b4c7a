"""Compare the logits of two models on the same probe rows: KL divergence, top-1 agreement, the effect of an adapter."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lora_cli.data.collate import Batch
from lora_cli.model.loss import model_inputs, unit_logits
from lora_cli.recipe.tasks import TaskName

LONGEST_PROBE = 40  # tokens of a random row at most
CHUNK_POSITIONS = 4  # whose fp64 log-probabilities exist at the same time


class Agreement(NamedTuple):
    """How closely a model agrees with a reference model, over all positions of the probes."""

    positions: int
    max_difference: float  # largest difference of a logit, relative to the largest logit of the reference
    kl: float  # nats per position, KL(reference || model); 0 for models with a single output
    top1: float  # share of positions with the same most likely output
    retained: float | None  # share of the adapter's effect on the logits; None if the base's logits are unknown


def random_probes(
    task: TaskName,
    *,
    tokens: int,
    vocabulary: int,
    pad_id: int,
    start_id: int | None,
    end_id: int | None,
    include: Sequence[int] = (),
) -> Batch:
    """Return three rows of random tokens, of different lengths, padded: int64 [3, length].

    Args:
        task: of the model.
        tokens: of all rows at most, padding included.
        vocabulary: number of token ids to draw from.
        pad_id: padding token, which replaces `end_id` inside a row.
        start_id: first token of the decoder of a seq2seq model; 0 if None.
        end_id: last token of each row, for models that need one; None for no such token.
        include: tokens whose embeddings were trained; the longest row, which is the last one, starts with them.
    """
    generator = torch.Generator().manual_seed(0)
    longest = min(LONGEST_PROBE, tokens // 3)
    lengths = (longest // 2, longest * 3 // 4, longest)
    ids = torch.randint(0, vocabulary, (3, longest), generator=generator)
    ids[-1, : len(include[: longest - 1])] = torch.tensor(list(include[: longest - 1]), dtype=torch.int64)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    if end_id is not None:
        ids[ids == end_id] = pad_id if pad_id != end_id else (end_id + 1) % vocabulary
        ids[torch.arange(3), torch.tensor(lengths) - 1] = end_id
    ids[~mask] = pad_id
    outputs, extra = mask, {}
    if task == "seq2seq-lm":
        decoder_ids = torch.randint(0, vocabulary, (3, 8), generator=generator)
        decoder_ids[:, 0] = start_id if start_id is not None else 0
        outputs, extra = torch.ones(3, 8), {"decoder_input_ids": decoder_ids}
    positions = outputs.flatten().nonzero()[:, 0]
    return Batch(
        input_ids=ids,
        position_ids=torch.arange(longest).expand(3, -1),
        attention_mask=mask,
        lengths=lengths,
        label_positions=positions,
        targets=positions,
        rows=(0, 1, 2),
        extra=extra,
    )


@torch.no_grad()
def probe_logits(model: PeftModel | PreTrainedModel, batch: Batch, task: TaskName) -> Tensor:
    """Return the logits at the positions of `batch` with a label, [positions, outputs] fp32."""
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return unit_logits(base, model_inputs(base, batch, task=task), batch, task=task).float()


def compare_logits(actual: Tensor, expected: Tensor, base: Tensor | None) -> Agreement:
    """Compare logits of a model with those of a reference, all [positions, outputs] fp32.

    The adapter's effect is `expected - base`; its retained share is
    ⟨actual - base, expected - base⟩/⟨expected - base, expected - base⟩.

    Args:
        actual: of the model.
        expected: of the reference: base and adapter.
        base: of the base model alone; None if unknown.
    """
    kl, same, dot, norm_squared = 0.0, 0.0, 0.0, 0.0
    for start in range(0, len(expected), CHUNK_POSITIONS):
        rows = slice(start, start + CHUNK_POSITIONS)
        log_p, log_q = (logits[rows].double().log_softmax(dim=1) for logits in (expected, actual))
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        same += float((log_p.argmax(dim=1) == log_q.argmax(dim=1)).sum())
        if base is not None:
            effect, change = (logits[rows].double() - base[rows] for logits in (expected, actual))
            norm_squared += float(effect.square().sum())
            dot += float((change * effect).sum())
    retained = None if base is None else dot / norm_squared if norm_squared else 1.0
    count = len(expected)
    return Agreement(count, max_difference(actual, expected), max(kl / count, 0.0), same / count, retained)


def max_difference(actual: Tensor, expected: Tensor) -> float:
    """Return max|actual - expected| / max|expected| of two tensors of the same shape; infinite if it is NaN."""
    difference = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    return difference if difference == difference else float("inf")
