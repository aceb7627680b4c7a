"""Load a saved adapter onto a model by plain PEFT, and see that every tensor of it has found its place."""

from collections.abc import Set
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from lora_cli.errors import LoraError
from lora_cli.model import adalora, gguf_base
from lora_cli.model.save_adapter import ADAPTER_WEIGHTS

PREFIX = "base_model.model."
WRONG_BASE_HINT = "an adapter fits only the base it was trained on; see its adapter_config.json"


def load_adapter(
    model: PreTrainedModel | PeftModel,
    folder: Path,
    *,
    base: str,
    name: str = "default",
    config: PeftConfig | None = None,
) -> PeftModel:
    """The adapter in `folder` on `model`, or beside the adapters that are there, ready for use, not for training.

    Args:
        model: the base, or the base with other adapters.
        folder: of a PEFT adapter.
        base: the user's name for the base.
        name: of the adapter among others.
        config: its configuration, where it is not to be read from `folder`.

    Raises:
        LoraError: the two do not fit, to the last tensor.
    """
    config = config or PeftConfig.from_pretrained(str(folder))
    if isinstance(config, LoraConfig):
        gguf_base.register_packed_lora(config)
    adapted: PeftModel
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    own = {PREFIX + key for key, _ in bare.named_parameters(remove_duplicate=False)}
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
            model.load_adapter(str(folder), adapter_name=name)
            adapted = model
        else:
            adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=name, config=config)
    except (ValueError, RuntimeError) as reason:
        raise LoraError(f"{folder} does not fit {base}: {_first_mismatch(reason)}", hint=WRONG_BASE_HINT) from reason
    adalora.restore_fp32_tensors(adapted, load_file(folder / ADAPTER_WEIGHTS), name=name)
    known = set(get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False))
    check_adapter_keys(folder, {bare_name(key) for key in known}, own, base=base)
    return adapted


def tensor_names(folder: Path) -> set[str]:
    """What the adapter file holds, by the names that the parameters have without the wrappers PEFT puts around."""
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        return {bare_name(key) for key in file.keys()}  # noqa: SIM118 - a file is no dictionary


def bare_name(key: str) -> str:
    """A parameter's name without the wrapper around its layer."""
    return key.replace(".base_layer.", ".")


def check_adapter_keys(folder: Path, known: Set[str], own: Set[str], *, base: str) -> None:
    """Hold the tensors in `folder` against those of the loaded adapter; parameters of the base's `own` may be there.

    PEFT takes what fits, and says nothing of the rest.

    Raises:
        LoraError: a tensor is missing, or has no place.
    """
    held = tensor_names(folder)
    for apart, said in ((known - held, "lacks"), (held - known - own, "has")):
        if apart:
            more = f" and {len(apart) - 1} more" if len(apart) > 1 else ""
            raise LoraError(
                f"{folder} does not fit {base}: it {said} {min(apart).removeprefix(PREFIX)}{more}", hint=WRONG_BASE_HINT
            )


def _first_mismatch(reason: Exception) -> str:
    lines = [line.strip() for line in str(reason).splitlines()]
    return next((line for line in lines if "size mismatch" in line), lines[0])
