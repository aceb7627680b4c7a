"""A base model without weights (names and shapes, zero memory) that an adapter can be attached to."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.model.adapter_files import PREFIX, AdapterFiles
from lora_cli.model.load_adapter import load_adapter


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


def attach_saved_adapter(model: PreTrainedModel, adapter: AdapterFiles, *, base: str) -> EmptyModel:
    """Load an adapter onto a base without weights, its tensors in fp32.

    Args:
        model: returned by `init_empty_weights`.
        adapter: a PEFT adapter, opened.
        base: the user's name for the base.

    Raises:
        LoraError: adapter and base do not fit: a tensor is missing, unknown or of another shape.
    """
    saved = adapter.names_in_base
    names = dict(model.named_parameters(remove_duplicate=False))
    tied = tied_parameters(model)
    from_adapter = frozenset(name for name in names if PREFIX + name in saved)
    for name in from_adapter:
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, nn.Parameter(torch.zeros(names[name].shape), requires_grad=False))
    adapted = load_adapter(model, adapter, base=base)
    shapes = {name: tuple(parameter.shape) for name, parameter in names.items()}
    return EmptyModel(adapted.float(), shapes, from_adapter, tied)


def embedding_rows(adapter: AdapterFiles, model: PreTrainedModel) -> int:
    """Return the rows of the embeddings, or of the head, that the adapter contains; 0 without them."""
    owners = {model.get_input_embeddings(), model.get_output_embeddings()}
    names = [f"{PREFIX}{name}." for name, module in model.named_modules() if module in owners]
    full = (key for key in adapter.tensors if key.startswith(tuple(names)) and key.endswith("weight"))
    return max((rows for key in full if "lora_" not in key for rows in adapter.tensors[key].shape[:1]), default=0)


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
