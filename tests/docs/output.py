"""Compare what a page shows with what a command prints. The rule is in CONTRIBUTING.md, section Documentation.

- `...` stands for any text, in a line or as a line of its own.
- A number stands for any number, with its sign, separators, exponent and percent sign; a unit of bytes for any other,
  and a dtype, which depends on the CPU, for any other.
- A gap (spaces, or the end of a line) stands for any gap: pages wrap long lines, and columns are as wide as figures.
- All other text is equal, from the first line to the last.
"""

import re

NUMBER = r"[-+−]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?%?"
UNIT = r"(?:bytes?|[KMGT]i?B)\b"
DTYPE = r"(?:bfloat16|float16|float32)\b"
TOKEN = re.compile(rf"(?P<dots>\.\.\.)|(?P<gap>\s+)|(?P<number>{NUMBER})|(?P<unit>{UNIT})|(?P<dtype>{DTYPE})|.")
PATTERNS = {"dots": r".*?", "gap": r"\s+", "number": NUMBER, "unit": UNIT, "dtype": DTYPE}


def matches(shown: str, printed: str) -> bool:
    """Whether a command that printed `printed` may be shown with `shown`."""
    return re.fullmatch(pattern(shown.strip()), printed.strip(), re.DOTALL) is not None


def pattern(shown: str) -> str:
    """Return the regular expression of the outputs that `shown` stands for."""
    parts: list[str] = []
    for token in TOKEN.finditer(shown):
        kind = token.lastgroup
        parts.append(re.escape(token[0]) if kind is None else PATTERNS[kind])
    text = "".join(parts)
    # Around `...`, a gap may be missing: the text that it stands for can be empty, or begin the output.
    return text.replace(r"\s+.*?", r"\s*.*?").replace(r".*?\s+", r".*?\s*")


def first_difference(shown: str, printed: str) -> str:
    """Return the first line of `shown` to which no output of the command fits, for the message of a failed test."""
    lines = shown.strip().splitlines()
    for count in range(1, len(lines) + 1):
        if not re.match(pattern("\n".join(lines[:count])), printed.strip(), re.DOTALL):
            return f"is not printed: {lines[count - 1]}"
    return "more is printed after the last line; `...` as the last line skips it"
