"""A GGUF file in llama.cpp beside the original in transformers: the same numbers, the same text, the same chats."""

import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lora_cli.errors import LoraError
from lora_cli.export import probe_chats
from lora_cli.export.gguf.llama_cpp_server import LlamaCpp
from lora_cli.export.gguf.tensors import GGUFQuantization
from lora_cli.export.reference import ReferenceModel
from lora_cli.export.source import Check, ExportSource

MAX_NEW_TOKENS = 48  # tokens that a prompt is continued by
POSITIONS_PER_PROMPT = 3  # of each prompt and its answer, where distributions are compared


def probe_prompts(subject: ExportSource) -> tuple[tuple[int, ...], ...]:
    """The subject's own, else chats, else a few tokens."""
    if subject.prompts:
        return subject.prompts
    rendered = [probe_chats.render_prompt(subject.tokenizer, chat) for chat in probe_chats.PROBE_CHATS[:4]]
    found = [tuple(probe_chats.prompt_ids(subject.tokenizer, text)) for text in rendered if text]
    return tuple(found) or tuple(
        tuple(np.random.default_rng(seed).integers(3, len(subject.tokenizer), 12).tolist()) for seed in range(4)
    )


def context_length(subject: ExportSource) -> int:
    """Positions that the proof has use for: hostile chats are long, and prompts have answers."""
    longest = max(len(prompt) for prompt in probe_prompts(subject))
    return min(int(subject.config.get_text_config().max_position_embeddings), max(2048, longest + MAX_NEW_TOKENS))


def check_outputs(
    subject: ExportSource, reference: ReferenceModel, runtime: LlamaCpp, form: GGUFQuantization
) -> Iterator[Check]:
    """The next token's distribution, and the text that the most likely ones make."""
    divergences, apart, agreed = [], 0.0, 0
    same, ties, stopped, prompts = 0, 0, 0, probe_prompts(subject)
    wrong = ""
    for prompt in prompts:
        ours = reference.continue_greedily(prompt, longest=MAX_NEW_TOKENS)
        for cut in np.unique(np.linspace(0, len(ours.tokens), POSITIONS_PER_PROMPT).astype(int)):
            tokens = [*prompt, *ours.tokens[:cut]]
            expected, found = reference.logprobs(tokens)[0], _normalised(runtime.logprobs(tokens))
            divergences.append(float((np.exp(expected) * (expected - found)).sum()))
            apart = max(apart, float(np.abs(expected - found)[expected > np.log(1e-4)].max()))
            agreed += int(expected.argmax() == found.argmax())
        theirs, stops = runtime.continue_greedily(prompt, longest=MAX_NEW_TOKENS)
        if (theirs, stops) == tuple(ours):
            same, stopped = same + 1, stopped + stops
        elif form.tie and _is_tie(prompt, ours.tokens, theirs, reference, form):
            ties += 1
        else:
            wrong = wrong or _difference(subject, ours.tokens, theirs)
    kl = float(np.mean(divergences))
    yield Check(
        "distribution",
        kl <= form.kl,
        f"KL {max(kl, 0):.1e} nats on average over {len(divergences)} positions (at most {form.kl:g}), "
        f"log-probabilities within {apart:.1e}, most likely token equal at {agreed}",
        {"kl": kl, "positions": len(divergences), "apart": apart, "agreed": agreed},
    )
    said = f"{same} of {len(prompts)} prompts are continued token for token as by transformers, {stopped} to their end"
    said += f"; {ties} part where two tokens are as likely" if ties else ""
    said += f"; first difference: {wrong}" if wrong else ""
    said += " (told, not judged: that much rounding may choose otherwise)" if wrong and not form.tie else ""
    figures = {"prompts": len(prompts), "same": same, "ties": ties, "stopped": stopped}
    yield Check("text", not wrong or not form.tie, said, figures)


def _normalised(logprobs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities that add up to one: llama.cpp tells them with a rounding that 49,152 tokens make visible."""
    shifted: NDArray[np.float64] = logprobs - np.logaddexp.reduce(logprobs)
    return shifted


def _is_tie(
    prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int], reference: ReferenceModel, form: GGUFQuantization
) -> bool:
    """Whether the first tokens that differ are as likely as each other, as far as the format's rounding can tell."""
    parted = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    expected = reference.logprobs([*prompt, *ours[:parted]])[0]
    if parted == min(len(ours), len(theirs)):  # one of them ended
        first, second = np.sort(expected)[-1:-3:-1]
        return bool(first - second <= form.tie)
    return bool(expected[ours[parted]] - expected[theirs[parted]] <= form.tie)


def _difference(subject: ExportSource, ours: Sequence[int], theirs: Sequence[int]) -> str:
    parted = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    left, right = (subject.tokenizer.decode(part[max(0, parted - 3) : parted + 5]) for part in (ours, theirs))
    return f"{left!r} became {right!r}, at token {parted + 1}"


def check_tokens(subject: ExportSource, runtime: LlamaCpp, ends: Sequence[int]) -> Iterator[Check]:
    """Chats through the file's template and tokenizer, and the tokens that end an answer."""
    if subject.tokenizer.chat_template is None:
        yield Check("chats", True, "the tokenizer has no chat template, so there is none in the file")
    else:
        yield _chats(subject, runtime)
    start = runtime.tokenize("a", add_special=True)
    lost = [token for token in ends if not runtime.stops_at(token, after=start)]
    named = ", ".join(map(repr, subject.tokenizer.convert_ids_to_tokens(lost or list(ends))))
    yield Check(
        "stop",
        not lost,
        f"generation goes on after {named}" if lost else f"generation stops at {named or 'its limit alone'}",
        {"ends": len(ends), "lost": len(lost)},
    )


def _chats(subject: ExportSource, runtime: LlamaCpp) -> Check:
    same, composed, refused, other = 0, 0, 0, []
    for number, chat in enumerate(probe_chats.PROBE_CHATS):
        expected, found = _both(subject, runtime, chat)
        whole = [{**message, "content": unicodedata.normalize("NFC", message["content"])} for message in chat]
        if expected is None and found is None:
            refused += 1
        elif expected == found:
            same += 1
        elif whole != list(chat) and len(set(map(str, _both(subject, runtime, whole)))) == 1:
            composed += 1
        else:
            other.append(number)
    said = f"{same} of {len(probe_chats.PROBE_CHATS)} chats become the same tokens"
    if composed:
        said += f"; {composed} do once accents and letters are one character, which llama.cpp does not see to"
    said += f"; {refused} are refused by both templates" if refused else ""
    said += f"; others: {', '.join(f'chat {number}' for number in other)}" if other else ""
    figures = {"same": same, "composed": composed, "refused": refused, "other": len(other)}
    return Check("chats", not other, said, figures)


def _both(
    subject: ExportSource, runtime: LlamaCpp, chat: probe_chats.Messages
) -> tuple[list[int] | None, list[int] | None]:
    """What the tokenizer and the file make of a chat; None where its template refuses it."""
    text = probe_chats.render_prompt(subject.tokenizer, chat)
    try:
        found = runtime.tokenize(runtime.chat_prompt(chat), add_special=True)
    except LoraError:
        found = None
    return None if text is None else probe_chats.prompt_ids(subject.tokenizer, text), found
