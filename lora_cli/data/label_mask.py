"""The label mask: which tokens of a row carry loss (the others have the label -100), as spans of tokens. No models."""

from collections.abc import Sequence, Set

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding

from lora_cli.data.assistant_spans import Span

SLOW_SEARCH = 10_000_000  # comparisons of a search token by token: some milliseconds
IGNORE_INDEX = -100  # label of a token without loss, as in torch and transformers

Ints = npt.NDArray[np.int32]


def spans_of_labels(labels: Sequence[int]) -> list[Span]:
    """Return the spans of the tokens whose label is not -100."""
    edges = np.flatnonzero(np.diff([False, *(label != IGNORE_INDEX for label in labels), False]))
    return [Span(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def labels_of_spans(ids: Ints, spans: npt.NDArray[np.int32]) -> Ints:
    """Return labels, int32 [tokens]: the token's id inside the spans, else -100; not shifted.

    `ids` is int32 [tokens], `spans` int32 [spans, 2] with the first token of each span and the token after its last.
    """
    labels = np.full_like(ids, IGNORE_INDEX)
    for start, stop in spans:
        labels[start:stop] = ids[start:stop]
    return labels


def predicted_spans(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Return the spans without the row's first token, which no earlier token predicts; empty spans are dropped."""
    return tuple(Span(max(1, start), stop) for start, stop in spans if stop > max(1, start))


def skip_stripped(encoding: Encoding, borders: Sequence[int], text: str, rstrip: Set[int]) -> list[int]:
    """Return character borders, each moved behind the white space that a control token before it swallows.

    Args:
        encoding: of `text`, with offsets that include white space.
        borders: positions in `text`, in characters.
        text: the encoded text.
        rstrip: ids of the added tokens with the flag `rstrip`, which swallow the white space behind them.
    """
    moved = []
    for border, token in zip(borders, _tokens_at(encoding, borders) if rstrip else [None] * len(borders), strict=True):
        if border < len(text) and token is not None and encoding.ids[token] in rstrip:
            start, stop = encoding.offsets[token]
            border = stop if start < border and text[border:stop].isspace() else border
        moved.append(border)
    return moved


def token_positions(encoding: Encoding, borders: Sequence[int], *, length: int) -> list[int] | None:
    """Return the positions of the tokens that start at the character borders, None if a token crosses a border.

    `length` is that of the text, in characters: the border at its end is the end of the last token.
    """
    positions = []
    offsets = encoding.offsets
    for border, token in zip(borders, _tokens_at(encoding, borders), strict=True):
        if border == length:
            positions.append(len(encoding.ids))
            continue
        if token is None or offsets[token][0] != border:
            return None
        # If several byte tokens form one character, all have its offsets: the previous token must end at the border.
        if token > 0 and offsets[token - 1][1] > border:
            return None
        positions.append(token)
    return positions


def _tokens_at(encoding: Encoding, borders: Sequence[int]) -> list[int | None]:
    """Return the first token that contains each character, as `Encoding.char_to_token` does: it searches all tokens."""
    if len(borders) * len(encoding.ids) > SLOW_SEARCH:
        starts, stops = np.array(encoding.offsets, dtype=np.int64).T
        if (np.diff(starts) >= 0).all() and (np.diff(stops) >= 0).all():
            found = np.searchsorted(stops, borders, side="right")
            tokens = zip(found.tolist(), borders, strict=True)
            return [token if token < len(starts) and starts[token] <= border else None for token, border in tokens]
    return [encoding.char_to_token(border) for border in borders]
