"""Verify a GGUF file: compare llama.cpp and transformers in log-probabilities, greedy text, chat prompts and EOS."""

import json
import shlex
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.token_text import token_texts
from lora_cli.errors import LoraError
from lora_cli.export import probe_chats
from lora_cli.export.gguf.llama_cpp_server import LlamaCpp
from lora_cli.export.gguf.tensors import GGUFQuantization
from lora_cli.export.reference import ReferenceModel
from lora_cli.export.source import Check, ExportSource

MAX_NEW_TOKENS = 48  # length limit of a prompt's continuation, in tokens
POSITIONS_PER_PROMPT = 3  # positions in each continuation at which next-token distributions are compared


def probe_prompts(source: ExportSource) -> tuple[tuple[int, ...], ...]:
    """Return the token ids of the test prompts: the source's own, or else probe chats, or else random tokens."""
    if source.prompts:
        return source.prompts
    rendered = [probe_chats.render_prompt(source.tokenizer, chat) for chat in probe_chats.PROBE_CHATS[:4]]
    prompts = [tuple(probe_chats.prompt_ids(source.tokenizer, text)) for text in rendered if text]
    return tuple(prompts) or tuple(
        tuple(np.random.default_rng(seed).integers(3, len(source.tokenizer), 12).tolist()) for seed in range(4)
    )


def context_length(source: ExportSource) -> int:
    """Return the context length in tokens that the checks need, at most the model's own."""
    longest = max(len(prompt) for prompt in probe_prompts(source))
    return min(int(source.config.get_text_config().max_position_embeddings), max(2048, longest + MAX_NEW_TOKENS))


def check_outputs(
    source: ExportSource, reference: ReferenceModel, runtime: LlamaCpp, quantization: GGUFQuantization
) -> Iterator[Check]:
    """Yield the checks of next-token distributions and of greedy continuations.

    Raises:
        LoraError: llama.cpp rejects a request.
    """
    divergences, max_difference, same_top = [], 0.0, 0
    same, ties, stopped, prompts = 0, 0, 0, probe_prompts(source)
    first_difference = ""
    for prompt in prompts:
        expected = reference.continue_greedily(prompt, max_new_tokens=MAX_NEW_TOKENS)
        for cut in np.unique(np.linspace(0, len(expected.tokens), POSITIONS_PER_PROMPT).astype(int)):
            tokens = [*prompt, *expected.tokens[:cut]]
            log_p, log_q = reference.logprobs(tokens)[0], _normalize(runtime.logprobs(tokens))
            divergences.append(float((np.exp(log_p) * (log_p - log_q)).sum()))
            max_difference = max(max_difference, float(np.abs(log_p - log_q)[log_p > np.log(1e-4)].max()))
            same_top += int(log_p.argmax() == log_q.argmax())
        generated, ended = runtime.continue_greedily(prompt, max_new_tokens=MAX_NEW_TOKENS)
        if (generated, ended) == tuple(expected):
            same, stopped = same + 1, stopped + ended
        elif quantization.tie_nats and _is_tie(prompt, expected.tokens, generated, reference, quantization):
            ties += 1
        else:
            first_difference = first_difference or _describe_difference(source, expected.tokens, generated)
    kl = float(np.mean(divergences))
    yield Check(
        "distribution",
        kl <= quantization.max_kl,
        f"mean KL divergence {max(kl, 0):.1e} nats over {len(divergences)} positions (at most {quantization.max_kl:g})"
        f", log-probabilities within {max_difference:.1e}, same most likely token at {same_top}",
        {"kl": kl, "positions": len(divergences), "apart": max_difference, "agreed": same_top},
    )
    judged = bool(quantization.tie_nats)
    text = f"{same} of {len(prompts)} prompts have the same greedy continuation as in transformers, {stopped} up to EOS"
    text += f"; {ties} differ after a tie of two equally likely tokens" if ties else ""
    text += f"; first difference: {first_difference}" if first_difference else ""
    text += (
        " (not judged: this much rounding can change the most likely token)" if first_difference and not judged else ""
    )
    figures = {"prompts": len(prompts), "same": same, "ties": ties, "stopped": stopped}
    yield Check("text", not first_difference or not judged, text, figures)


