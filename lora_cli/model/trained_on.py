"""Record of the base model that an adapter was trained on (trained_on.json, next to the adapter). No torch.

A later merge uses it to find the right base, and to know how it was quantized.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

TRAINED_ON_FILE = "trained_on.json"  # PEFT's adapter_config.json has only the base's name
Origin = dict[str, Any]  # an earlier adapter: `adapter` (its folder), `digest` (of its weights), `step` (null: unknown)


class TrainedOn(NamedTuple):
    """The base model in training; its name is in PEFT's adapter_config.json."""

    commit: str | None  # of a hub model
    fingerprint: str  # of its weights, see `model_source.fingerprint`
    architecture: str  # class of the model
    dtype: str  # of weights and compute
    quantization: dict[str, Any] | None  # the recipe's section with all defaults
    # How the training rows prompt a language model: chat (by the chat template), text (literal) or both. None: unknown.
    prompts: str | None = None
    step: int | None = None  # of the adapter; None in adapters of earlier versions
    origins: list[Origin] = []  # noqa: RUF012 - adapters that training went on from, the oldest first; never changed
    template_variables: dict[str, Any] | None = None  # defaults of the saved chat template: {"enable_thinking": False}
    template_date: str | None = None  # that the chat template wrote, as 2026-01-31; None if it writes none


def write_trained_on(trained_on: TrainedOn, folder: Path) -> None:
    """Write trained_on.json into the adapter's `folder`."""
    (folder / TRAINED_ON_FILE).write_text(json.dumps(trained_on._asdict(), indent=2) + "\n", encoding="utf-8")


def read_trained_on(folder: Path) -> TrainedOn | None:
    """Read trained_on.json from the adapter's `folder`; None if it does not exist, as in adapters of other tools."""
    if not (folder / TRAINED_ON_FILE).is_file():
        return None
    return TrainedOn(**json.loads((folder / TRAINED_ON_FILE).read_text(encoding="utf-8")))


def origins_of(folder: Path, *, name: str, weights: str) -> list[Origin]:
    """Return the chain of adapters up to the one in `folder`, the oldest first.

    Args:
        folder: of the adapter that training goes on from.
        name: of that folder, without folders of this machine.
        weights: name of its file of tensors.
    """
    before = read_trained_on(folder)
    digest = hashlib.sha256((folder / weights).read_bytes()).hexdigest()
    own = {"adapter": name, "digest": digest, "step": before.step if before else None}
    return [*(before.origins if before else []), own]
