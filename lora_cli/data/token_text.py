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
    alone = {id_: _decode([id_], tokenizer) for id_ in set(ids)}
    left: tuple[int, str] | None = None  # the last token that is text by itself, and its text
    known: dict[tuple[tuple[int, str] | None, int], bytes] = {}
    parts = []
    for id_ in ids:
        if (left, id_) not in known:
            known[left, id_] = _token_bytes(left, id_, alone[id_], tokenizer)
        parts.append(known[left, id_])
        if REPLACEMENT not in alone[id_]:
            left = (id_, alone[id_])
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


def _token_bytes(left: tuple[int, str] | None, id_: int, alone: str, tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Return the UTF-8 bytes of a token, whose text is `alone`, behind the token `left` with its text."""
    if REPLACEMENT in alone:
        piece: str | bytes | None = tokenizer.convert_ids_to_tokens(id_)
        if isinstance(piece, bytes):  # of tokenizers with their own code
            return piece
        if piece and (byte := BYTE_TOKEN.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        if piece and BYTE_OF_LETTER.keys() >= set(piece):
            return bytes(BYTE_OF_LETTER[letter] for letter in piece)
    elif left is not None:
        # Behind another token, because decoders omit the space before the first word of a text.
        before, text = left
        both = _decode([before, id_], tokenizer)
        return (both[len(text) :] if both.startswith(text) else alone).encode()
    return alone.encode()


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _size(character: str) -> int:
    return 1 if "\udc80" <= character <= "\udcff" else len(character.encode())


def _shown(character: str) -> str:
    return f"\\x{ord(character) - 0xDC00:02x}" if "\udc80" <= character <= "\udcff" else character
