"""Tokenize examples for causal-lm and compute the label mask: the spans of tokens that carry loss. No models."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from datetime import date
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from lora_cli.data.assistant_spans import AnswerCounts, Span
from lora_cli.data.chat_templates import resolve_template
from lora_cli.data.conversation import Conversation
from lora_cli.data.flagged_spans import spans_of_segments, subtract_spans
from lora_cli.data.formats import Document, Example, PromptCompletion, TokenIds
from lora_cli.data.label_mask import Ints, predicted_spans, skip_stripped, spans_of_labels, token_positions
from lora_cli.data.records import BadRow
from lora_cli.data.render_chats import NO_COUNTS, ChatOptions, ChatRendering, UntokenizedRow
from lora_cli.data.rendering import Template
from lora_cli.data.segments import Segments
from lora_cli.data.template_variables import template_keys
from lora_cli.data.tokenization import Tokenization
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from lora_cli.recipe.tasks import TaskName

TAG = re.compile(r"[<\[]\S+[>\]]")


class EncodedRow(NamedTuple):
    """One tokenized row for the cache, with counts for the ledger."""

    ids: Ints  # int32 [tokens]
    supervised_spans: tuple[Span, ...]  # token ranges that carry loss: in order, not overlapping, not empty
    answer_spans: tuple[Span, ...]  # token ranges of the full answers, end-of-turn token included
    split: bool = False  # an answer began inside a token, so that its text was tokenized separately
    counts: AnswerCounts = NO_COUNTS  # what the chat template did to the answers
    templated: bool = False  # a conversation, rendered by the chat template
    prefix: int = 0  # a text's first tokens that the tokenizer adds to every text: BOS

    @property
    def supervised(self) -> int:
        """Tokens that carry loss."""
        return sum(stop - start for start, stop in self.supervised_spans)

    @property
    def length(self) -> int:
        """Tokens, which data.max_length limits."""
        return len(self.ids)

    @property
    def key(self) -> int:
        """A 64-bit hash of ids and labels, independent of the file that contains the row."""
        spans = np.array(self.supervised_spans, dtype=np.int32)
        digest = hashlib.blake2b(self.ids.astype("<i4").tobytes(), digest_size=8)
        digest.update(b"runs" + spans.astype("<i4").tobytes())
        return int.from_bytes(digest.digest(), "little")


PreparedRow = UntokenizedRow | EncodedRow | BadRow


class CausalLMEncoder:
    """Encodes examples for causal-lm with a tokenizer and the options of a recipe.

    A class, because the format of the chat template and the copy of the tokenizer are made once for all batches.
    """

    task: TaskName = "causal-lm"

    def __init__(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, placeholders: Sequence[int] = ()) -> None:
        """`placeholders` are token ids that stand for an image, a video or a sound: rows with one are bad."""
        require_fast_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self._placeholders = {number: str(tokenizer.added_tokens_decoder[number]) for number in placeholders}
        self._spec = spec
        self._templates: dict[bool, Template] = {}  # of the conversations so far, by whether they have tools
        tokens = tokenizer.added_tokens_decoder.values()
        self._options = ChatOptions(
            templates={},
            special=tuple(sorted({token.content for token in tokens if token.special and token.content.strip()})),
            # Like DeepSeek's <｜Assistant｜>: no special token, but a header that is one token.
            added=tuple(
                sorted({token.content for token in tokens if not token.special and TAG.fullmatch(token.content)})
            ),
            bos=tokenizer.bos_token,
            all_tokens=spec.loss_on == "all",
        )
        self._stopped: list[BadRow] = []  # rows on which the template was stopped
        self._day = date.fromisoformat(spec.template_date) if spec.template_date else date.today()
        self._backend = _backend_without_special_tokens(tokenizer)
        added = tokenizer.added_tokens_decoder.items()
        self._rstrip = frozenset(id_ for id_, token in added if token.rstrip)
        self._lstrip = frozenset(id_ for id_, token in added if token.lstrip)
        self._prefix = prefix_tokens(tokenizer)
        self._eos: int | None = tokenizer.eos_token_id
        self._bos: int | None = tokenizer.bos_token_id
        self._vocab_size = len(tokenizer)
        self._special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.has_template = spec.chat_template is not None or tokenizer.chat_template is not None

    def identity(self) -> str:
        """Return a hash of everything that determines ids and labels: tokenizer, templates, options."""
        # With the date of the run, if a template writes it: rows of different days are not mixed.
        templates = [self._template(tools=tools) for tools in (False, True)]
        options = [
            [template.source if template else None for template in templates],
            self.tokenizer.special_tokens_map,
            [self._prefix, self._eos, self._bos],
            [self._spec.loss_on, self._spec.max_length, self._spec.overlong],
        ]
        if self._spec.overlong == "split":
            options.append(self._spec.stride)
        if self._placeholders:
            options.append(sorted(self._placeholders))
        digest = hashlib.blake2b(self._backend.to_str().encode(), digest_size=16)
        digest.update(json.dumps(options, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def template_reads(self, key: str) -> bool:
        """Return whether the chat template, of the conversations so far, reads a key of messages."""
        return any(key in template_keys(template.source) for template in self._templates.values())

    def start(self, examples: Sequence[Example]) -> Tokenization[PreparedRow]:
        """Start the rendering of the conversations in the template process; one rendering at a time.

        Raises:
            LoraError: there is no chat template, or it cannot be used.
        """
        chats = [example for example in examples if isinstance(example, Conversation)]
        for tools in dict.fromkeys(chat.tools is not None for chat in chats):
            if tools not in self._templates:
                self._templates[tools] = self._required_template(tools=tools)
        rendering = ChatRendering(self._options._replace(templates=self._templates), chats, self._stopped)

        def rows() -> list[PreparedRow]:
            rendered = iter(rendering.rows())
            return [next(rendered) if isinstance(one, Conversation) else self._prepare(one) for one in examples]

        def texts(rows: Sequence[PreparedRow]) -> list[str]:
            return [row.text for row in rows if isinstance(row, UntokenizedRow)]

        return Tokenization(rows, texts, tokenizer=self._backend, add_special_tokens=False)

    def encode(
        self, examples: Sequence[Example], started: Tokenization[PreparedRow] | None = None
    ) -> Iterator[EncodedRow | BadRow]:
        """Yield one result for each example, in order; `started` is what `start` returned for them, if it was called.

        Raises:
            LoraError: the chat template or the tokenizer cannot be used for these examples.
        """
        work = started or self.start(examples)
        encodings = iter(work.encodings())
        for row in work.rows:
            encoded = self._to_row(row, next(encodings)) if isinstance(row, UntokenizedRow) else row
            yield self._check_placeholders(encoded) if self._placeholders else encoded

    def _check_placeholders(self, row: EncodedRow | BadRow) -> EncodedRow | BadRow:
        """Return a BadRow in place of a row that has the token of an image: the model would look for the image."""
        found = self._placeholders.keys() & set(row.ids.tolist()) if isinstance(row, EncodedRow) else set()
        if not found:
            return row
        token = self._placeholders[min(found)]
        return BadRow("token of an image or sound", f"has {token}, which stands for an image, a video or a sound")

    def _prepare(self, example: Example) -> PreparedRow:
        """Return the text of an example without chat template, or its row if it is tokenized already."""
        all_tokens = self._spec.loss_on == "all"
        try:
            match example:
                case PromptCompletion(prompt, completion):
                    text = prompt + completion
                    return UntokenizedRow(text, [Span(len(prompt), len(text))], plain=True, all_tokens=all_tokens)
                case Document(text):
                    return UntokenizedRow(text, [Span(0, len(text))], plain=True, all_tokens=True)
                case Segments():
                    spans = spans_of_segments(example)
                    return UntokenizedRow(example.text, spans, plain=True, all_tokens=False, labeled=True)
                case TokenIds():
                    return self._from_token_ids(example)
                case _:
                    raise TypeError(f"rows of {type(example).__name__} belong to another task")
        except BadRow as bad:
            return bad

    def _template(self, *, tools: bool) -> Template | None:
        return resolve_template(self._spec.chat_template, self.tokenizer, tools=tools, day=self._day)

    def _required_template(self, *, tools: bool) -> Template:
        template = self._template(tools=tools)
        if template is None:
            raise LoraError(
                "data: the rows are conversations, but the tokenizer has no chat template",
                hint="set data.chat_template: a named template (chatml, alpaca, ...), a path, or inline Jinja",
            )
        return template

    def _from_token_ids(self, example: TokenIds) -> EncodedRow:
        ids, labels = example
        for index, token in enumerate(ids):
            if not 0 <= token < self._vocab_size:
                problem = f"is {token}, but the ids of this tokenizer are 0 to {self._vocab_size - 1}"
                raise BadRow("id outside the vocabulary", problem, field=f"input_ids[{index}]")
        self._check_single_bos(ids)
        spans = spans_of_labels(labels) if labels is not None else [Span(0, len(ids))]
        return _make_row(ids, spans, answers=())

    def _to_row(self, row: UntokenizedRow, encoding: Encoding) -> EncodedRow | BadRow:
        ids = encoding.ids
        borders = sorted(border for span in (*row.answers, *row.silent) for border in span)
        moved = skip_stripped(encoding, borders, row.text, self._rstrip)
        token_borders = token_positions(encoding, moved, length=len(row.text))
        split = token_borders is None
        try:
            if token_borders is None:
                ids, token_borders = self._encode_parts(row.text, moved, full=ids, flagged=bool(row.silent))
            position = dict(zip(borders, token_borders, strict=True))
            answers, silent = (
                [Span(position[start], position[stop]) for start, stop in spans] for spans in (row.answers, row.silent)
            )
            if row.plain:
                ids, answers = self._add_bos_eos(ids, answers, any_end=row.labeled)
            self._check_single_bos(ids)
            selected = answers[-1:] if self._spec.loss_on == "last-turn" and not row.labeled else answers
            spans = subtract_spans([Span(0, len(ids))] if row.all_tokens else selected, silent)
            if silent and not spans:
                problem = "no token of the row carries loss: its loss flags leave none of what data.loss_on selects"
                raise BadRow("nothing to learn", problem)
            encoded = _make_row(ids, spans, tuple(answers), split=split, counts=row.counts)
            return encoded._replace(templated=not row.plain, prefix=len(self._prefix) if row.plain else 0)
        except BadRow as bad:
            return bad

    def _encode_parts(
        self, text: str, borders: list[int], *, full: list[int], flagged: bool
    ) -> tuple[list[int], list[int]]:
        """Tokenize the parts between borders separately, for texts in which a token crosses a border.

        Returns the ids and the border positions in tokens; `full` are the ids of the undivided text, and `flagged` says
        that some borders are those of parts with loss flags.
        """
        cuts = [0, *borders, len(text)]
        parts = [self._backend.encode(text[a:b], add_special_tokens=False).ids for a, b in pairwise(cuts)]
        ids = [token for part in parts for token in part]
        # A token with the flag `lstrip` swallows the end of the prompt before it, which a server's prompt contains.
        stripped = not self._lstrip.isdisjoint(full)
        if _without_space(self._decode(ids), stripped) != _without_space(self._decode(full), stripped):
            if flagged:
                problem = (
                    "a part with a loss flag begins inside a token, and tokenized separately it decodes to other text"
                )
                raise BadRow("loss flag inside a token", problem)
            raise BadRow("answer begins inside a token", "an answer tokenized separately decodes to different text")
        ends = np.cumsum([len(part) for part in parts]).tolist()
        return ids, ends[:-1]

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)

    def _add_bos_eos(self, ids: list[int], answers: list[Span], *, any_end: bool) -> tuple[list[int], list[Span]]:
        """Prepend BOS if the tokenizer adds it, and append EOS, unless the text has them; shift the spans.

        With `any_end`, any special token ends the text. EOS belongs to the last answer if that ends the text.
        """
        if self._eos is None:
            raise LoraError(
                "model: the tokenizer has no EOS token, so the model cannot learn where a text ends",
                hint="set eos_token in the model's tokenizer_config.json",
            )
        prefix = [] if ids[: len(self._prefix)] == self._prefix else self._prefix
        ends = ids[-1:] == [self._eos] or (any_end and ids[-1] in self._special)
        end = [] if ends else [self._eos]
        shifted = [Span(start + len(prefix), stop + len(prefix)) for start, stop in answers]
        if shifted[-1].stop == len(prefix) + len(ids):
            shifted[-1] = Span(shifted[-1].start, shifted[-1].stop + len(end))
        return [*prefix, *ids, *end], shifted

    def _check_single_bos(self, ids: Sequence[int]) -> None:
        if self._bos is not None and list(ids[:2]) == [self._bos, self._bos]:
            raise BadRow("two BOS tokens", f"starts with two BOS tokens ({self.tokenizer.bos_token})")


def _without_space(text: str, stripped: bool) -> str:
    return "".join(text.split()) if stripped else text


def require_fast_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the tokenizer can map tokens to their characters in the text.

    Raises:
        LoraError: it is a slow tokenizer (in Python), which does not report offsets.
    """
    if not tokenizer.is_fast:
        raise LoraError(
            f"model: {type(tokenizer).__name__} is not a fast tokenizer, so tokens cannot be mapped to their text",
            hint="use a model folder that has a tokenizer.json",
        )


