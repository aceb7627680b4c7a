"""Turn an example into token ids and the runs of them that carry loss. Imports tokenizers, not models."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from lora_cli.data.assistant_spans import AssistantFormat, Span, infer_template_format, render_with_spans
from lora_cli.data.chat_templates import Template, resolve_template
from lora_cli.data.conversation import Conversation
from lora_cli.data.formats import Document, Example, PromptCompletion, TokenIds
from lora_cli.data.records import BadRow
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from lora_cli.recipe.tasks import TaskName

Ints = npt.NDArray[np.int32]


class EncodedRow(NamedTuple):
    """One row on its way to disk, and what encoding it took."""

    ids: Ints
    supervised_spans: tuple[Span, ...]  # token ranges that carry loss: in order, apart, not empty
    answer_spans: tuple[Span, ...]  # token ranges of the whole answers, end-of-turn token included
    split: bool = False  # an answer began inside a token, so that its text was tokenised on its own
    rewritten: int = 0  # answers that the chat template wrote otherwise than the row has them

    @property
    def supervised(self) -> int:
        """Tokens that carry loss."""
        return sum(stop - start for start, stop in self.supervised_spans)

    @property
    def length(self) -> int:
        """Tokens, as data.max_length counts them."""
        return len(self.ids)

    @property
    def key(self) -> int:
        """A 64-bit hash of ids and labels: equal for equal rows, whatever file they are in."""
        runs = np.array(self.supervised_spans, dtype=np.int32)
        digest = hashlib.blake2b(self.ids.astype("<i4").tobytes(), digest_size=8)
        digest.update(b"runs" + runs.astype("<i4").tobytes())
        return int.from_bytes(digest.digest(), "little")


class _PendingRow(NamedTuple):
    """A row on its way: the text to tokenise, and where its answers lie."""

    text: str
    answers: list[Span]  # characters
    alone: bool  # no chat template: BOS and EOS are added as the tokenizer does
    whole: bool  # everything carries loss
    rewritten: int = 0


class CausalLMEncoder:
    """A tokenizer and a recipe's options, ready to encode rows in batches.

    A class, because what is learnt once (the template's layout, a tokenizer that reports exact offsets) serves
    every batch.
    """

    task: TaskName = "causal-lm"

    def __init__(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> None:
        require_fast_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self._spec = spec
        self._formats: dict[bool, AssistantFormat] = {}
        self._backend = _backend_without_special_tokens(tokenizer)
        self._before = _prefix_tokens(tokenizer)
        self._eos: int | None = tokenizer.eos_token_id
        self._bos: int | None = tokenizer.bos_token_id
        self._size = len(tokenizer)

    def identity(self) -> str:
        """A hash of all that decides how an example becomes ids: tokenizer, templates, options."""
        templates = [resolve_template(self._spec.chat_template, self.tokenizer, tools=tools) for tools in (False, True)]
        options = [
            [template.source if template else None for template in templates],
            self.tokenizer.special_tokens_map,
            [self._before, self._eos, self._bos],
            [self._spec.loss_on, self._spec.max_length, self._spec.overlong],
        ]
        digest = hashlib.blake2b(self._backend.to_str().encode(), digest_size=16)
        digest.update(json.dumps(options, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def encode(self, examples: Sequence[Example]) -> Iterator[EncodedRow | BadRow]:
        """One result an example, in order."""
        plans = [self._planned(example) for example in examples]
        # In one call, because the tokenizer spreads a batch over the cores.
        texts = [plan.text for plan in plans if isinstance(plan, _PendingRow)]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        for plan in plans:
            if isinstance(plan, _PendingRow):
                yield self._finished(plan, next(encodings))
            else:
                yield plan

    def _planned(self, example: Example) -> _PendingRow | EncodedRow | BadRow:
        whole = self._spec.loss_on == "all"
        try:
            match example:
                case Conversation():
                    format_ = self._format_of(example)
                    text, turns, rewritten = render_with_spans(format_, example)
                    return _PendingRow(text, turns, alone=False, whole=whole, rewritten=rewritten)
                case PromptCompletion(prompt, completion):
                    text = prompt + completion
                    return _PendingRow(text, [Span(len(prompt), len(text))], alone=True, whole=whole)
                case Document(text):
                    return _PendingRow(text, [Span(0, len(text))], alone=True, whole=True)
                case TokenIds():
                    return self._checked(example)
                case _:
                    raise TypeError(f"rows of {type(example).__name__} belong to another task")
        except BadRow as bad:
            return bad

    def _format_of(self, chat: Conversation) -> AssistantFormat:
        tools = chat.tools is not None
        if tools not in self._formats:
            template = resolve_template(self._spec.chat_template, self.tokenizer, tools=tools)
            if template is None:
                raise LoraError(
                    "data: the rows are conversations, and the tokenizer has no chat template",
                    hint="set data.chat_template: a named template (chatml, alpaca, ...), a path, or inline Jinja",
                )
            self._formats[tools] = self._learnt(template)
        format_ = self._formats[tools]
        if tools and not format_.takes_tools:
            raise LoraError(
                f"data: rows have tools, and {format_.template.name} ignores them",
                hint="use a template that takes tools, or leave the tools column out of the data",
            )
        return format_

    def _learnt(self, template: Template) -> AssistantFormat:
        tokens = self.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in tokens if token.special and token.content.strip()}
        return infer_template_format(template, special=special, bos=self.tokenizer.bos_token)

    def _checked(self, example: TokenIds) -> EncodedRow:
        ids, labels = example
        for index, token in enumerate(ids):
            if not 0 <= token < self._size:
                problem = f"is {token}: this tokenizer's ids go from 0 to {self._size - 1}"
                raise BadRow("id outside the vocabulary", problem, field=f"input_ids[{index}]")
        self._one_bos(ids)
        kept = [label != -100 for label in labels] if labels is not None else [True] * len(ids)
        return _make_row(ids, _runs(kept), answers=())

    def _finished(self, plan: _PendingRow, encoding: Encoding) -> EncodedRow | BadRow:
        ids = encoding.ids
        borders = [border for span in plan.answers for border in span]
        places = _tokens_at(encoding, borders, len(plan.text))
        split = places is None
        try:
            if places is None:
                ids, places = self._pieces(plan.text, borders, whole=ids)
            answers = [Span(start, stop) for start, stop in zip(places[::2], places[1::2], strict=True)]
            if plan.alone:
                ids, answers = self._surrounded(ids, answers)
            self._one_bos(ids)
            chosen = answers[-1:] if self._spec.loss_on == "last-turn" else answers
            runs = [Span(0, len(ids))] if plan.whole else chosen
            return _make_row(ids, runs, tuple(answers), split=split, rewritten=plan.rewritten)
        except BadRow as bad:
            return bad

    def _pieces(self, text: str, borders: list[int], *, whole: list[int]) -> tuple[list[int], list[int]]:
        """Ids of the text cut at its borders, for the case that a token lies across one."""
        cuts = [0, *borders, len(text)]
        parts = [self._backend.encode(text[a:b], add_special_tokens=False).ids for a, b in pairwise(cuts)]
        ids = [token for part in parts for token in part]
        if self._decoded(ids) != self._decoded(whole):
            raise BadRow("answer begins inside a token", "tokenised on its own, the answer reads otherwise")
        places = np.cumsum([len(part) for part in parts]).tolist()
        return ids, places[:-1]

    def _decoded(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)

    def _surrounded(self, ids: list[int], answers: list[Span]) -> tuple[list[int], list[Span]]:
        """With BOS before, where the tokenizer adds one and the text has none, and EOS behind."""
        if self._eos is None:
            raise LoraError(
                "model: the tokenizer has no EOS token, so the model could not learn where a text ends",
                hint="set eos_token in the model's tokenizer_config.json",
            )
        before = [] if ids[: len(self._before)] == self._before else self._before
        end = [] if ids[-1:] == [self._eos] else [self._eos]
        shifted = [Span(start + len(before), stop + len(before)) for start, stop in answers]
        closed = [*shifted[:-1], Span(shifted[-1].start, shifted[-1].stop + len(end))]
        return [*before, *ids, *end], closed

    def _one_bos(self, ids: Sequence[int]) -> None:
        if self._bos is not None and list(ids[:2]) == [self._bos, self._bos]:
            raise BadRow("two BOS tokens", f"starts with two BOS tokens ({self.tokenizer.bos_token})")


def require_fast_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokens have to be traced to their text.

    Raises:
        LoraError: the tokenizer is one of those in Python, which do not tell where their tokens lie.
    """
    if not tokenizer.is_fast:
        raise LoraError(
            f"model: {type(tokenizer).__name__} is no fast tokenizer, so tokens cannot be traced to their text",
            hint="use a model folder that has a tokenizer.json",
        )


def truncate_row(row: EncodedRow, length: int) -> EncodedRow:
    """The first `length` tokens of a row, with the loss they carry."""
    runs = tuple(Span(start, min(stop, length)) for start, stop in row.supervised_spans if start < length)
    return row._replace(ids=row.ids[:length], supervised_spans=runs)


def _make_row(
    ids: Sequence[int],
    runs: Sequence[Span],
    answers: tuple[Span, ...],
    *,
    split: bool = False,
    rewritten: int = 0,
) -> EncodedRow:
    # Nothing precedes the first token, so nothing predicts it: it never carries loss.
    kept = tuple(Span(max(1, start), stop) for start, stop in runs if stop > max(1, start))
    if not kept:
        raise BadRow("nothing to learn", "no token of the row carries loss")
    return EncodedRow(np.array(ids, dtype=np.int32), kept, answers, split, rewritten)


def _runs(kept: Sequence[bool]) -> list[Span]:
    edges = np.flatnonzero(np.diff([False, *kept, False]))
    return [Span(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _tokens_at(encoding: Encoding, borders: list[int], length: int) -> list[int] | None:
    """The tokens that begin at the character borders, or None where a token lies across one."""
    places = []
    offsets = encoding.offsets
    for border in borders:
        if border == length:
            places.append(len(encoding.ids))
            continue
        token = encoding.char_to_token(border)
        if token is None or offsets[token][0] != border:
            return None
        # A character of several byte tokens belongs to all of them; the token before must have ended.
        if token > 0 and offsets[token - 1][1] > border:
            return None
        places.append(token)
    return places


def _backend_without_special_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the tokenizer that neither cuts nor pads, and whose offsets include a token's blanks."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    # Post-processors add special tokens, which is done here, or trim the offsets, which must not be.
    backend.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    return backend


def _prefix_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens (BOS, mostly) that the tokenizer writes before a plain text."""
    bare: list[int] = tokenizer("x", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("x")["input_ids"]
    return full[: next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)]
