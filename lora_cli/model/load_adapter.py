"""Load a saved adapter onto a model by plain PEFT, and check that every tensor of its file is used by the model."""

from collections.abc import Mapping, Set
from pathlib import Path
from typing import NamedTuple

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from lora_cli.errors import LoraError
from lora_cli.model import adalora
from lora_cli.model.adapter_config import read_adapter_config
from lora_cli.model.experts import placeholders
from lora_cli.model.fused_lora import register_custom_layers
from lora_cli.model.save_adapter import ADAPTER_WEIGHTS

PREFIX = "base_model.model."  # of the base's parameter names in PEFT's files
WRONG_BASE_HINT = "an adapter fits only the base it was trained on; see its adapter_config.json"


class NamedAdapters(NamedTuple):
    """Adapters on one base."""

    model: PeftModel
    keys: dict[str, str]  # PEFT's name of each adapter, by the user's

    def activate(self, name: str) -> None:
        """Let the adapter `name` of the user answer."""
        self.model.set_adapter(self.keys[name])


def load_adapters(model: PreTrainedModel, folders: Mapping[str, Path], *, base: str) -> NamedAdapters:
    """Load the adapters of `folders`, by the user's names, onto `model`; the first one is active.

    PEFT uses its names as keys of module dictionaries, which reject points and the names of methods (`keys`). Its names
    here are therefore numbers.

    Raises:
        LoraError: an adapter does not fit the base, or its configuration cannot be honored.
    """
    keys = {name: f"adapter_{number:03}" for number, name in enumerate(folders)}
    loaded: PreTrainedModel | PeftModel = model
    for name, folder in folders.items():
        loaded = load_adapter(loaded, folder, base=base, name=keys[name])
    assert isinstance(loaded, PeftModel)
    adapters = NamedAdapters(loaded, keys)
    adapters.activate(next(iter(folders)))
    return adapters


def load_adapter(
    model: PreTrainedModel | PeftModel,
    folder: Path,
    *,
    base: str,
    name: str = "default",
    config: PeftConfig | None = None,
) -> PeftModel:
    """Load the adapter in `folder` onto `model`, in addition to its adapters; for inference only.

    Args:
        model: the base, or the base with other adapters.
        folder: of a PEFT adapter.
        base: the user's name for the base.
        name: of the adapter among others, for PEFT.
        config: its configuration, if not to be read from `folder`.

    Raises:
        LoraError: adapter and base do not fit: a tensor is missing, unknown or of another shape.
    """
    config = config or read_adapter_config(folder)
    if isinstance(config, LoraConfig):
        register_custom_layers(config)
    adapted: PeftModel
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    base_keys = {PREFIX + key for key, _ in inner.named_parameters(remove_duplicate=False)}
    try:
        with placeholders(inner):
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
                model.load_adapter(str(folder), adapter_name=name)
                adapted = model
            else:
                adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=name, config=config)
    except (ValueError, RuntimeError) as reason:
        raise LoraError(f"{folder} does not fit {base}: {_first_mismatch(reason)}", hint=WRONG_BASE_HINT) from reason
    adalora.restore_fp32_tensors(adapted, load_file(folder / ADAPTER_WEIGHTS), name=name)
    expected = set(get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False))
    check_adapter_keys(folder, {unwrapped_name(key) for key in expected}, base_keys, base=base)
    return adapted


def tensor_names(folder: Path) -> set[str]:
    """Return the names of the tensors in the adapter file, without the wrappers that PEFT puts around layers."""
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        return {unwrapped_name(key) for key in file.keys()}  # noqa: SIM118 - a file is not a dictionary


def unwrapped_name(key: str) -> str:
    """Return a parameter's name without PEFT's wrapper around its layer."""
    return key.replace(".base_layer.", ".")


def check_adapter_keys(folder: Path, expected: Set[str], base_keys: Set[str], *, base: str) -> None:
    """Compare the names in the adapter file with those of the loaded adapter; parameters of the base are allowed.

    PEFT loads the tensors that fit, and ignores the others silently.

    Raises:
        LoraError: a tensor is missing or unknown.
    """
    in_file = tensor_names(folder)
    for names, verb in ((expected - in_file, "lacks"), (in_file - expected - base_keys, "has")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise LoraError(
                f"{folder} does not fit {base}: it {verb} {min(names).removeprefix(PREFIX)}{more}",
                hint=WRONG_BASE_HINT,
            )


def _first_mismatch(reason: Exception) -> str:
    lines = [line.strip() for line in str(reason).splitlines()]
    return next((line for line in lines if "size mismatch" in line), lines[0])