def truncate_row(row: EncodedRow, length: int) -> EncodedRow:
    """Return the first `length` tokens of a row with their part of the supervised spans."""
    spans = tuple(Span(start, min(stop, length)) for start, stop in row.supervised_spans if start < length)
    return row._replace(ids=row.ids[:length], supervised_spans=spans)


def _make_row(
    ids: Sequence[int],
    spans: Sequence[Span],
    answers: tuple[Span, ...],
    *,
    split: bool = False,
    counts: AnswerCounts = NO_COUNTS,
) -> EncodedRow:
    supervised = predicted_spans(spans)
    if not supervised:
        raise BadRow("nothing to learn", "no token of the row carries loss")
    return EncodedRow(np.array(ids, dtype=np.int32), supervised, answers, split, counts)


def _backend_without_special_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of the tokenizer without truncation and padding, whose offsets include the spaces of a token."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    # Post-processors add special tokens, which this module does itself, or remove spaces from the offsets.
    backend.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    return backend


def prefix_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens, usually BOS, that the tokenizer adds before a text."""
    without: list[int] = tokenizer("x", add_special_tokens=False)["input_ids"]
    with_special: list[int] = tokenizer("x")["input_ids"]
    starts = range(len(with_special))
    return with_special[: next((i for i in starts if with_special[i : i + len(without)] == without), 0)]
