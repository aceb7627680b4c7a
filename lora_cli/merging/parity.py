"""Compare two models by what they say to the same probes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_cli.data.batches import Batch
from lora_cli.model.score import Scorer
from lora_cli.recipe.tasks import TaskName

LENGTHS = (5, 17, 40)  # tokens of each probe


def probes(
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
    for length in LENGTHS:
        ids = torch.randint(0, vocabulary, (1, length), generator=generator)
        if length == LENGTHS[-1]:
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
                predict=places,
                targets=places,
                rows=(0,),
                extra=extra,
            )
        )
    return batches


@torch.no_grad()
def logits(model: Any, batches: list[Batch], task: TaskName) -> Tensor:
    """All logits of the probes in fp64, end to end."""
    training = model.training
    model.eval()
    scorer = Scorer(model, task=task)
    found = torch.cat([scorer.logits(batch).double().flatten() for batch in batches])
    model.train(training)
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest logit; infinite where one is not finite."""
    apart = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    return apart if apart == apart else float("inf")