def _normalize(logprobs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log-probabilities whose probabilities sum to 1: llama.cpp's rounding adds up over a large vocabulary."""
    normalized: NDArray[np.float64] = logprobs - np.logaddexp.reduce(logprobs)
    return normalized


def _is_tie(
    prompt: Sequence[int],
    expected: Sequence[int],
    generated: Sequence[int],
    reference: ReferenceModel,
    quantization: GGUFQuantization,
) -> bool:
    """Return whether the first tokens that differ are equally likely, within the quantization's `tie_nats`."""
    at = _first_difference(expected, generated)
    logprobs = reference.logprobs([*prompt, *expected[:at]])[0]
    if at == min(len(expected), len(generated)):  # one of them has ended
        first, second = np.sort(logprobs)[-1:-3:-1]
        return bool(first - second <= quantization.tie_nats)
    return bool(logprobs[expected[at]] - logprobs[generated[at]] <= quantization.tie_nats)


def _first_difference(expected: Sequence[int], generated: Sequence[int]) -> int:
    """Return the index of the first token that differs, or the length of the shorter sequence."""
    pairs = enumerate(zip(expected, generated, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(expected), len(generated)))


def _describe_difference(source: ExportSource, expected: Sequence[int], generated: Sequence[int]) -> str:
    at = _first_difference(expected, generated)
    texts = (token_texts(ids, source.tokenizer)[max(0, at - 3) : at + 5] for ids in (expected, generated))
    left, right = ("".join(part) for part in texts)
    return f"{left!r} became {right!r}, at token {at + 1}"


def check_tokens(source: ExportSource, runtime: LlamaCpp, eos_ids: Sequence[int]) -> Iterator[Check]:
    """Yield the checks of the file's chat template and tokenizer, and of the tokens that end generation.

    Raises:
        LoraError: llama.cpp rejects a request.
    """
    if source.tokenizer.chat_template is None:
        yield Check("chats", True, "neither the tokenizer nor the file has a chat template")
    else:
        yield _check_chats(source, runtime)
    start = runtime.tokenize("a", add_special=True)
    ignored = [token for token in eos_ids if not runtime.stops_at(token, after=start)]
    names = ", ".join(map(repr, source.tokenizer.convert_ids_to_tokens(ignored or list(eos_ids))))
    yield Check(
        "stop",
        not ignored,
        f"generation does not stop at {names}"
        if ignored
        else f"generation stops at {names or 'the length limit only: the model has no EOS token'}",
        {"ends": len(eos_ids), "lost": len(ignored)},
    )


def _check_chats(source: ExportSource, runtime: LlamaCpp) -> Check:
    variables = template_variables(source)
    same, composed, rejected, different, example = 0, 0, 0, [], ""
    for number, chat in enumerate(probe_chats.PROBE_CHATS):
        expected, actual = _prompt_ids(source, runtime, chat, variables)
        nfc_chat = [{**message, "content": unicodedata.normalize("NFC", message["content"])} for message in chat]
        if expected is None and actual is None:
            rejected += 1
        elif expected == actual:
            same += 1
        elif nfc_chat != list(chat) and len(set(map(str, _prompt_ids(source, runtime, nfc_chat, variables)))) == 1:
            composed += 1
        else:
            if expected is None or actual is None:
                example = example or f"only {'the model' if actual is None else 'the file'} has a text for it"
            example = example or _describe_difference(source, expected or (), actual or ())
            different.append(number)
    text = f"{same} of {len(probe_chats.PROBE_CHATS)} chats have the same tokens"
    if composed:
        text += f"; {composed} have them only after Unicode NFC normalization, which llama.cpp does not do"
    text += f"; both templates reject {rejected}" if rejected else ""
    if different:
        text += f"; different: chats {', '.join(map(str, different))}; in chat {different[0]}: {example}"
    figures = {"same": same, "composed": composed, "refused": rejected, "other": len(different)}
    return Check("chats", not different, text, figures)


def template_variables(source: ExportSource) -> dict[str, bool]:
    """Return the template variables with which llama.cpp must be started to prompt the model as its tokenizer does.

    llama.cpp passes `enable_thinking: true` to every template, which overrides a default of false.
    """
    chat = probe_chats.PROBE_CHATS[0]
    if source.tokenizer.chat_template is None:
        return {}
    prompts = [probe_chats.render_prompt(source.tokenizer, chat, **each) for each in ({}, {"enable_thinking": True})]
    return {} if prompts[0] == prompts[1] else {"enable_thinking": False}


def template_options(source: ExportSource) -> str:
    """Return the options of llama.cpp's programs that make them use the file's chat template as in training."""
    variables = template_variables(source)
    return "--jinja" + (f" --chat-template-kwargs {shlex.quote(json.dumps(variables))}" if variables else "")


def _prompt_ids(
    source: ExportSource, runtime: LlamaCpp, chat: probe_chats.Messages, variables: Mapping[str, bool]
) -> tuple[list[int] | None, list[int] | None]:
    """Return a chat's token ids from the tokenizer and from the file; None where the template rejects the chat."""
    text = probe_chats.render_prompt(source.tokenizer, chat)
    try:
        actual = runtime.tokenize(runtime.chat_prompt(chat, variables), add_special=True)
    except LoraError:
        actual = None
    return None if text is None else probe_chats.prompt_ids(source.tokenizer, text), actual
