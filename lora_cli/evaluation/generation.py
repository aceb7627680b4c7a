"""What a model answers: generation from the prompts of encoded rows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.data.dataset import IGNORE_INDEX, Row
from lora_cli.recipe.schema import GenerationSpec
from lora_cli.recipe.tasks import TaskName

PROMPTS_PER_BATCH = 16  # prompts in a batch


class Answer(NamedTuple):
    """One generated answer."""

    text: str
    finished: bool  # it ended by itself, before the limit


def prompt_ids(row: Row, task: TaskName = "causal-lm") -> list[int]:
    """What the model is given: the ids before the row's first supervised token, or all that an encoder reads."""
    if task == "seq2seq-lm":
        return list(map(int, row.input_ids))
    supervised = (row.labels != IGNORE_INDEX).nonzero()[0]
    return list(map(int, row.input_ids[: supervised[0]]))


def reference_ids(row: Row, task: TaskName = "causal-lm") -> list[int]:
    """What it should answer: the ids of the row's first run of supervised tokens, or its target."""
    if task == "seq2seq-lm":
        return list(map(int, row.labels))
    supervised = (row.labels != IGNORE_INDEX).nonzero()[0]
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
def generate(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    spec: GenerationSpec,
    max_new_tokens: int,
    stop: Sequence[int],
    seed: int = 0,
) -> list[Answer]:
    """What the model makes of each prompt (token ids), those of like length in a batch: greedy, by beams, or drawn.

    An encoder reads prompts that are padded on the right, a decoder goes on from prompts padded on the left. `stop` are
    the ids that end an answer; without any, each is as long as allowed. The model's attention must be one that
    transformers makes masks for.
    """
    torch.manual_seed(seed)
    found: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), PROMPTS_PER_BATCH):
        some = order[start : start + PROMPTS_PER_BATCH]
        batch = _generate_batch(
            model, tokenizer, [prompts[i] for i in some], spec=spec, max_new_tokens=max_new_tokens, stop=stop
        )
        found |= dict(zip(some, batch, strict=True))
    return [found[i] for i in range(len(prompts))]


def _generate_batch(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    spec: GenerationSpec,
    max_new_tokens: int,
    stop: Sequence[int],
) -> list[Answer]:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    encodes = bool(inner.config.is_encoder_decoder)
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    pad = stop[0] if stop else 0  # any id will do, as it is masked
    blanks = [longest - len(prompt) for prompt in prompts]
    sides = [(0, n) if encodes else (n, 0) for n in blanks]
    pairs = list(zip(prompts, sides, strict=True))
    ids = torch.tensor([[pad] * a + list(p) + [pad] * b for p, (a, b) in pairs], device=device)
    mask = torch.tensor([[0] * a + [1] * len(p) + [0] * b for p, (a, b) in pairs], device=device)
    config = GenerationConfig(
        do_sample=spec.temperature > 0,
        temperature=spec.temperature or None,
        top_p=spec.top_p if spec.temperature else None,
        top_k=0 if spec.temperature else None,
        num_beams=spec.num_beams,
        length_penalty=spec.length_penalty,
        no_repeat_ngram_size=spec.no_repeat_ngram,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop) or None,
        pad_token_id=pad,
        decoder_start_token_id=inner.config.decoder_start_token_id if encodes else None,
        use_cache=True,
    )
    # Virtual tokens are put before the prompt by PEFT's own generate.
    prompted = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    asked: Any = model if prompted else inner
    training, own = model.training, inner.generation_config
    model.eval()
    # What ours leaves open is taken from the model's own: a repetition penalty, say, which nobody asked for.
    inner.generation_config = config
    if prompted:
        model.generation_config = config
    try:
        output = asked.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    finally:
        inner.generation_config = own
        model.train(training)
    answers = []
    for line in output[:, 1 if encodes else longest :].tolist():
        ends = [i for i, token in enumerate(line) if token in stop]
        text = tokenizer.decode(line[: ends[0]] if ends else line, skip_special_tokens=True)
        answers.append(Answer(text.strip(), bool(ends)))
    return answers
