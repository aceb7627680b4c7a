"""Dataset of encoded rows (input_ids, labels): the selected rows of encoded files, in a fixed order. No models."""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from lora_cli.data.encoded_rows import EncodedRows, Row
from lora_cli.data.label_mask import IGNORE_INDEX
from lora_cli.data.token_text import token_texts


class EncodedDataset:
    """The train or eval split: selected rows of encoded files in a fixed order, file by file. Immutable.

    `lengths` (int32), `supervised` (int32) and `keys` (uint64) are [rows], as in `EncodedRows`.
    """

    def __init__(
        self,
        parts: Sequence[tuple[EncodedRows, npt.NDArray[np.int64]]],
        label_mappers: Sequence[Callable[[Row], Row]] = (),
    ) -> None:
        """Select rows of encoded files.

        Args:
            parts: files, each with the int64 [rows] indices of its selected rows.
            label_mappers: for each part, a function that replaces label numbers of the source by those of the run.
        """
        self._parts = [file for file, _ in parts]
        self._label_mappers = list(label_mappers)
        selected = [index for _, index in parts]
        self._starts = np.cumsum([0, *(len(index) for index in selected)])
        self._index = np.concatenate([np.zeros(0, np.int64), *selected])
        empty = np.zeros(0, np.int32)
        self.lengths: npt.NDArray[np.int32] = np.concatenate([empty, *(file.lengths[i] for file, i in parts)])
        self.supervised: npt.NDArray[np.int32] = np.concatenate([empty, *(file.supervised[i] for file, i in parts)])
        self.keys: npt.NDArray[np.uint64] = np.concatenate(
            [empty.astype(np.uint64), *(file.keys[i] for file, i in parts)]
        )
        for array in (self._index, self.lengths, self.supervised, self.keys):
            array.flags.writeable = False

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        position = index % len(self)
        part = int(np.searchsorted(self._starts, position, side="right")) - 1
        row = self._parts[part][int(self._index[position])]
        return self._label_mappers[part](row) if self._label_mappers else row

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    @property
    def fingerprint(self) -> str:
        """A hash of all ids and labels in order."""
        return hashlib.blake2b(self.keys.astype("<u8").tobytes(), digest_size=16).hexdigest()


def show_mask(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return every token of a row as text with whether it carries loss (the label mask), for `lora check` to color."""
    texts = token_texts(row.input_ids.tolist(), tokenizer)
    return [(text, label != IGNORE_INDEX) for text, label in zip(texts, row.labels.tolist(), strict=True)]
