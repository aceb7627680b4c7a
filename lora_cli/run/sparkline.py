"""A sparkline: a curve of numbers as one line of block characters, for the progress bar and `lora runs`. No torch."""

import math
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 16  # characters


def sparkline(values: Sequence[float], *, width: int = WIDTH) -> str:
    """Return the curve of `values` in at most `width` characters, each the mean of equally many values.

    The lowest mean is the lowest block. Values that are not finite are left out; a character of none but these is a
    space.
    """
    size = max(1, math.ceil(len(values) / width))
    groups = [[v for v in values[start : start + size] if math.isfinite(v)] for start in range(0, len(values), size)]
    means = [math.fsum(group) / len(group) if group else None for group in groups]
    known = [mean for mean in means if mean is not None]
    if not known:
        return " " * len(means)
    low, span = min(known), max(known) - min(known)
    top = len(BLOCKS) - 1
    return "".join(" " if m is None else BLOCKS[round((m - low) / span * top) if span else 0] for m in means)
