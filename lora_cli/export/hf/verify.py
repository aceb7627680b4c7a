"""A folder in transformers, beside the model that it was written from: what both say next, and how they go on."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from lora_cli.export.hf import nf4
from lora_cli.export.reference import CPU, eos_ids
from lora_cli.export.source import Check, ExportSource
from lora_cli.model import fake_quantize

MAX_POSITIONS = 33  # of each text, from its end: the answer's, for the most part
MAX_NEW_TOKENS = 32  # tokens that a prompt is continued by
# The export is held against the source with its weights rounded alike, both computed in fp32: sums in another order are
# all that may tell them apart. What the rounding itself costs is told, and held to nothing: a router turns at a hair,
# and 4 bits may cost a small model more than a nat.
MAX_KL = 1e-5  # nats, on average
TIE_NATS = 1e-3  # nats between two tokens, below which either may be written


class Rounding(NamedTuple):
    """What an export leaves of the source's weights."""

    dtype: torch.dtype | None  # that floating ones are written in; None where all have it already
    packed: bool  # linear ones in 4 bits


class GeneratedText(NamedTuple):
    """How a model goes on, with the token that ends it if one does."""

    tokens: tuple[int, ...]
    leads: tuple[float, ...]  # nats, of each over the next likely one


class ModelOutputs(NamedTuple):
    """What a model says of some prompts."""

    texts: list[GeneratedText]  # none of what does not write
    asked: list[tuple[int, ...]]  # the prompts; of a language model, with its own texts or another's behind them
    logprobs: NDArray[np.float64]  # (positions, classes), in nats; of a regression, the values


def compare_with_source(subject: ExportSource, out: Path, rounding: Rounding) -> Iterator[Check]:
    """The folder `out` against the subject's model."""
    export = subject.at(out)
    prompts = subject.prompts or _random_prompts(subject)
    original = _run(subject, prompts)
    found = _run(export, prompts, asked=original.asked)
    rounded = original
    if rounding.dtype is not None:
        rounded = _run(subject, prompts, asked=original.asked, rounding=rounding)
    check = _distribution(rounded, found, subject)
    beside = "the source in fp32" if rounding.dtype is None else "the source in fp32, its weights rounded alike"
    yield check._replace(found=f"against {beside}: {check.found}")
    if original.texts:
        yield _text(subject, prompts, rounded, found)
    if rounding.dtype is not None:
        cost = _distribution(original, found, subject)
        said = f"what the rounding costs, against the source as it was: {cost.found}"
        same = sum(a.tokens == b.tokens for a, b in zip(original.texts, found.texts, strict=True))
        said += f"; {same} of {len(prompts)} prompts are continued alike" if original.texts else ""
        yield Check("note", True, said, {**cost.figures, "same": same})


def _random_prompts(subject: ExportSource) -> tuple[tuple[int, ...], ...]:
    size = min(len(subject.tokenizer), subject.config.get_text_config().vocab_size)
    return tuple(tuple(np.random.default_rng(seed).integers(3, size, 12).tolist()) for seed in range(4))


@torch.inference_mode()
def _run(
    subject: ExportSource,
    prompts: Sequence[tuple[int, ...]],
    *,
    asked: list[tuple[int, ...]] | None = None,
    rounding: Rounding | None = None,
) -> ModelOutputs:
    """A model's outputs, computed in fp32. It is gone when this returns: one is in memory at a time.

    Args:
        subject: the model.
        prompts: what it goes on from.
        asked: texts that it is asked of; its own where None.
        rounding: what its weights go through first.
    """
    model = subject.base.load(CPU, dtype=torch.float32).model
    if rounding is not None:
        _round(model.eval(), subject, rounding)
    # Of a checkpoint in 4 bits, transformers leaves what is whole in its dtype, and packed layers compute in bfloat16.
    for parameter in model.eval().parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = torch.float32
    texts = [_continue_greedily(model, subject, prompt) for prompt in prompts] if subject.task == "causal-lm" else []
    if asked is None:
        behind = [text.tokens for text in texts] or [()] * len(prompts)
        asked = [(*prompt, *tokens) for prompt, tokens in zip(prompts, behind, strict=True)]
    return ModelOutputs(texts, asked, np.concatenate([_logprobs(model, subject, tokens) for tokens in asked]))


