"""Verify a model folder in transformers: compare log-probabilities and greedy texts with those of its source."""

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

from lora_cli.data.token_text import token_texts
from lora_cli.export.hf import nf4
from lora_cli.export.reference import CPU, eos_ids
from lora_cli.export.source import Check, ExportSource
from lora_cli.model import fake_quantize

MAX_POSITIONS = 33  # last positions of each text that are compared: mostly those of the answer
MAX_NEW_TOKENS = 32  # per prompt
# The export is compared with the source after the same rounding of its weights, both computed in fp32, so that they
# differ only by the order of summation. The cost of the rounding itself is reported but not judged: a mixture of
# experts can select other experts after a tiny change, and 4 bits can cost a small model more than a nat.
MAX_KL = 1e-5  # nats, mean over positions
TIE_NATS = 1e-3  # two tokens whose log-probabilities differ by less are a tie: either may be generated


class Rounding(NamedTuple):
    """The rounding of the source's weights by the export."""

    dtype: torch.dtype | None  # that floating-point weights are written in; None if all have it already
    packed: bool  # linear weights are quantized to NF4


class GeneratedText(NamedTuple):
    """A greedy continuation."""

    tokens: tuple[int, ...]  # including a final EOS
    margins: tuple[float, ...]  # nats, between each token and the second most likely one


class ModelOutputs(NamedTuple):
    """Outputs of a model on some prompts."""

    texts: list[GeneratedText]  # empty if the model does not generate text
    inputs: list[tuple[int, ...]]  # the prompts; for a language model, each with a continuation
    logprobs: NDArray[np.float64]  # [positions, classes], in nats; the values themselves for a regression


def compare_with_source(source: ExportSource, out: Path, rounding: Rounding) -> Iterator[Check]:
    """Yield the checks of the folder `out` against the source's model.

    Raises:
        LoraError: one of them cannot be loaded.
    """
    export = source.at(out)
    prompts = source.prompts or _random_prompts(source)
    original = _run(source, prompts)
    exported = _run(export, prompts, inputs=original.inputs)
    rounded = original
    if rounding.dtype is not None:
        rounded = _run(source, prompts, inputs=original.inputs, rounding=rounding)
    check = _compare_distributions(rounded, exported, source)
    reference = "the source in fp32" + (" with weights rounded in the same way" if rounding.dtype is not None else "")
    yield check._replace(found=f"compared with {reference}: {check.found}")
    if original.texts:
        yield _compare_texts(source, prompts, rounded, exported)
    if rounding.dtype is not None:
        cost = _compare_distributions(original, exported, source)
        text = f"cost of the rounding, compared with the original source: {cost.found}"
        same = sum(a.tokens == b.tokens for a, b in zip(original.texts, exported.texts, strict=True))
        text += f"; {same} of {len(prompts)} prompts have the same greedy continuation" if original.texts else ""
        yield Check("note", True, text, {**cost.figures, "same": same})


def _random_prompts(source: ExportSource) -> tuple[tuple[int, ...], ...]:
    size = min(len(source.tokenizer), source.config.get_text_config().vocab_size)
    return tuple(tuple(np.random.default_rng(seed).integers(3, size, 12).tolist()) for seed in range(4))


@torch.inference_mode()
def _run(
    source: ExportSource,
    prompts: Sequence[tuple[int, ...]],
    *,
    inputs: list[tuple[int, ...]] | None = None,
    rounding: Rounding | None = None,
) -> ModelOutputs:
    """Return a model's outputs, computed in fp32. The model is freed on return, so that one is in memory at a time.

    Args:
        source: the model.
        prompts: token ids that a language model continues.
        inputs: texts whose log-probabilities are computed; None for the prompts with the model's own continuations.
        rounding: applied to the model's weights first.
    """
    model = source.base.load(CPU, dtype=torch.float32).model
    if rounding is not None:
        _round_weights(model.eval(), source, rounding)
    # From a 4-bit checkpoint, transformers loads the other weights in their 16-bit dtype, and packed layers compute in
    # bfloat16.
    for parameter in model.eval().parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = torch.float32
    texts = [_continue_greedily(model, source, prompt) for prompt in prompts] if source.task == "causal-lm" else []
    if inputs is None:
        continuations = [text.tokens for text in texts] or [()] * len(prompts)
        inputs = [(*prompt, *tokens) for prompt, tokens in zip(prompts, continuations, strict=True)]
    return ModelOutputs(texts, inputs, np.concatenate([_logprobs(model, source, tokens) for tokens in inputs]))


