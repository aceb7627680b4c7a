"""Load a saved adapter onto a model by plain PEFT, and check that every tensor of its file is used by the model."""

import warnings
from collections.abc import Mapping, Set
from copy import deepcopy
from typing import NamedTuple

from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, PromptTuningInit, get_peft_model_state_dict
from transformers import PreTrainedModel

from lora_cli.errors import LoraError
from lora_cli.model import adalora
from lora_cli.model.adapter_files import PREFIX, AdapterFiles, unwrapped_name
from lora_cli.model.config_values import targeted
from lora_cli.model.experts import placeholders
from lora_cli.model.fused_lora import register_custom_layers
from lora_cli.model.peft_waits import remove_waits
from lora_cli.run.folder import CONFIG_FILE
from lora_cli.run.read_file import printable

WRONG_BASE_HINT = "an adapter fits only the base it was trained on; see its adapter_config.json"
# What PEFT and torch raise for an adapter whose configuration or tensors do not fit the model.
PEFT_ERRORS = (ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError, AssertionError, ImportError)


class NamedAdapters(NamedTuple):
    """Adapters on one base."""

    model: PeftModel
    keys: dict[str, str]  # PEFT's name of each adapter, by the user's

    def activate(self, name: str) -> None:
        """Let the adapter `name` of the user answer."""
        self.model.set_adapter(self.keys[name])


def load_adapters(model: PreTrainedModel, adapters: Mapping[str, AdapterFiles], *, base: str) -> NamedAdapters:
    """Load `adapters`, by the user's names, onto `model`; the first one is active.

    PEFT uses its names as keys of module dictionaries, which reject points and the names of methods (`keys`). Its names
    here are therefore numbers.

    Raises:
        LoraError: an adapter does not fit the base.
    """
    keys = {name: f"adapter_{number:03}" for number, name in enumerate(adapters)}
    loaded: PreTrainedModel | PeftModel = model
    for name, adapter in adapters.items():
        loaded = load_adapter(loaded, adapter, base=base, name=keys[name])
    assert isinstance(loaded, PeftModel)
    named = NamedAdapters(loaded, keys)
    named.activate(next(iter(adapters)))
    return named


def load_adapter(
    model: PreTrainedModel | PeftModel, adapter: AdapterFiles, *, base: str, name: str = "default"
) -> PeftModel:
    """Load an adapter onto `model`, in addition to its adapters; for inference only.

    Args:
        model: the base, or the base with other adapters.
        adapter: a PEFT adapter, opened.
        base: the user's name for the base.
        name: of the adapter among others, for PEFT.

    Raises:
        LoraError: adapter and base do not fit: a tensor is missing, unknown or of another shape.
    """
    folder, config = adapter.folder, _config_for_inference(adapter.config)
    if isinstance(config, LoraConfig):
        register_custom_layers(config)
    adapted: PeftModel
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    base_keys = {PREFIX + key for key, _ in inner.named_parameters(remove_duplicate=False)}
    targeted(folder / CONFIG_FILE, config, [key for key, _ in inner.named_modules()])
    try:
        with placeholders(inner), warnings.catch_warnings():
            # The names of all tensors are compared below.
            warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
                model.load_adapter(str(folder), adapter_name=name)
                adapted = model
            else:
                adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=name, config=config)
    except PEFT_ERRORS as reason:
        raise LoraError(f"{folder} does not fit {base}: {_first_mismatch(reason)}", hint=WRONG_BASE_HINT) from reason
    expected = set(get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False))
    check_adapter_keys(adapter, {unwrapped_name(key) for key in expected}, base_keys, base=base)
    adalora.restore_fp32_tensors(adapted, adapter.load(), name=name)
    remove_waits(adapted)
    return adapted


def _config_for_inference(config: PeftConfig) -> PeftConfig:
    """Return a copy of the configuration with which PEFT computes no initial values: the file has the trained ones.

    Some initializations decompose the base's weights, load another file, or run a tokenizer's code.
    """
    copy = deepcopy(config)
    copy.inference_mode = True
    if isinstance(copy, LoraConfig):
        copy.init_lora_weights = True
    if isinstance(copy, PromptTuningConfig):
        copy.prompt_tuning_init = PromptTuningInit.RANDOM
    return copy


def check_adapter_keys(adapter: AdapterFiles, expected: Set[str], base_keys: Set[str], *, base: str) -> None:
    """Compare the names in the adapter file with those of the loaded adapter; parameters of the base are allowed.

    PEFT loads the tensors that fit, and ignores the others silently.

    Raises:
        LoraError: a tensor is missing or unknown.
    """
    in_file = adapter.names_in_base
    for names, verb in ((expected - in_file, "lacks"), (in_file - expected - base_keys, "has")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise LoraError(
                f"{adapter.folder} does not fit {base}: it {verb} {printable(min(names).removeprefix(PREFIX))}{more}",
                hint=WRONG_BASE_HINT,
            )


def _first_mismatch(reason: Exception) -> str:
    lines = [line.strip() for line in str(reason).splitlines()]
    return next((line for line in lines if "size mismatch" in line), lines[0] if lines else type(reason).__name__)
