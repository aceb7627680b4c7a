"""Turn rows of the other tasks into token ids and labels: a class, a class for each word, or another text.

Tokens are what the tokenizer makes of a plain text, special tokens included, as whoever uses the model will have them.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from lora_cli.data.encode import CausalLMEncoder, EncodedRow, Ints, require_fast_tokenizer
from lora_cli.data.formats import ClassificationExample, Example, Label, PromptCompletion, TaggingExample
from lora_cli.data.records import BadRow
from lora_cli.recipe.schema import DataSpec
from lora_cli.recipe.tasks import TaskName

LabelValues = npt.NDArray[np.float64]
NO_VALUES: LabelValues = np.zeros(0, np.float64)


class LabeledRow(NamedTuple):
    """One row on its way to disk."""

    ids: Ints
    supervised: int  # labels in it, or target tokens
    values: LabelValues = NO_VALUES  # numbers to come near to, or target ids
    label_keys: tuple[
        str | None, ...
    ] = ()  # labels as the row has them, which the source's table numbers; None: no label
    multi_label: bool = False  # the labels all belong to the row, not one to each token
    numbered: bool = False  # they were whole numbers in the row
    pair_tokens: int = 0  # tokens at its end that belong to a second text
    truncated: "LabeledRow | None" = None  # what data.overlong: truncate leaves of it, where it is too long

    @property
    def length(self) -> int:
        """Tokens of the longer of what is read and what is written."""
        return len(self.ids) if self.label_keys or len(self.values) == 1 else max(len(self.ids), len(self.values))

    @property
    def key(self) -> int:
        """A 64-bit hash of ids and labels: equal for equal rows, whatever file they are in."""
        digest = hashlib.blake2b(self.ids.astype("<i4").tobytes(), digest_size=8)
        # By spelling: how a label is numbered hangs on the rows before.
        digest.update(repr(self.label_keys).encode() + self.values.astype("<f8").tobytes())
        return int.from_bytes(digest.digest(), "little")


class RowEncoder(Protocol):
    """What encodes the rows of a task."""

    task: TaskName

    def identity(self) -> str: ...
    def encode(self, examples: Sequence[Example]) -> Iterator[EncodedRow | LabeledRow | BadRow]: ...


def make_encoder(task: TaskName, spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> RowEncoder:
    """The encoder of a task's rows.

    Raises:
        LoraError: the tokenizer cannot be used.
    """
    if task == "causal-lm":
        return CausalLMEncoder(spec, tokenizer)
    return LabeledRowEncoder(task, spec, tokenizer)


class LabeledRowEncoder:
    """A tokenizer and a recipe's options, ready to encode rows in batches."""

    def __init__(self, task: TaskName, spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> None:
        require_fast_tokenizer(tokenizer)
        self.task = task
        self._spec = spec
        self._whole = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._whole.no_truncation()
        self._whole.no_padding()
        self._short = Tokenizer.from_str(self._whole.to_str())
        self._short.enable_truncation(spec.max_length)

    def identity(self) -> str:
        """A hash of all that decides how an example becomes ids: tokenizer, task and options."""
        options = [self.task, self._spec.labels == "regression", self._spec.max_length, self._spec.overlong]
        digest = hashlib.blake2b(self._whole.to_str().encode(), digest_size=16)
        digest.update(json.dumps(options).encode())
        return digest.hexdigest()

    def encode(self, examples: Sequence[Example]) -> Iterator[LabeledRow | BadRow]:
        """One result an example, in order."""
        texts = [text for example in examples for text in self._texts(example)]
        # In one call, because the tokenizer spreads a batch over the cores.
        encodings = iter(self._whole.encode_batch(texts))
        for example in examples:
            parts = [next(encodings) for _ in self._texts(example)]
            try:
                row = self._row(example, parts)
                if row.length > self._spec.max_length and self._spec.overlong == "truncate":
                    short = self._short.encode_batch(self._texts(example))
                    row = row._replace(truncated=self._row(example, short))
                yield row
            except BadRow as bad:
                yield bad

    def _texts(self, example: Example) -> list[str | tuple[str, str]]:
        """What is tokenised, each with the special tokens that the tokenizer gives it."""
        match example:
            case ClassificationExample(text, pair, _):
                return [(text, pair) if pair is not None else text]
            case TaggingExample(words, _):
                return [" ".join(words)]
            case PromptCompletion(prompt, completion):
                return [prompt, completion]
            case _:
                return []

    def _row(self, example: Example, parts: list[Encoding]) -> LabeledRow:
        match example:
            case ClassificationExample(_, _, label):
                return self._classified(label, parts[0])
            case TaggingExample():
                return _tagged(example, parts[0])
            case PromptCompletion():
                source, target = (np.array(part.ids, dtype=np.int32) for part in parts)
                return LabeledRow(source, len(target), target.astype(np.float64))
            case _:
                raise BadRow("lists of messages", "is a conversation; task seq2seq-lm reads texts", field="prompt")

    def _classified(self, label: Label | list[Label], encoding: Encoding) -> LabeledRow:
        ids = np.array(encoding.ids, dtype=np.int32)
        second = sum(encoding.type_ids)
        if self._spec.labels == "regression" or _is_measure(label):
            values = [_number(each) for each in (label if isinstance(label, list) else [label])]
            return LabeledRow(ids, 1, np.array(values, np.float64), pair_tokens=second)
        several = isinstance(label, list)
        given = label if isinstance(label, list) else [label]
        names = tuple(label_key(each) for each in given)
        if len(set(names)) < len(names):
            twice = next(name for index, name in enumerate(names) if name in names[:index])
            raise BadRow("a label twice", f"has {twice} twice: list those that apply, each once", field="label")
        return LabeledRow(
            ids, 1, label_keys=names, multi_label=several, numbered=all(map(_is_whole, given)), pair_tokens=second
        )


def _tagged(example: TaggingExample, encoding: Encoding) -> LabeledRow:
    """The first token of each word has the word's label, the others have none.

    Raises:
        BadRow: a word of which no token is left, other than by a cut.
    """
    ids = np.array(encoding.ids, dtype=np.int32)
    spelled: list[str | None] = [None] * len(ids)
    tokens = [(span, index) for index, span in enumerate(encoding.offsets) if not encoding.special_tokens_mask[index]]
    start = at = 0
    for number, (word, tag) in enumerate(zip(example.words, example.tags, strict=True)):
        stop = start + len(word)
        # A token may begin with the blank before its word.
        while at < len(tokens) and tokens[at][0][1] <= start:
            at += 1
        if at == len(tokens):
            if encoding.overflowing:
                break
            raise BadRow("word without token", "the tokenizer makes no token of it", field=f"tokens[{number}]")
        if tokens[at][0][0] >= stop or spelled[tokens[at][1]] is not None:
            raise BadRow("word without token", "no token begins in it", field=f"tokens[{number}]")
        spelled[tokens[at][1]] = label_key(tag)
        start = stop + 1
    count = sum(each is not None for each in spelled)
    return LabeledRow(ids, count, label_keys=tuple(spelled), numbered=all(map(_is_whole, example.tags)))


def label_key(label: Label) -> str:
    """A label as the table knows it: 1 and "1" are the same."""
    return str(label).lower() if isinstance(label, bool) else str(label)


def _is_whole(label: Label) -> bool:
    if isinstance(label, str):
        return label.isdecimal() and str(int(label)) == label  # 01 is a name
    return isinstance(label, int) and not isinstance(label, bool)


def _is_measure(label: Label | list[Label]) -> bool:
    """JSON writes a measured number with a point, and a class without."""
    return all(isinstance(each, float) for each in (label or [""] if isinstance(label, list) else [label]))


def _number(label: Label) -> float:
    try:
        if isinstance(label, bool):
            raise ValueError
        value = float(label)
        if not math.isfinite(value):
            raise ValueError
        return value
    except ValueError:
        raise BadRow("no number", f"is {label!r}, where a regression has numbers", field="label") from None
