"""Adapters of PEFT whose weights are pickled: adapter_model.bin and other files of torch.save in PEFT's own names."""

import os
from pathlib import Path
from typing import NamedTuple

from peft import LoraConfig, PeftConfig
from torch import Tensor

from lora_cli.errors import LoraError
from lora_cli.model.adapter_config import read_adapter_config
from lora_cli.model.foreign_adapters.detect import Found
from lora_cli.model.foreign_adapters.torch_file import read_torch_file
from lora_cli.run.folder import CONFIG_FILE
from lora_cli.run.read_file import read_json_object


class PickledPeft(NamedTuple):
    """A PEFT adapter of any method, read and checked on its own."""

    file: Path  # of its weights
    config: PeftConfig
    tensors: dict[str, Tensor]  # by PEFT's name
    missing: list[str]  # keys of the size of updates that the configuration does not have


def read(found: Found) -> PickledPeft:
    """Read the tensors, and adapter_config.json next to them.

    Raises:
        LoraError: a file is damaged or missing, or the configuration has a key that would be ignored.
    """
    if not os.path.lexists(found.folder / CONFIG_FILE):
        raise LoraError(
            f"{found.folder} has no {CONFIG_FILE}, without which PEFT loads no adapter",
            hint="fetch it together with the weights",
        )
    tensors = read_torch_file(found.weights)
    if any(name.endswith(("lora_a.weight", "lora_b.weight")) for name in tensors):
        raise LoraError(f"{found.weights} has the names of torchtune", hint="convert it with --from torchtune")
    config, written = read_adapter_config(found.folder), read_json_object(found.folder / CONFIG_FILE)
    missing = [key for key in ("r", "lora_alpha") if key not in written] if isinstance(config, LoraConfig) else []
    return PickledPeft(found.weights, config, tensors, missing)
