"""Tokenize rows of seq-cls, token-cls and seq2seq-lm, with their labels: a class, a class per word, or target ids.

Texts get the tokenizer's own special tokens, the same as when the model is used. No models.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from lora_cli.data.encode import CausalLMEncoder, EncodedRow, require_fast_tokenizer
from lora_cli.data.formats import ClassificationExample, Example, Label, PromptCompletion, TaggingExample
from lora_cli.data.label_mask import Ints
from lora_cli.data.records import BadRow
from lora_cli.data.tokenization import Text, Tokenization
from lora_cli.recipe.schema import DataSpec
from lora_cli.recipe.tasks import TaskName

LabelValues = npt.NDArray[np.float64]
NO_VALUES: LabelValues = np.zeros(0, np.float64)


class LabeledRow(NamedTuple):
    """One tokenized row with labels, for the cache."""

    ids: Ints  # int32 [tokens]
    supervised: int  # number of labels or target tokens
    values: LabelValues = NO_VALUES  # float64: regression values [values], or target ids [target tokens]
    # Labels of the row or of each token, None for a token without label. `LabelTable` maps them to numbers.
    label_keys: tuple[str | None, ...] = ()
    multi_label: bool = False  # the row has a list of labels
    numbered: bool = False  # its labels are integers
    pair_tokens: int = 0  # tokens at its end that belong to a second text
    truncated: "LabeledRow | None" = None  # if it is too long: the row that data.overlong: truncate keeps

    @property
    def length(self) -> int:
        """Tokens of the source or of the target, whichever is longer."""
        return len(self.ids) if self.label_keys or len(self.values) == 1 else max(len(self.ids), len(self.values))

    @property
    def key(self) -> int:
        """A 64-bit hash of ids and labels, independent of the file that contains the row."""
        digest = hashlib.blake2b(self.ids.astype("<i4").tobytes(), digest_size=8)
        # The spelling of labels, because their numbers depend on the rows before.
        digest.update(repr(self.label_keys).encode() + self.values.astype("<f8").tobytes())
        return int.from_bytes(digest.digest(), "little")


class RowEncoder(Protocol):
    """Encodes the rows of a task."""

    task: TaskName
    has_template: bool  # whether there is a chat template

    def template_reads(self, key: str) -> bool: ...
    def identity(self) -> str: ...
    def start(self, examples: Sequence[Example]) -> Tokenization[Any]: ...
    def encode(
        self, examples: Sequence[Example], started: Tokenization[Any] | None = None
    ) -> Iterator[EncodedRow | LabeledRow | BadRow]: ...


def make_encoder(
    task: TaskName, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, placeholders: Sequence[int] = ()
) -> RowEncoder:
    """Return the encoder for the rows of a task; rows of causal-lm must not contain the token ids `placeholders`.

    Raises:
        LoraError: the tokenizer is not a fast tokenizer.
    """
    if task == "causal-lm":
        return CausalLMEncoder(spec, tokenizer, placeholders)
    return LabeledRowEncoder(task, spec, tokenizer)


class LabeledRowEncoder:
    """Encodes examples with labels, with a tokenizer and the options of a recipe."""

    has_template = False

    def __init__(self, task: TaskName, spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> None:
        require_fast_tokenizer(tokenizer)
        self.task = task
        self._spec = spec
        self._full = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._full.no_truncation()
        self._full.no_padding()
        self._truncating = Tokenizer.from_str(self._full.to_str())
        self._truncating.enable_truncation(spec.max_length)

    def identity(self) -> str:
        """Return a hash of everything that determines ids and labels: tokenizer, task, options."""
        options = [self.task, self._spec.labels == "regression", self._spec.max_length, self._spec.overlong]
        digest = hashlib.blake2b(self._full.to_str().encode(), digest_size=16)
        digest.update(json.dumps(options).encode())
        return digest.hexdigest()

    def template_reads(self, key: str) -> bool:
        """Return whether a chat template reads a key of messages: there is none."""
        return False

    def start(self, examples: Sequence[Example]) -> Tokenization[Example]:
        """Return the examples with their texts, which are not tokenized yet."""

        def texts(rows: Sequence[Example]) -> list[Text]:
            return [text for row in rows for text in self._texts(row)]

        return Tokenization(lambda: examples, texts, tokenizer=self._full, add_special_tokens=True)

    def encode(
        self, examples: Sequence[Example], started: Tokenization[Example] | None = None
    ) -> Iterator[LabeledRow | BadRow]:
        """Yield one result for each example, in order; `started` is what `start` returned, if it was called."""
        encodings = iter((started or self.start(examples)).encodings())
        for example in examples:
            row_encodings = [next(encodings) for _ in self._texts(example)]
            try:
                row = self._to_row(example, row_encodings)
                if row.length > self._spec.max_length and self._spec.overlong == "truncate":
                    truncated = self._truncating.encode_batch(self._texts(example))
                    row = row._replace(truncated=self._to_row(example, truncated))
                yield row
            except BadRow as bad:
                yield bad

    def _texts(self, example: Example) -> list[Text]:
        """Return the texts to tokenize; the tokenizer adds its special tokens to each."""
        match example:
            case ClassificationExample(text, pair, _):
                return [(text, pair) if pair is not None else text]
            case TaggingExample(words, _):
                return [" ".join(words)]
            case PromptCompletion(prompt, completion):
                return [prompt, completion]
            case _:
                return []

    def _to_row(self, example: Example, encodings: list[Encoding]) -> LabeledRow:
        match example:
            case ClassificationExample(_, _, label):
                return self._classification_row(label, encodings[0])
            case TaggingExample():
                return _tagging_row(example, encodings[0])
            case PromptCompletion():
                source, target = (np.array(encoding.ids, dtype=np.int32) for encoding in encodings)
                return LabeledRow(source, len(target), target.astype(np.float64))
            case _:
                problem = "is a conversation, but task seq2seq-lm needs texts"
                raise BadRow("conversation instead of text", problem, field="prompt")

    def _classification_row(self, label: Label | list[Label], encoding: Encoding) -> LabeledRow:
        ids = np.array(encoding.ids, dtype=np.int32)
        pair_tokens = sum(encoding.type_ids)
        if self._spec.labels == "regression" or _is_regression_value(label):
            values = [_to_float(each) for each in (label if isinstance(label, list) else [label])]
            return LabeledRow(ids, 1, np.array(values, np.float64), pair_tokens=pair_tokens)
        multi_label = isinstance(label, list)
        labels = label if isinstance(label, list) else [label]
        keys = tuple(label_key(each) for each in labels)
        if len(set(keys)) < len(keys):
            repeated = next(key for index, key in enumerate(keys) if key in keys[:index])
            raise BadRow("repeated label", f"has {repeated} twice: list each label once", field="label")
        numbered = all(map(_is_integer, labels))
        return LabeledRow(ids, 1, label_keys=keys, multi_label=multi_label, numbered=numbered, pair_tokens=pair_tokens)


def _tagging_row(example: TaggingExample, encoding: Encoding) -> LabeledRow:
    """Give the first token of each word the word's label, and the other tokens none.

    Raises:
        BadRow: no token starts in a word, although the row is not truncated.
    """
    ids = np.array(encoding.ids, dtype=np.int32)
    keys: list[str | None] = [None] * len(ids)
    tokens = [(span, index) for index, span in enumerate(encoding.offsets) if not encoding.special_tokens_mask[index]]
    start = position = 0  # in characters, in tokens
    for number, (word, tag) in enumerate(zip(example.words, example.tags, strict=True)):
        stop = start + len(word)
        # A token may begin with the space before its word.
        while position < len(tokens) and tokens[position][0][1] <= start:
            position += 1
        if position == len(tokens):
            if encoding.overflowing:
                break
            raise BadRow("word without token", "the tokenizer returns no token for it", field=f"tokens[{number}]")
        if tokens[position][0][0] >= stop or keys[tokens[position][1]] is not None:
            raise BadRow("word without token", "no token begins in it", field=f"tokens[{number}]")
        keys[tokens[position][1]] = label_key(tag)
        start = stop + 1
    count = sum(key is not None for key in keys)
    return LabeledRow(ids, count, label_keys=tuple(keys), numbered=all(map(_is_integer, example.tags)))


def label_key(label: Label) -> str:
    """Return the spelling under which a label is counted: 1 and "1" are the same label."""
    return str(label).lower() if isinstance(label, bool) else str(label)


def _is_integer(label: Label) -> bool:
    if isinstance(label, str):
        return label.isdecimal() and str(int(label)) == label  # 01 is a name
    return isinstance(label, int) and not isinstance(label, bool)


def _is_regression_value(label: Label | list[Label]) -> bool:
    """Return whether a label is a number with a decimal point in JSON, or a list of these."""
    return all(isinstance(each, float) for each in (label or [""] if isinstance(label, list) else [label]))


def _to_float(label: Label) -> float:
    try:
        if isinstance(label, bool):
            raise ValueError
        value = float(label)
        if not math.isfinite(value):
            raise ValueError
        return value
    except ValueError:
        raise BadRow("not a number", f"is {label!r}, but a regression needs numbers", field="label") from None
