"""Split tokenized documents that are longer than data.max_length into chunks (data.overlong: split). No models."""

import numpy as np

from lora_cli.data.assistant_spans import Span
from lora_cli.data.encode import EncodedRow
from lora_cli.errors import LoraError


def split_document(row: EncodedRow, *, length: int, stride: int) -> list[EncodedRow]:
    """Return the chunks of a document: each token that carries loss in the document does so in exactly one chunk.

    Every chunk starts with the special tokens that the document starts with (BOS), because a model expects them at the
    start of its input. Then it repeats the last `stride` tokens of the chunk before it as context, without loss: at
    least one token if there is no BOS, because no token predicts the first one. Only the last chunk ends with EOS.

    Args:
        row: the encoded document.
        length: tokens of a chunk, at most.
        stride: tokens of overlap.

    Raises:
        LoraError: BOS and overlap fill the chunk.
    """
    prefix = row.ids[: row.prefix]
    overlap = max(stride, 0 if row.prefix else 1)
    room = length - row.prefix  # for tokens of the document
    if overlap >= room:
        raise LoraError(
            f"data.stride: {stride:,} tokens of overlap leave no room for new tokens in data.max_length, {length:,}",
            hint="lower data.stride, or raise data.max_length",
        )
    ids = row.ids[:length]
    chunks = [row._replace(ids=ids, supervised_spans=_within(row, 0, length, shift=0))]
    done = length
    while done < row.length:
        # EOS alone would teach that a text ends after BOS: it gets all the context that fits.
        start = done - (overlap if done + 1 < row.length else room - 1)
        stop = min(start + room, row.length)
        spans = _within(row, done, stop, shift=row.prefix - start)
        chunks.append(row._replace(ids=np.concatenate([prefix, row.ids[start:stop]]), supervised_spans=spans))
        done = stop
    return [chunk for chunk in chunks if chunk.supervised]


def _within(row: EncodedRow, start: int, stop: int, *, shift: int) -> tuple[Span, ...]:
    """Return the supervised spans of tokens `start` to `stop`, moved by `shift`."""
    clipped = [Span(max(start, a) + shift, min(stop, b) + shift) for a, b in row.supervised_spans]
    return tuple(span for span in clipped if span.start < span.stop)
