"""What a model answers: greedy generation from the prompts of encoded rows."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.data.rows import IGNORED, Row


class Answer(NamedTuple):
    """One generated answer."""

    text: str
    finished: bool  # it ended by itself, before the limit


def prompt_ids(row: Row) -> list[int]:
    """The ids before the row's first supervised token."""
    supervised = (row.labels != IGNORED).nonzero()[0]
    return list(map(int, row.input_ids[: supervised[0]]))


def reference_ids(row: Row) -> list[int]:
    """The ids of the row's first run of supervised tokens."""
    supervised = (row.labels != IGNORED).nonzero()[0]
    run = 1
    while run < len(supervised) and supervised[run] == supervised[0] + run:
        run += 1
    return list(map(int, row.input_ids[supervised[0] : supervised[0] + run]))


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, references: Sequence[Sequence[int]]
) -> list[int]:
    """The ids that end an answer: the tokenizer's and the model's end tokens, and those that `references` end with.

    A reference that was cut ends with any word, so of its last tokens only special ones count.
    """
    of_model = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = [tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])]
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    return sorted({id_ for id_ in ends if id_ is not None} | {ids[-1] for ids in references if ids[-1] in special})


@torch.no_grad()
def greedy(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[int],
) -> list[Answer]:
    """The most likely continuation of each prompt (token ids), generated as one left-padded batch.

    `stop` are the ids that end an answer; without any, each is as long as allowed. The model's attention must be one
    that transformers makes masks for.
    """
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    pad = stop[0] if stop else 0  # any id will do, as it is masked
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop) or None,
        pad_token_id=pad,
        use_cache=True,
    )
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    training, own = model.training, inner.generation_config
    model.eval()
    # What ours leaves open is taken from the model's own: a repetition penalty, say, which is not greedy.
    inner.generation_config = config
    try:
        output = inner.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    finally:
        inner.generation_config = own
        model.train(training)
    answers = []
    for line in output[:, longest:].tolist():
        ends = [i for i, token in enumerate(line) if token in stop]
        text = tokenizer.decode(line[: ends[0]] if ends else line, skip_special_tokens=True)
        answers.append(Answer(text.strip(), bool(ends)))
    return answers
