"""Record of the base model that an adapter was trained on (trained_on.json, next to the adapter). No torch.

A later merge uses it to find the right base, and to know how it was quantized.
"""

import json
import os
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from lora_cli.errors import LoraError
from lora_cli.recipe.schema import QuantizationSpec
from lora_cli.run.read_file import read_json_object

TRAINED_ON_FILE = "trained_on.json"  # PEFT's adapter_config.json has only the base's name
Origin = dict[str, Any]  # an earlier adapter: `adapter` (its folder), `digest` (of its weights), `step` (null: unknown)
MAX_BYTES = 1 << 20
HINT = "restore the file from its origin; without it the adapter is used as one of another tool, with no known base"


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it has characters that cannot be printed")
    return text


def _existing_date(text: str) -> str:
    date.fromisoformat(text)  # ValueError for 2026-02-31
    return text


def _quantization(section: dict[str, Any]) -> dict[str, Any]:
    QuantizationSpec.model_validate(section)
    return section


def _origin(origin: Origin) -> Origin:
    types = {"adapter": str, "digest": str, "step": int | None}
    if origin.keys() != types.keys() or not all(isinstance(origin[key], kind) for key, kind in types.items()):
        raise ValueError("it needs `adapter` and `digest`, texts, and `step`, an integer or null")
    _printable(origin["adapter"])
    return origin


DtypeName = Literal["float32", "bfloat16", "float16"]
Text = Annotated[str, Field(max_length=1000), AfterValidator(_printable)]


class TrainedOn(NamedTuple):
    """The base model in training; its name is in PEFT's adapter_config.json."""

    commit: Text | None  # of a hub model
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # of its weights, see `model_source.fingerprint`
    architecture: Text  # class of the model
    dtype: DtypeName  # of weights and compute
    quantization: Annotated[dict[str, Any], AfterValidator(_quantization)] | None  # the recipe's section, all defaults
    # How the training rows prompt a language model: chat (by the chat template), text (literal) or both. None: unknown.
    prompts: Literal["chat", "text", "both"] | None = None
    step: Annotated[int, Field(ge=0)] | None = None  # of the adapter; None in adapters of earlier versions
    origins: list[Annotated[Origin, AfterValidator(_origin)]] = []  # noqa: RUF012 - those that training went on from, the oldest first
    template_variables: dict[str, Any] | None = None  # defaults of the saved chat template: {"enable_thinking": False}
    template_date: Annotated[str, AfterValidator(_existing_date)] | None = None  # that the chat template wrote


RECORD = TypeAdapter(TrainedOn)


def write_trained_on(trained_on: TrainedOn, folder: Path) -> None:
    """Write trained_on.json into the adapter's `folder`."""
    (folder / TRAINED_ON_FILE).write_text(json.dumps(trained_on._asdict(), indent=2) + "\n", encoding="utf-8")


def read_trained_on(folder: Path) -> TrainedOn | None:
    """Read trained_on.json from the adapter's `folder`; None if it does not exist, as in adapters of other tools.

    Raises:
        LoraError: it cannot be read, or a key is unknown, missing or has a wrong value.
    """
    path = folder / TRAINED_ON_FILE
    if not os.path.lexists(path):
        return None
    values = read_json_object(path, limit=MAX_BYTES, hint=HINT)
    if unknown := sorted(values.keys() - set(TrainedOn._fields)):
        raise LoraError(f"{path}: {unknown[0][:60]!a} is not a key of this file", hint=f"upgrade lora, or {HINT}")
    try:
        return RECORD.validate_python(values, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))[:60]
        raise LoraError(f"{path}: {key}: {first['msg'].removeprefix('Value error, ')}", hint=HINT) from None
