"""A base model without its weights that an adapter can be put on: shapes and names as they are, and no memory."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.errors import LoraError
from lora_cli.model.load_adapter import PREFIX, load_adapter, tensor_names
from lora_cli.model.save_adapter import ADAPTER_WEIGHTS

# Starts of PEFT that take something out of the base weights; loaded as it is, such an adapter wants them taken again.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga")


class EmptyModel(NamedTuple):
    """A base without weights, under an adapter with all of its."""

    model: PeftModel
    shapes: dict[str, tuple[int, ...]]  # of the base's parameters, by name
    given: frozenset[str]  # parameters of the base that the adapter brings along: biases, embeddings saved whole
    ties: tuple[tuple[str, ...], ...]  # names of the base's parameters that are one


def init_empty_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Replace each parameter of a model on the meta device by one number that stands for all: zero, fp32, on the CPU.

    PEFT makes its layers on the device and in the dtype of the base's; on the meta device they would have no values.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    stand_in = torch.zeros(()).expand(parameter.shape)
                    made[id(parameter)] = nn.Parameter(stand_in, requires_grad=False)
                module._parameters[name] = made[id(parameter)]
    return model


def attach_saved_adapter(model: PreTrainedModel, folder: Path, config: PeftConfig, *, base: str) -> EmptyModel:
    """Put the adapter in `folder` on an emptied base, its tensors in fp32.

    Args:
        model: what `empty` made.
        folder: of a PEFT adapter.
        config: the adapter's.
        base: the user's name for the base.

    Raises:
        LoraError: the two do not fit, to the last tensor.
    """
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(BASE_CHANGING_INITS):
        raise LoraError(
            f"{folder}: it belongs to base weights that PEFT changed before training (init_lora_weights: {start})",
            hint="save it as plain LoRA first: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    if isinstance(config, LoraConfig):
        config.init_lora_weights = True  # where it started does not matter any more, and may cost a decomposition
    held = tensor_names(folder)
    names = dict(model.named_parameters(remove_duplicate=False))
    ties = _tied_parameters(model)
    given = frozenset(name for name in names if PREFIX + name in held)
    for name in given:
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, nn.Parameter(torch.zeros(names[name].shape), requires_grad=False))
    adapted = load_adapter(model, folder, base=base, config=config)
    shapes = {name: tuple(parameter.shape) for name, parameter in names.items()}
    return EmptyModel(adapted.float(), shapes, given, ties)


def embedding_rows(folder: Path, model: PreTrainedModel) -> int:
    """The rows of the embeddings, or of the head, that the adapter in `folder` brings whole; 0 where it brings none."""
    owners = {model.get_input_embeddings(), model.get_output_embeddings()}
    names = [f"{PREFIX}{name}." for name, module in model.named_modules() if module in owners]
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        whole = [key for key in file.keys() if key.startswith(tuple(names)) and key.endswith("weight")]  # noqa: SIM118
        whole = [key for key in whole if "lora_" not in key]
        return max((int(file.get_slice(key).get_shape()[0]) for key in whole), default=0)


def _tied_parameters(model: PreTrainedModel) -> tuple[tuple[str, ...], ...]:
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def load_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a module's own parameters the values of `weights`, by their names in it."""
    for name, value in weights.items():
        module._parameters[name] = nn.Parameter(value, requires_grad=False)


def drop_weights(module: nn.Module, names: Sequence[str]) -> None:
    """Let go of values that `fill` gave."""
    for name in names:
        parameter = module._parameters[name]
        assert parameter is not None
        module._parameters[name] = nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False)
