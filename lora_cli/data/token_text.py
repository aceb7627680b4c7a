"""Detokenize token by token for display: the text of each token, with whole characters where tokens split them (UTF-8).

Decoding one token alone shows a replacement character for every part of a character, and loses a leading space.
"""

import re
from collections.abc import Sequence

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # decoders write it in place of bytes that are not UTF-8
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's byte fallback


def _byte_of_letter() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for (`bytes_to_unicode` of GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_LETTER = _byte_of_letter()


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text of each token; joined, they are the text of all.

    A character that several tokens make up is in the text of the first of them, the others have less text or none.
    Bytes that are not UTF-8, as in a text that was cut inside a character, are escaped: `\\xe4`.

    Args:
        ids: tokens of a row or a part of it, special tokens included.
        tokenizer: of these tokens.
    """
    parts = []
    known: dict[tuple[int | None, int], bytes] = {}
    before = None  # the last token that is text by itself
    for id_ in ids:
        if (before, id_) not in known:
            known[before, id_] = _token_bytes(before, id_, tokenizer)
        parts.append(known[before, id_])
        if REPLACEMENT not in _decode([id_], tokenizer):
            before = id_
    texts, start, end = [], 0, 0
    # One surrogate stands for each byte that is not UTF-8.
    characters = b"".join(parts).decode("utf-8", errors="surrogateescape")
    position, sizes = 0, [_size(character) for character in characters]
    for part in parts:
        end += len(part)
        first = position
        while position < len(characters) and start < end:
            start += sizes[position]
            position += 1
        texts.append("".join(map(_shown, characters[first:position])))
    return texts


def _token_bytes(before: int | None, id_: int, tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Return the UTF-8 bytes of a token behind the token `before`."""
    alone = _decode([id_], tokenizer)
    if REPLACEMENT in alone:
        piece: str | bytes | None = tokenizer.convert_ids_to_tokens(id_)
        if isinstance(piece, bytes):  # of tokenizers with their own code
            return piece
        if piece and (byte := BYTE_TOKEN.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        if piece and BYTE_OF_LETTER.keys() >= set(piece):
            return bytes(BYTE_OF_LETTER[letter] for letter in piece)
        return alone.encode()
    if before is None:
        return alone.encode()
    # Behind another token, because decoders omit the space before the first word of a text.
    left = _decode([before], tokenizer)
    both = _decode([before, id_], tokenizer)
    return (both[len(left) :] if both.startswith(left) else alone).encode()


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _size(character: str) -> int:
    return 1 if "\udc80" <= character <= "\udcff" else len(character.encode())


def _shown(character: str) -> str:
    return f"\\x{ord(character) - 0xDC00:02x}" if "\udc80" <= character <= "\udcff" else character