def _round(model: PreTrainedModel, subject: ExportSource, rounding: Rounding) -> None:
    assert rounding.dtype is not None
    packed: dict[str, bool] = {}
    if rounding.packed:
        packed = fake_quantize.quantized_weights(subject.base.skeleton(), nf4.NF4_SPEC)
    for name, held in model.state_dict().items():
        if held.is_floating_point():
            value = held.to(rounding.dtype).float()
            if name in packed:
                # bitsandbytes multiplies by what the codes stand for in the dtype of the input, here fp32.
                value = fake_quantize.quantize_dequantize(nf4.NF4_SPEC, torch.float32, transposed=packed[name])(value)
            held.copy_(value)


def _continue_greedily(model: PreTrainedModel, subject: ExportSource, prompt: Sequence[int]) -> GeneratedText:
    """The most likely token, again and again."""
    ids = torch.tensor([list(prompt)], device=CPU)
    padding = subject.tokenizer.pad_token_id
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=list(eos_ids(subject)) or None,
        pad_token_id=padding if padding is not None else 0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    writer: Any = model
    made = writer.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    likely = [step[0].topk(2).values.tolist() for step in made.logits]
    return GeneratedText(
        tuple(made.sequences[0, len(prompt) :].tolist()), tuple(first - second for first, second in likely)
    )


def _logprobs(model: Any, subject: ExportSource, tokens: Sequence[int]) -> NDArray[np.float64]:
    """Log-probabilities (positions, classes) of what is told apart; of a regression, the values themselves."""
    given = {"input_ids": torch.tensor([list(tokens)], device=CPU)}
    if subject.task == "seq2seq-lm":
        given["decoder_input_ids"] = given["input_ids"]  # any text will do, as long as both are asked the same
    values: Tensor = model(**given).logits[0].double()
    values = values.reshape(-1, values.shape[-1])[-MAX_POSITIONS:]
    kind = subject.labels.kind if subject.labels else "single"
    if kind == "multi":  # each label is there or not
        values = torch.nn.functional.logsigmoid(torch.stack([values, -values], dim=-1).reshape(-1, 2))
    elif kind == "single":
        values = values.log_softmax(dim=-1)
    found: NDArray[np.float64] = values.numpy()
    return found


def _distribution(expected: ModelOutputs, found: ModelOutputs, subject: ExportSource) -> Check:
    ours, theirs = expected.logprobs, found.logprobs
    if subject.labels is not None and subject.labels.kind == "regression":
        # A shift of one logit by d costs about d²/2 nats: values are held to the shift that the bound stands for.
        apart = float(np.abs(ours - theirs).max() / max(np.abs(ours).max(), 1e-30))
        said = f"values within {apart:.1e} of the largest"
        return Check("distribution", apart <= math.sqrt(2 * MAX_KL), said, {"apart": apart})
    kl = float((np.exp(ours) * (ours - theirs)).sum(axis=-1).mean())
    agreed = int((ours.argmax(axis=-1) == theirs.argmax(axis=-1)).sum())
    said = f"KL {max(kl, 0):.1e} nats on average, most likely one equal at {agreed} of {len(ours)} positions"
    return Check("distribution", kl <= MAX_KL, said, {"kl": kl, "agreed": agreed, "positions": len(ours)})


def _text(
    subject: ExportSource, prompts: Sequence[tuple[int, ...]], expected: ModelOutputs, found: ModelOutputs
) -> Check:
    """Whether both go on alike, but for tokens that are as likely as each other."""
    same, ties, wrong = 0, 0, ""
    for number, (ours, theirs) in enumerate(zip(expected.texts, found.texts, strict=True), start=1):
        pairs = zip(ours.tokens, theirs.tokens, strict=False)
        parted = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if parted is None:
            same += 1
        elif ours.leads[parted] <= TIE_NATS:
            ties += 1
        elif not wrong:
            left, right = (subject.tokenizer.decode(text.tokens[: parted + 1][-4:]) for text in (ours, theirs))
            wrong = f"{left!r} became {right!r}, at token {parted + 1} of prompt {number}"
    said = f"{same} of {len(prompts)} prompts are continued alike, token for token"
    said += f"; {ties} part where two tokens are as likely" if ties else ""
    said += f"; first difference: {wrong}" if wrong else ""
    return Check("text", not wrong, said, {"prompts": len(prompts), "same": same, "ties": ties})
