"""Split text of any script into words: characters where a script has no spaces (Chinese, Japanese, Thai and others)."""

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

ASCII_WORD = re.compile(r"[a-z0-9]+")
# Scripts that put no space between words, by the first word of their characters' Unicode names.
SCRIPTS_WITHOUT_SPACES = {
    "CJK": "Han",
    "IDEOGRAPHIC": "Han",
    "BOPOMOFO": "Han",
    "HIRAGANA": "Kana",
    "KATAKANA": "Kana",
    "THAI": "Thai",
    "LAO": "Lao",
    "KHMER": "Khmer",
    "MYANMAR": "Myanmar",
    "TIBETAN": "Tibetan",
}
WORD_BREAK = "\u200b"  # zero width space; the other format characters (joiners, soft hyphens) are inside words


@lru_cache(maxsize=1 << 16)
def script_without_spaces(character: str) -> str | None:
    """Return the script of a letter, `Han` or `Thai`, if its script has no spaces between words; else None."""
    if unicodedata.category(character)[0] not in "LN":
        return None
    parts = re.split("[ -]", unicodedata.name(character, ""))
    return SCRIPTS_WITHOUT_SPACES.get(parts[1] if parts[0] == "HALFWIDTH" and len(parts) > 1 else parts[0])


def scripts_without_spaces(texts: Iterable[str]) -> list[str]:
    """Return the names of the scripts without spaces that occur in `texts`, sorted."""
    characters = set().union(*(text for text in texts if not text.isascii()))
    return sorted({script for character in characters if (script := script_without_spaces(character))})


def split_words(text: str) -> list[str]:
    """Return the words of `text` in lower case; each character of a script without spaces is a word of its own.

    Words are letters and decimal digits with their combining marks. Of ASCII text they are those of rouge-score's own
    tokenizer, which drops every other letter.
    """
    lowered = unicodedata.normalize("NFC", text.lower())
    if lowered.isascii():
        return ASCII_WORD.findall(lowered)
    words = [""]
    for character in lowered:
        category = unicodedata.category(character)
        if category[0] == "M":
            words[-1] += character if words[-1] else ""
        elif category[0] == "L" or category == "Nd" or script_without_spaces(character):
            if script_without_spaces(character) or (words[-1] and script_without_spaces(words[-1][0])):
                words.append(character)
            else:
                words[-1] += character
        elif category != "Cf" or character == WORD_BREAK:
            words.append("")
    return [word for word in words if word]


def separate_characters(text: str) -> str:
    """Return `text` with spaces around each character of a script without spaces, and around non-ASCII punctuation.

    Combining marks stay at their character.
    """
    parts: list[str] = []
    for character in unicodedata.normalize("NFC", text):
        category = unicodedata.category(character)
        alone = script_without_spaces(character) or (category[0] == "P" and not character.isascii())
        if category[0] == "M" and parts and parts[-1] == " ":
            parts.insert(-1, character)
        else:
            parts += [" ", character, " "] if alone else [character]
    return "".join(parts)
