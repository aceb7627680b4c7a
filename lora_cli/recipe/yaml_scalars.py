"""Parse unquoted YAML scalars: the YAML 1.2 core schema without the spellings that are misread. No torch."""

import re

Scalar = str | int | float | bool | None

# Leading zeros, hexadecimal, octal, underscores, base 60 and dates are not numbers here but strings: YAML versions
# read them differently. 30 digits are more than any field accepts, and int() raises on thousands of digits.
INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,29})")
FLOAT = re.compile(
    r"""[-+]? (
        (0|[1-9][0-9]{0,29}) ( \.[0-9]* ([eE][-+]?[0-9]{1,9})? | [eE][-+]?[0-9]{1,9} )
        | \.[0-9]+ ([eE][-+]?[0-9]{1,9})?
    )""",
    re.VERBOSE,
)
CONSTANTS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


def parse_scalar(text: str) -> Scalar:
    """Return the value of an unquoted scalar: a number, a boolean, null, or else the string itself."""
    if text in CONSTANTS:
        return CONSTANTS[text]
    if INT.fullmatch(text):
        return int(text)
    if FLOAT.fullmatch(text):
        return float(text)
    return text
