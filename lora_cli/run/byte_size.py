"""Numbers of bytes as options give them: `5GB`, `80GiB`, `80e9`. No torch."""

import math
import re

from lora_cli.errors import LoraError

UNITS = {
    "": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}
SIZE = re.compile(r"(\d+(?:\.\d*)?(?:e\+?\d+)?)\s*([KMGT]i?B)?", re.IGNORECASE)


def parse_size(text: str, *, option: str, example: str) -> int:
    """Return the bytes of a size such as `5GB` (10^9 bytes each), `2GiB` (2^30 bytes each) or `80e9`.

    Args:
        text: of the option.
        option: its name, for the message.
        example: a size that fits, for the hint.

    Raises:
        LoraError: `text` is not a size above zero.
    """
    match = SIZE.fullmatch(text.strip())
    size = float(match[1]) * UNITS[(match[2] or "").upper()] if match else 0.0
    if not 1 <= size < math.inf:
        raise LoraError(f"{option} {text} is not a size", hint=f"write a number with a unit, such as {example}")
    return int(size)
