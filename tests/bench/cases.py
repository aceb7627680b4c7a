"""What scripts/bench measures on the CPU: bases, dtypes and ways to train. Pure: no torch."""

from typing import NamedTuple

from tests.gpu.cases import Base


class Case(NamedTuple):
    """A base in memory, and the dtype that it computes in."""

    base: Base
    dtype: str  # float32, or bfloat16: left out where the CPU has no instructions for it


CASES = (Case("16-bit", "float32"), Case("16-bit", "bfloat16"), Case("nf4", "float32"), Case("nf4", "bfloat16"))
# Ways of tests/gpu/measure.py, in the order of the table.
WAYS = {"lora": "lora", "trl": "TRL, padded", "trl-packed": "TRL, packed", "peft": "PEFT, padded"}
