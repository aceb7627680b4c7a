"""Batch arithmetic: rows or tokens per batch, accumulation and GPUs, so that a step has the same size. No torch."""

from typing import NamedTuple

from lora_cli.convert.draft import Draft


class Batches(NamedTuple):
    """How the other tool makes batches."""

    micro_key: str
    micro: int  # rows, or packed rows, in one device batch
    accumulation_key: str
    accumulation: int  # device batches per optimizer step
    max_length: int  # tokens of a packed row


def carry_batches(draft: Draft, batches: Batches, *, packing: bool) -> None:
    """Set packing, the device batch and the accumulation.

    A packed row of the other tool has `max_length` tokens, so n packed rows are a batch of n times as many.
    """
    config = draft.config
    if packing:
        tokens = batches.micro * batches.max_length
        if config.get(batches.micro_key) is None:
            draft.assume("training.tokens_per_batch", tokens, f"{batches.micro} packed rows of {batches.max_length}")
        else:
            note = f"{batches.micro} packed row{'s' * (batches.micro > 1)} of {batches.max_length} tokens"
            draft.carry(batches.micro_key, "training.tokens_per_batch", tokens, note)
    elif config.get(batches.micro_key) is None:
        draft.assume("training.batch_size", batches.micro)
    else:
        draft.carry(batches.micro_key, "training.batch_size", batches.micro)
    if config.get(batches.accumulation_key) is None:
        draft.assume("training.gradient_accumulation", batches.accumulation)
    else:
        draft.carry(batches.accumulation_key, "training.gradient_accumulation", batches.accumulation)


def carry_no_packing(draft: Draft, key: str, why: str = "rows per step stay the same; packing: true is faster") -> None:
    """Write that rows are not packed, which is the default here."""
    if draft.config.get(key) is not None:
        draft.carry(key, "data.packing", False)
        draft.comments["data.packing"] = f"{key}: {why}"
    else:
        draft.assume("data.packing", False, why)
