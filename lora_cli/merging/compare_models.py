"""Compare two models: their logits on the same probe batches (KL divergence, top-1 agreement), and their parameters."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_cli.data.collate import Batch
from lora_cli.model.loss import LossFunction
from lora_cli.recipe.tasks import TaskName

PROBE_LENGTHS = (5, 17, 40)  # tokens of each random probe


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
    vocabulary: int,
    pad_id: int,
    start_id: int | None,
    end_id: int | None,
    include: Sequence[int] = (),
) -> list[Batch]:
    """Return rows of random tokens, each in a batch of its own, as int64 [1, length].

    Args:
        task: of the model.
        vocabulary: number of token ids to draw from.
        pad_id: padding token, which replaces `end_id` inside a row.
        start_id: first token of the decoder of a seq2seq model; 0 if None.
        end_id: last token of each row, for models that need one; None for no such token.
        include: tokens whose embeddings were trained; the longest row starts with them.
    """
    generator = torch.Generator().manual_seed(0)
    batches = []
    for length in PROBE_LENGTHS:
        ids = torch.randint(0, vocabulary, (1, length), generator=generator)
        if length == PROBE_LENGTHS[-1]:
            ids[0, : len(include[: length - 1])] = torch.tensor(list(include[: length - 1]))
        if end_id is not None:
            ids[ids == end_id] = pad_id if pad_id != end_id else (end_id + 1) % vocabulary
            ids[0, -1] = end_id
        extra = {}
        positions = torch.arange(length)
        if task == "seq2seq-lm":
            decoder_ids = torch.randint(0, vocabulary, (1, 8), generator=generator)
            decoder_ids[0, 0] = start_id if start_id is not None else 0
            extra = {"decoder_input_ids": decoder_ids}
            positions = torch.arange(8)
        batches.append(
            Batch(
                input_ids=ids,
                position_ids=torch.arange(length)[None],
                attention_mask=torch.ones_like(ids, dtype=torch.bool),
                lengths=(length,),
                label_positions=positions,
                targets=positions,
                rows=(0,),
                extra=extra,
            )
        )
    return batches


@torch.no_grad()
def probe_logits(model: Any, batches: Sequence[Batch], task: TaskName) -> Tensor:
    """Run `model` in eval mode and return the logits of all batches, [positions, outputs] fp32."""
    training = model.training
    model.eval()
    loss_fn = LossFunction(model, task=task)
    logits = torch.cat([loss_fn.logits(batch).float() for batch in batches])
    model.train(training)
    return logits


def compare_logits(actual: Tensor, expected: Tensor, base: Tensor | None) -> Agreement:
    """Compare logits of a model with those of a reference, all [positions, outputs] fp32.

    The adapter's effect is `expected - base`; its retained share is
    ⟨actual - base, expected - base⟩/⟨expected - base, expected - base⟩.

    Args:
        actual: of the model.
        expected: of the reference: base and adapter.
        base: of the base model alone; None if unknown.
    """
    kl, top1 = 0.0, 1.0
    if expected.shape[1] > 1:
        log_p, log_q = expected.double().log_softmax(dim=1), actual.double().log_softmax(dim=1)
        kl = float((log_p.exp() * (log_p - log_q)).sum(dim=1).mean())
        top1 = float((log_p.argmax(dim=1) == log_q.argmax(dim=1)).double().mean())
    retained = None
    if base is not None:
        effect = (expected - base).double()
        norm_squared = float(effect.square().sum())
        retained = float(((actual - base).double() * effect).sum()) / norm_squared if norm_squared else 1.0
    return Agreement(len(expected), max_difference(actual, expected), max(kl, 0.0), top1, retained)


def max_difference(actual: Tensor, expected: Tensor) -> float:
    """Return max|actual - expected| / max|expected| of two tensors of the same shape; infinite if it is NaN."""
    difference = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    return difference if difference == difference else float("inf")


class Mismatch(NamedTuple):
    """A parameter that differs from the expected one by more than rounding."""

    name: str
    error_ratio: float  # largest difference of an element, divided by the difference that rounding allows; above 1


@torch.no_grad()
def mismatches(written: nn.Module, expected: dict[str, Tensor], dtypes: dict[str, torch.dtype]) -> Iterator[Mismatch]:
    """Yield the parameters of `written` that differ from `expected` by more than one rounding to their dtype.

    The tolerance is half a unit in the last place, plus 1e-5 of the largest weight for the order of summation.

    Args:
        written: the merged model, loaded back in fp32.
        expected: every parameter as PEFT merges it, fp32, by name.
        dtypes: dtype that each parameter is stored in, by name.
    """
    for name, parameter in written.named_parameters():
        value = expected[name]
        rounding = torch.finfo(dtypes.get(name, torch.float32)).eps / 2
        tolerance = value.abs() * (rounding * 1.01) + float(value.abs().max()) * 1e-5 + 1e-30
        error_ratio = float(((parameter - value).abs() / tolerance).max())
        if not error_ratio <= 1:
            yield Mismatch(name, error_ratio)
