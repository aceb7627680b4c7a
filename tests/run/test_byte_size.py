"""Sizes of options: decimal and binary units, plain numbers, and what is not a size."""

import pytest

from lora_cli.errors import LoraError
from lora_cli.run.byte_size import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("80GiB", 80 << 30),
        ("80 gib", 80 << 30),
        ("80e9", 80 * 10**9),
        ("1.5TB", 15 * 10**11),
        ("200KB", 200_000),
        ("500MiB", 500 << 20),
        ("12345", 12345),
        ("7.GB", 7 * 10**9),
    ],
)
def test_sizes(text: str, size: int):
    assert parse_size(text, option="--budget", example="80GB") == size


@pytest.mark.parametrize(
    "text", ["", "GB", "0GB", "-3GB", "80GiBs", "80G", "1e999", "nan", "1,5GB", "8 0GB", "inf", "0.5"]
)
def test_what_is_not_a_size_is_an_error_of_one_line(text: str):
    with pytest.raises(LoraError) as error:
        parse_size(text, option="--budget", example="80GB")
    assert error.value.message == f"--budget {text} is not a size"
    assert error.value.hint == "write a number with a unit, such as 80GB"
    assert error.value.exit_code == 2
