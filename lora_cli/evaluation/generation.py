"""Text generation from the prompts of encoded rows: batched, padded, with sampling or beam search, cut at EOS."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.data.encoded_rows import Row
from lora_cli.data.label_mask import IGNORE_INDEX
from lora_cli.errors import LoraError
from lora_cli.evaluation.likelihood import Stopping, never
from lora_cli.model.device import to_device
from lora_cli.model.multimodal import placeholder_tokens
from lora_cli.model.sharding import is_sharded
from lora_cli.recipe.schema import GenerationSpec
from lora_cli.recipe.tasks import TaskName

PROMPTS_PER_BATCH = 16


class Answer(NamedTuple):
    """One generated answer."""

    text: str
    finished: bool  # the model ended it with a stop token, before the limit


class StopOnSignal(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """End generation after the current token once `stopping` returns True."""

    def __init__(self, stopping: Stopping) -> None:
        self._stopping = stopping

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        """Return for each sequence of `input_ids` [batch, seq] whether it ends: bool [batch]."""
        return torch.full((len(input_ids),), self._stopping(), dtype=torch.bool, device=input_ids.device)


def prompt_ids(row: Row, task: TaskName = "causal-lm") -> list[int]:
    """Return the prompt: the token ids before the row's first supervised token, or all input ids of a seq2seq row."""
    if task == "seq2seq-lm":
        return list(map(int, row.input_ids))
    supervised = (row.labels != IGNORE_INDEX).nonzero()[0]
    return list(map(int, row.input_ids[: supervised[0]]))


def reference_ids(row: Row, task: TaskName = "causal-lm") -> list[int]:
    """Return the expected answer: the token ids of the row's first supervised span, or the labels of a seq2seq row."""
    if task == "seq2seq-lm":
        return list(map(int, row.labels))
    supervised = (row.labels != IGNORE_INDEX).nonzero()[0]
    length = 1
    while length < len(supervised) and supervised[length] == supervised[0] + length:
        length += 1
    return list(map(int, row.input_ids[supervised[0] : supervised[0] + length]))


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, references: Sequence[Sequence[int]]
) -> list[int]:
    """Return the token ids that end an answer: EOS of tokenizer and model, and the last special token of `references`.

    Only special tokens count, because the last token of a truncated reference can be any token.
    """
    model_eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    eos_ids = [tokenizer.eos_token_id, *(model_eos if isinstance(model_eos, list) else [model_eos])]
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    return sorted({id_ for id_ in eos_ids if id_ is not None} | {ids[-1] for ids in references if ids[-1] in special})


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
    stopping: Stopping = never,
) -> list[Answer]:
    """Generate an answer to each prompt, with greedy decoding, beam search or sampling.

    Prompts of similar length share a batch. They are padded on the right for an encoder, on the left for a decoder.

    Args:
        model: with an attention implementation that supports padding masks.
        tokenizer: decodes the answers.
        prompts: token ids of each prompt.
        spec: temperature, beams and penalties.
        max_new_tokens: limit of each answer.
        stop: token ids that end an answer; if empty, each answer has `max_new_tokens` tokens.
        seed: of the sampling.
        stopping: returns whether a signal has asked to stop.

    Returns:
        The answers, in the order of `prompts`; none if a signal has stopped them.

    Raises:
        LoraError: the model has no embedding for a token of a prompt.
    """
    torch.manual_seed(seed)
    answers: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), PROMPTS_PER_BATCH):
        indices = order[start : start + PROMPTS_PER_BATCH]
        batch = _generate_batch(
            model,
            tokenizer,
            [prompts[i] for i in indices],
            spec=spec,
            max_new_tokens=max_new_tokens,
            stop=stop,
            stopping=stopping,
        )
        if stopping():
            return []
        answers |= dict(zip(indices, batch, strict=True))
    return [answers[i] for i in range(len(prompts))]


def check_prompt_ids(ids: Sequence[int], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the model has an embedding for each token of a prompt.

    Raises:
        LoraError: it has not: the tokenizer belongs to another model.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if ids and (largest := max(ids)) >= rows:
        raise LoraError(
            f"the prompt has the token {tokenizer.convert_ids_to_tokens(largest)!r} with the id {largest:,}, but the "
            f"model has embeddings for {rows:,}",
            hint="restore the model's tokenizer files from their origin",
        )


def _generate_batch(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    spec: GenerationSpec,
    max_new_tokens: int,
    stop: Sequence[int],
    stopping: Stopping,
) -> list[Answer]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    is_encoder_decoder = bool(base.config.is_encoder_decoder)
    for prompt in prompts:
        check_prompt_ids(prompt, base, tokenizer)
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    pad = stop[0] if stop else 0  # any id is fine, because padding is masked
    missing = [longest - len(prompt) for prompt in prompts]
    paddings = [(0, n) if is_encoder_decoder else (n, 0) for n in missing]  # tokens on the left and on the right
    padded = list(zip(prompts, paddings, strict=True))
    ids = torch.tensor([[pad] * left + list(p) + [pad] * right for p, (left, right) in padded])
    mask = torch.tensor([[0] * left + [1] * len(p) + [0] * right for p, (left, right) in padded])
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
        suppress_tokens=placeholder_tokens(base.config, tokenizer) or None,
        decoder_start_token_id=base.config.decoder_start_token_id if is_encoder_decoder else None,
        use_cache=True,
    )
    # PEFT's own `generate` puts virtual tokens before the prompt.
    is_prompt_learning = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    generator: Any = model if is_prompt_learning else base
    training, own_config = model.training, base.generation_config
    model.eval()
    # `generate` fills unset options from the model's own config, for example a repetition penalty that the recipe
    # does not set. Replacing the model's config prevents that.
    base.generation_config = config
    if is_prompt_learning:
        model.generation_config = config
    try:
        output = generator.generate(
            input_ids=to_device(ids, device),
            attention_mask=to_device(mask, device),
            generation_config=config,
            stopping_criteria=[StopOnSignal(stopping)],
            synced_gpus=is_sharded(base),  # all processes gather its layers as often
        )
    finally:
        base.generation_config = own_config
        if is_prompt_learning:
            del model.generation_config  # a PeftModel without its own config reads the base's
        model.train(training)
    answers = []
    for tokens in output[:, 1 if is_encoder_decoder else longest :].tolist():
        stops = [i for i, token in enumerate(tokens) if token in stop]
        text = tokenizer.decode(tokens[: stops[0]] if stops else tokens, skip_special_tokens=True)
        answers.append(Answer(text.strip(), bool(stops)))
    return answers
