"""Compare two models by what they say to the same probes."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_cli.data.collate import Batch
from lora_cli.model.loss import LossFunction
from lora_cli.recipe.tasks import TaskName

PROBE_LENGTHS = (5, 17, 40)  # tokens of each random probe


class Agreement(NamedTuple):
    """How near one model is to another, over all positions of the probes."""

    positions: int
    apart: float  # largest difference of a logit, relative to the largest logit
    kl: float  # nats a position, of the model's distribution from the other's; 0 of models without one
    top1: float  # share of positions with the same most likely output
    retained: float | None  # share of the adapter's effect on the logits that is there; None where the base is unknown


def random_probes(
    task: TaskName,
    *,
    vocabulary: int,
    pad_id: int,
    start_id: int | None,
    end_id: int | None,
    include: Sequence[int] = (),
) -> list[Batch]:
    """A few rows of random tokens, each a batch of its own; with an end token behind, which some models need.

    The tokens to `include`, whose embeddings were trained, begin the longest row.
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
        places = torch.arange(length)
        if task == "seq2seq-lm":
            read = torch.randint(0, vocabulary, (1, 8), generator=generator)
            read[0, 0] = start_id if start_id is not None else 0
            extra = {"decoder_input_ids": read}
            places = torch.arange(8)
        batches.append(
            Batch(
                input_ids=ids,
                position_ids=torch.arange(length)[None],
                attention_mask=torch.ones_like(ids, dtype=torch.bool),
                lengths=(length,),
                label_positions=places,
                targets=places,
                rows=(0,),
                extra=extra,
            )
        )
    return batches


@torch.no_grad()
def probe_logits(model: Any, batches: Sequence[Batch], task: TaskName) -> Tensor:
    """Logits of all probes, [positions, outputs] in fp32."""
    training = model.training
    model.eval()
    loss_fn = LossFunction(model, task=task)
    found = torch.cat([loss_fn.logits(batch).float() for batch in batches])
    model.train(training)
    return found


def compare_logits(found: Tensor, expected: Tensor, base: Tensor | None) -> Agreement:
    """How near `found` is to `expected`; the adapter's effect is what `expected` has over `base`.

    Retained is ⟨found - base, expected - base⟩/⟨expected - base, expected - base⟩.
    """
    kl, top1 = 0.0, 1.0
    if expected.shape[1] > 1:
        wanted, got = expected.double().log_softmax(dim=1), found.double().log_softmax(dim=1)
        kl = float((wanted.exp() * (wanted - got)).sum(dim=1).mean())
        top1 = float((wanted.argmax(dim=1) == got.argmax(dim=1)).double().mean())
    retained = None
    if base is not None:
        effect = (expected - base).double()
        size = float(effect.square().sum())
        retained = float(((found - base).double() * effect).sum()) / size if size else 1.0
    return Agreement(len(expected), max_difference(found, expected), max(kl, 0.0), top1, retained)


def max_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest logit; infinite where one is not finite."""
    apart = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    return apart if apart == apart else float("inf")


class Mismatch(NamedTuple):
    """A parameter that is not what it should be."""

    name: str
    apart: float  # largest difference, in units of the rounding that is allowed


@torch.no_grad()
def mismatches(written: nn.Module, expected: dict[str, Tensor], dtypes: dict[str, torch.dtype]) -> Iterator[Mismatch]:
    """Parameters of a model loaded back that are not those `expected`, both fp32, rounded once to their `dtypes`.

    Half a unit in the last place is allowed, and 1e-5 of the largest weight for the order of sums.
    """
    for name, parameter in written.named_parameters():
        wanted = expected[name]
        rounding = torch.finfo(dtypes.get(name, torch.float32)).eps / 2
        allowed = wanted.abs() * (rounding * 1.01) + float(wanted.abs().max()) * 1e-5 + 1e-30
        worst = float(((parameter - wanted).abs() / allowed).max())
        if not worst <= 1:
            yield Mismatch(name, worst)
