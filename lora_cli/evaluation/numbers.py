"""Read the last number of a text for the metric numeric_match: separators, exponents, percent, fractions, ranges.

How a number is read:

- `1,000.50` and `1.000,50`: of two kinds of separators, the last one is the decimal separator.
- `1,000`: commas before groups of three digits separate thousands. `1,5` and `0,001` have a decimal comma.
- `1.000` is 1: a single point is the decimal point. `1.000.000` is a million.
- Spaces, apostrophes and underscores between groups of three digits separate thousands.
- `3-4` is a range, and equals only the range from 3 to 4; `2024-01-05` and `5/1/2024` are dates.
- A minus sign follows a space, a bracket or an operator: 7-4 and GPT-4 have none.
- `1e5`, `2 x 10^5`, `2·10⁵`, `1/2`, `1 1/2`, `½` and `\\frac{1}{2}` are numbers.
- `50%` equals 50% and 50, and also 0.5.
- Digits of every script, full width included.
"""

import re
import unicodedata
from decimal import Decimal
from typing import NamedTuple

MINUS = "-"
MINUS_SIGNS = "\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d"
SPACES = "\u00a0\u2007\u2009\u202f"
CHARACTERS = {
    **dict.fromkeys(MINUS_SIGNS, MINUS),
    **dict.fromkeys(SPACES, " "),
    "\u066b": ".",  # Arabic decimal separator
    "\u066c": ",",  # Arabic thousands separator
    "\u066a": "%",  # Arabic percent sign
    "\u2044": "/",
    "\u2019": "'",
    "\u02bc": "'",
    "\u00d7": "x",
    "\u00b7": "x",
    "\u22c5": "x",
    "*": "x",
}
SUPERSCRIPTS = str.maketrans("\u207b\u207a\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079", "-+0123456789")
SUPERSCRIPT = re.compile("[\u207b\u207a]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
LATEX_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
LATEX_SEPARATOR = re.compile(r"\{,\}|\\,|\\!")

# Alternatives in this order; each ends where no further digit or group follows.
NUMERAL = "|".join(
    (
        r"[1-9]\d{0,2}(?P<group>[ '_])\d{3}(?:(?P=group)\d{3})*(?:[.,]\d+)?(?!\d)",
        r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?(?!\d|,\d)",
        r"[1-9]\d?(?:,\d{2})+,\d{3}(?:\.\d+)?(?!\d|,\d)",  # Indian groups: 12,34,567
        r"[1-9]\d{0,2}(?:\.\d{3})+,\d+(?![\d,])",
        r"[1-9]\d{0,2}(?:\.\d{3}){2,}(?![\d.]\d?)",
        r"(?<![\d,])\d+,\d+(?![\d]|,\d)",
        r"\d+\.\d+",
        r"(?<![\w.)])\.\d+",
        r"\d+",
    )
)
CURRENCY = "$\u00a3\u20ac\u00a5\u20b9"
NUMBER = re.compile(
    # A sign is not the hyphen of GPT-4 or of 7-4.
    rf"(?P<sign>(?<![\w)\]}}%.])[-+])?(?:[{CURRENCY}][ ]?)?(?P<inner_sign>(?<=[{CURRENCY}])-)?"
    rf"(?:(?P<date>\d+(?:/\d+){{2,}})|(?P<numeral>{NUMERAL}))"
    r"(?P<exponent>[eE][-+]?\d+(?!\w))?"
    r"(?:[ ]?x[ ]?10\^\{?(?P<power>[-+]?\d+)\}?)?"
    r"(?:(?P<mixed>[ ]\d+)?/(?P<divisor>\d+)(?!\d))?"
    r"(?P<percent>[ ]?%|[ ]percent\b)?"
)
RANGE = re.compile(r"-(?=\d)")
MAX_EXPONENT = 9999  # larger ones are equal to it


class Number(NamedTuple):
    """One number, or the bounds of a range."""

    values: tuple[Decimal, ...]
    is_percent: bool = False


def last_number(text: str) -> Number | None:
    """Return the last number of `text`, None without one; text before `####` is ignored.

    The mark is GSM8K's (Cobbe et al., arXiv:2110.14168).
    """
    plain = _plain(text.rpartition("####")[2])
    position = 0
    chains: list[list[re.Match[str]]] = []  # a range is a chain of several
    while match := NUMBER.search(plain, position):
        if chains and position == match.start() and plain[position - 1] == MINUS:
            chains[-1].append(match)
        else:
            chains.append([match])
        position = match.end() + (RANGE.match(plain, match.end()) is not None)
    if not chains:
        return None
    last = chains[-1]
    values = [value for match in last for value in _values(match)]
    return Number(tuple(values), is_percent=last[-1]["percent"] is not None)


def same_number(left: Number, right: Number) -> bool:
    """Return whether two numbers are equal; a percentage also equals its value without the sign: 50% = 50 = 0.5."""
    if left.values == right.values:
        return True
    if left.is_percent == right.is_percent:
        return False
    percent, plain = (left, right) if left.is_percent else (right, left)
    return tuple(value / 100 for value in percent.values) == plain.values


def _plain(text: str) -> str:
    """Return `text` with ASCII digits and separators, and with fractions and powers written out."""
    text = LATEX_SEPARATOR.sub(lambda match: "," if match[0] == "{,}" else "", LATEX_FRACTION.sub(r" \1/\2", text))
    text = SUPERSCRIPT.sub(
        # An exponent only after the base 10; other superscripts (m², footnotes) are no part of a number.
        lambda match: f"^{match[0].translate(SUPERSCRIPTS)}" if _follows_ten(text, match.start()) else " ",
        text,
    )
    return "".join(map(_plain_character, text))


def _follows_ten(text: str, position: int) -> bool:
    return re.search(r"(?<!\d)10$", text[max(0, position - 3) : position]) is not None


def _plain_character(character: str) -> str:
    if character.isascii() and character != "*":
        return character
    if character in CHARACTERS:
        return CHARACTERS[character]
    if (digit := unicodedata.decimal(character, None)) is not None:
        return str(digit)
    compatible = unicodedata.normalize("NFKC", character)
    if "\u2044" in compatible:  # a fraction in one character
        return f" {compatible.replace(chr(0x2044), '/')}"
    return compatible if compatible.isascii() and unicodedata.east_asian_width(character) == "F" else character


def _values(match: re.Match[str]) -> list[Decimal]:
    """Return the value of a number, or the parts of a date."""
    if match["date"]:
        return [Decimal(part) for part in match["date"].split("/")]
    numeral = re.sub("[ '_]", "", match["numeral"])
    comma, point = numeral.rfind(","), numeral.rfind(".")
    has_groups = match["group"] is not None
    if comma > point and (point >= 0 or has_groups or not re.fullmatch(r"[1-9]\d{0,2}(,\d{2,3})*,\d{3}", numeral)):
        numeral = numeral.replace(".", "").replace(",", ".")  # a decimal comma
    elif numeral.count(".") > 1:
        numeral = numeral.replace(".", "")
    exponent = int((match["exponent"] or "e0")[1:][:8]) + int((match["power"] or "0")[:8])
    exponent = max(-MAX_EXPONENT, min(MAX_EXPONENT, exponent))
    value = Decimal(f"{numeral.replace(',', '')}e{exponent}")
    divisor = Decimal(match["divisor"] or 0)
    if divisor:
        value = value + Decimal(match["mixed"].strip()) / divisor if match["mixed"] else value / divisor
    # `copy_negate` does not round, as a minus sign would.
    return [value.copy_negate() if MINUS in (match["sign"], match["inner_sign"]) else value]
