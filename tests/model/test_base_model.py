"""Where the weights of a base are loaded to: onto a GPU tensor by tensor, whether quantized or not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_cli.recipe.schema import QuantizationSpec
from tests.support import checkpoints


class Loaded(Exception):
    """Ends the loading once its arguments are known."""


@pytest.mark.parametrize(
    ("device", "bits", "expected"),
    [("cpu", None, None), ("cpu", 4, "cpu"), ("cuda:1", None, "cuda:1"), ("cuda:1", 4, "cuda:1")],
)
def test_no_process_holds_the_weights_of_a_gpu_in_host_memory(
    device: str, bits: int | None, expected: str | None, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: dict[str, Any] = {}

    def stop(path: str, **arguments: Any) -> None:
        seen.update(arguments)
        raise Loaded

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", stop)
    quantization = None if bits is None else QuantizationSpec(bits=4)
    with pytest.raises(Loaded):
        checkpoints.checkpoint(tiny_folder).load(torch.device(device), quantization=quantization)
    assert seen.get("device_map") == (None if expected is None else {"": torch.device(expected)})