def _round_weights(model: PreTrainedModel, source: ExportSource, rounding: Rounding) -> None:
    assert rounding.dtype is not None
    packed: dict[str, bool] = {}
    if rounding.packed:
        packed = nf4.weights_in_nf4(source)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            value = tensor.to(rounding.dtype).float()
            if name in packed:
                # bitsandbytes dequantizes to the dtype of the layer's input, here fp32.
                value = fake_quantize.quantize_dequantize(nf4.NF4_SPEC, torch.float32, transposed=packed[name])(value)
            tensor.copy_(value)


def _continue_greedily(model: PreTrainedModel, source: ExportSource, prompt: Sequence[int]) -> GeneratedText:
    ids = torch.tensor([list(prompt)], device=CPU)
    pad_id = source.tokenizer.pad_token_id
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=list(eos_ids(source)) or None,
        pad_token_id=pad_id if pad_id is not None else 0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    generator: Any = model
    output = generator.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    top_two = [step[0].topk(2).values.tolist() for step in output.logits]
    return GeneratedText(
        tuple(output.sequences[0, len(prompt) :].tolist()), tuple(first - second for first, second in top_two)
    )


def _logprobs(model: Any, source: ExportSource, tokens: Sequence[int]) -> NDArray[np.float64]:
    """Return the log-probabilities [positions, classes] of tokens or labels; for a regression, the values [1, values].

    Labels of a multi-label classifier are separate distributions of two classes each.
    """
    inputs = {"input_ids": torch.tensor([list(tokens)], device=CPU)}
    if source.task == "seq2seq-lm":
        inputs["decoder_input_ids"] = inputs["input_ids"]  # any text works if both models get the same one
    values: Tensor = model(**inputs).logits[0].double()
    values = values.reshape(-1, values.shape[-1])[-MAX_POSITIONS:]
    kind = source.labels.kind if source.labels else "single"
    if kind == "multi":
        values = torch.nn.functional.logsigmoid(torch.stack([values, -values], dim=-1).reshape(-1, 2))
    elif kind == "single":
        values = values.log_softmax(dim=-1)
    result: NDArray[np.float64] = values.numpy()
    return result


def _compare_distributions(expected: ModelOutputs, actual: ModelOutputs, source: ExportSource) -> Check:
    ours, theirs = expected.logprobs, actual.logprobs
    if source.labels is not None and source.labels.kind == "regression":
        # A shift of one logit by d costs about d²/2 nats, so the bound of the shift follows from MAX_KL.
        difference = float(np.abs(ours - theirs).max() / max(np.abs(ours).max(), 1e-30))
        text = f"largest difference of values {difference:.1e}, relative to the largest value"
        return Check("distribution", difference <= math.sqrt(2 * MAX_KL), text, {"apart": difference})
    kl = float((np.exp(ours) * (ours - theirs)).sum(axis=-1).mean())
    agreed = int((ours.argmax(axis=-1) == theirs.argmax(axis=-1)).sum())
    text = f"mean KL divergence {max(kl, 0):.1e} nats over {len(ours)} positions, "
    text += f"same most likely token or label at {agreed}"
    return Check("distribution", kl <= MAX_KL, text, {"kl": kl, "agreed": agreed, "positions": len(ours)})


def _compare_texts(
    source: ExportSource, prompts: Sequence[tuple[int, ...]], expected: ModelOutputs, actual: ModelOutputs
) -> Check:
    """Compare greedy continuations token by token; they may differ after a tie."""
    same, ties, first_difference = 0, 0, ""
    for number, (ours, theirs) in enumerate(zip(expected.texts, actual.texts, strict=True), start=1):
        pairs = zip(ours.tokens, theirs.tokens, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if at is None:
            same += 1
        elif ours.margins[at] <= TIE_NATS:
            ties += 1
        elif not first_difference:
            parts = (token_texts(text.tokens[: at + 1], source.tokenizer)[-4:] for text in (ours, theirs))
            left, right = ("".join(part) for part in parts)
            first_difference = f"{left!r} became {right!r}, at token {at + 1} of prompt {number}"
    text = f"{same} of {len(prompts)} prompts have the same greedy continuation"
    text += f"; {ties} differ after a tie of two equally likely tokens" if ties else ""
    text += f"; first difference: {first_difference}" if first_difference else ""
    return Check("text", not first_difference, text, {"prompts": len(prompts), "same": same, "ties": ties})
