"""The sparkline: at most its width, lowest and highest blocks for lowest and highest means, gaps for no number."""

import math

import pytest

from lora_cli.run.sparkline import sparkline


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ""),
        ([1.0], "▁"),
        ([2.0, 2.0], "▁▁"),
        ([8.0, 1.0, 4.5], "█▁▅"),
        ([1.0, math.nan, 8.0], "▁ █"),
        ([math.inf], " "),
        ([float(n // 1000) for n in range(8000)], "▁▁▂▂▃▃▄▄▅▅▆▆▇▇██"),
    ],
)
def test_the_curve(values: list[float], expected: str):
    assert sparkline(values) == expected


@pytest.mark.parametrize("count", [1, 15, 16, 17, 31, 33, 1000])
def test_the_width_is_a_limit(count: int):
    assert len(sparkline([1.0] * count)) <= 16
    assert len(sparkline([1.0] * count, width=4)) <= 4
