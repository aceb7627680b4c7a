"""Tokenize the texts of many rows in a thread, while the caller does other work. No models."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from functools import cached_property
from typing import Generic, TypeVar

from tokenizers import Encoding, Tokenizer

Row = TypeVar("Row")
Text = str | tuple[str, str]  # one text, or a pair


class Tokenization(Generic[Row]):
    """Rows and the encodings of their texts.

    A class, because the caller does other work while the rows are rendered, and while their texts are tokenized.
    """

    def __init__(
        self,
        rows: Callable[[], Sequence[Row]],
        texts: Callable[[Sequence[Row]], Sequence[Text]],
        *,
        tokenizer: Tokenizer,
        add_special_tokens: bool,
    ) -> None:
        """`rows` waits for the rows, and is called once; `texts` returns their texts, as many as there are for each."""
        self._wait, self._texts = rows, texts
        self._tokenizer, self._add_special_tokens = tokenizer, add_special_tokens
        self._started: Future[list[Encoding]] | None = None

    @cached_property
    def rows(self) -> Sequence[Row]:
        """The rows; the first access waits for them.

        Raises:
            LoraError: the rows cannot be rendered.
        """
        return self._wait()

    def start(self, thread: Executor) -> None:
        """Wait for the rows, and start to tokenize their texts in `thread`; the tokenizer releases Python's lock."""
        self._started = thread.submit(self._tokenize, self._texts(self.rows))

    def encodings(self) -> list[Encoding]:
        """Return the encoding of each text, in order."""
        return self._started.result() if self._started else self._tokenize(self._texts(self.rows))

    def _tokenize(self, texts: Sequence[Text]) -> list[Encoding]:
        # In one call, because the tokenizer distributes a batch over the CPU cores.
        found: list[Encoding] = self._tokenizer.encode_batch(texts, add_special_tokens=self._add_special_tokens)
        return found
