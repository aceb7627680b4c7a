"""Field types of a recipe: switches, counts, fractions, and the base class of its sections. No torch."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def parse_switch(value: object) -> object:
    """Return the boolean that `value`, a word such as `no`, means in a boolean field; other values unchanged."""
    # YAML 1.1 reads `no` and `off` as booleans everywhere; here they are booleans in boolean fields only.
    booleans = {"yes": True, "on": True, "no": False, "off": False}
    return booleans.get(value.lower(), value) if isinstance(value, str) else value


def parse_integer(value: object) -> object:
    """Return a whole float as an integer; other values unchanged."""
    # YAML reads `1e3` as a float, but the user means an integer.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Switch = Annotated[bool, BeforeValidator(parse_switch)]
Count = Annotated[int, Field(ge=1), BeforeValidator(parse_integer)]
LayerNumber = Annotated[int, Field(ge=0), BeforeValidator(parse_integer)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1), BeforeValidator(parse_integer)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A part of a recipe; unknown keys, type coercion, NaN and infinity are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        serialize_by_alias=True,  # a field whose key is a Python keyword has the key as its alias
    )
