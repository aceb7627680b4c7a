"""A base model without weights (names and shapes, zero memory) that an adapter can be attached to."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.model.load_adapter import PREFIX, load_adapter, tensor_names
from lora_cli.model.save_adapter import ADAPTER_WEIGHTS


class EmptyModel(NamedTuple):
    """A base without weights, with a complete adapter on it."""

    model: PeftModel
    shapes: dict[str, tuple[int, ...]]  # of the base's parameters, by name
    from_adapter: frozenset[str]  # parameters of the base that the adapter file contains: biases, saved embeddings
    tied: tuple[tuple[str, ...], ...]  # names of the base's parameters that are one tensor


def init_empty_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Replace each parameter of a model on the meta device by zeros of its shape: fp32 on the CPU, without memory.

    The zeros are one number, expanded. PEFT creates its layers on the device and in the dtype of the base's layers;
    on the meta device they would have no values.
    """
    created: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in created:
                    zeros = torch.zeros(()).expand(parameter.shape)
                    created[id(parameter)] = nn.Parameter(zeros, requires_grad=False)
                module._parameters[name] = created[id(parameter)]
    return model


def attach_saved_adapter(model: PreTrainedModel, folder: Path, config: PeftConfig, *, base: str) -> EmptyModel:
    """Load the adapter in `folder` onto a base without weights, its tensors in fp32.

    Args:
        model: returned by `init_empty_weights`.
        folder: of a PEFT adapter.
        config: the adapter's.
        base: the user's name for the base.

    Raises:
        LoraError: adapter and base do not fit: a tensor is missing, unknown or of another shape.
    """
    if isinstance(config, LoraConfig):
        config.init_lora_weights = (
            True  # the file has the trained values; another initialization may compute a decomposition
        )
    saved = tensor_names(folder)
    names = dict(model.named_parameters(remove_duplicate=False))
    tied = tied_parameters(model)
    from_adapter = frozenset(name for name in names if PREFIX + name in saved)
    for name in from_adapter:
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, nn.Parameter(torch.zeros(names[name].shape), requires_grad=False))
    adapted = load_adapter(model, folder, base=base, config=config)
    shapes = {name: tuple(parameter.shape) for name, parameter in names.items()}
    return EmptyModel(adapted.float(), shapes, from_adapter, tied)


def embedding_rows(folder: Path, model: PreTrainedModel) -> int:
    """Return the rows of the embeddings, or of the head, that the adapter in `folder` contains; 0 without them."""
    owners = {model.get_input_embeddings(), model.get_output_embeddings()}
    names = [f"{PREFIX}{name}." for name, module in model.named_modules() if module in owners]
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        keys = [key for key in file.keys() if key.startswith(tuple(names)) and key.endswith("weight")]  # noqa: SIM118
        full = [key for key in keys if "lora_" not in key]
        return max((int(file.get_slice(key).get_shape()[0]) for key in full), default=0)


def tied_parameters(model: PreTrainedModel) -> tuple[tuple[str, ...], ...]:
    """Return the groups of names of the parameters that are one tensor."""
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def load_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Set a module's own parameters to the tensors of `weights`, by their names there, in any shape and dtype."""
    for name, value in weights.items():
        module._parameters[name] = nn.Parameter(value, requires_grad=False)


def drop_weights(module: nn.Module, names: Sequence[str]) -> None:
    """Replace parameters that `load_weights` has set by zeros without memory, as in `init_empty_weights`."""
    for name in names:
        parameter = module._parameters[name]
        assert parameter is not None
        module._parameters[name] = nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False)
