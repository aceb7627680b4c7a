"""What base an adapter was trained on, written beside it: by which a later merge knows the right one, and how it was
quantised. No torch.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

TRAINED_ON_FILE = "trained_on.json"  # PEFT's own configuration names the base, and says no more of it


class TrainedOn(NamedTuple):
    """A base model as it was trained on; its name is in PEFT's own configuration."""

    commit: str | None  # of a hub model
    fingerprint: str  # of its weights, see `base.fingerprint`
    architecture: str  # class of the model
    dtype: str  # of weights and compute
    quantization: dict[str, Any] | None  # the recipe's section, filled in


def write_trained_on(trained_on: TrainedOn, folder: Path) -> None:
    """Put it beside the adapter."""
    (folder / TRAINED_ON_FILE).write_text(json.dumps(trained_on._asdict(), indent=2) + "\n", encoding="utf-8")


def read_trained_on(folder: Path) -> TrainedOn | None:
    """What lies beside an adapter; None where there is nothing, as with adapters of other tools."""
    if not (folder / TRAINED_ON_FILE).is_file():
        return None
    return TrainedOn(**json.loads((folder / TRAINED_ON_FILE).read_text(encoding="utf-8")))
