"""What an unquoted YAML scalar means: YAML 1.2's core, less the spellings people misread. No torch."""

import re

Scalar = str | int | float | bool | None

# No leading zeros, hex, octal, underscores, sexagesimals or dates: these stay the words that they are, so
# none of them can turn into a number that nobody wrote. 30 digits are more than any field takes, and Python
# refuses to read some thousands of them.
INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,29})")
FLOAT = re.compile(
    r"""[-+]? (
        (0|[1-9][0-9]{0,29}) ( \.[0-9]* ([eE][-+]?[0-9]{1,9})? | [eE][-+]?[0-9]{1,9} )
        | \.[0-9]+ ([eE][-+]?[0-9]{1,9})?
    )""",
    re.VERBOSE,
)
WORDS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


def parse_scalar(text: str) -> Scalar:
    """The value of an unquoted scalar; what is no number, boolean or null stays text."""
    if text in WORDS:
        return WORDS[text]
    if INT.fullmatch(text):
        return int(text)
    if FLOAT.fullmatch(text):
        return float(text)
    return text
