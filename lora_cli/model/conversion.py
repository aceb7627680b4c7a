"""Weight conversion between a checkpoint's tensors and the model's parameters, in both directions, one by one.

transformers renames tensors when it loads a checkpoint, and merges or splits some: the experts of a layer, one tensor
each in the checkpoint, are one parameter in the model. This module applies transformers' own rules to single
parameters and defines no rules of its own.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from lora_cli.errors import LoraError


class CheckpointPart(NamedTuple):
    """A tensor of the checkpoint that a parameter is built from."""

    key: str  # its name in the checkpoint
    pattern: str | None  # of the rule that joins it with others; None if it is the full parameter


class CheckpointMapping:
    """A mapping from each parameter of a model to the tensors of its checkpoint."""

    def __init__(self, model: PreTrainedModel, keys: Iterable[str]) -> None:
        """Map the checkpoint's `keys` to parameters of `model`, which may be on the meta device."""
        # A copy, because rules look parameters up by their names, which PEFT changes when it wraps layers of `model`.
        self._model = _copy_without_weights(model)
        self._rules: list[WeightTransform] = get_model_conversion_mapping(model)
        converters = [rule for rule in self._rules if isinstance(rule, WeightConverter)]
        renamings = [rule for rule in self._rules if isinstance(rule, WeightRenaming)]
        self._by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        known, prefix = model.state_dict(), model.base_model_prefix
        self.parts: defaultdict[str, list[CheckpointPart]] = defaultdict(list)
        self.unknown: list[str] = []  # in the checkpoint, but not in the model
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=known)
            if name in known:
                self.parts[name].append(CheckpointPart(key, pattern))
            else:
                self.unknown.append(key)
        # Renamings of older formats that this checkpoint does not have must not be reverted when it is written.
        self._used = [rule for rule in self._rules if isinstance(rule, WeightConverter) or rule.was_used()]

    def is_joined(self, name: str) -> bool:
        """Return whether the parameter is built from several tensors of the checkpoint, or from a part of one."""
        return name in self.parts and self.parts[name][0].pattern is not None

    def keys(self, tied: Iterable[Sequence[str]]) -> dict[str, str]:
        """Return the key of each parameter that is one tensor of the checkpoint, by name in the model.

        Args:
            tied: groups of names that are one parameter: those that the checkpoint lacks have the key of another.
        """
        keys = {name: parts[0].key for name, parts in self.parts.items() if not self.is_joined(name)}
        for group in tied:
            stored = [keys[name] for name in group if name in keys]
            keys |= {name: stored[0] for name in group if stored and name not in keys}
        return keys

    def key(self, name: str) -> str:
        """Return the name in the checkpoint of a parameter that is not joined."""
        return self.parts[name][0].key

    def to_parameter(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """Return the parameter `name`, in its shape in the model and the checkpoint's dtype.

        Args:
            name: of the parameter in the model.
            read: returns a tensor of the checkpoint by its name there.

        Raises:
            LoraError: the checkpoint stores the parameter in one tensor together with others.
        """
        parts = self.parts[name]
        return self._join(name, parts, read) if self.is_joined(name) else read(parts[0].key)

    def to_expert(self, name: str, index: int, read: Callable[[str], Tensor]) -> Tensor | None:
        """Return one expert of the joined parameter `name`; None if the checkpoint does not store experts one by one.

        Args:
            name: of the parameter in the model, [experts, ...].
            index: of the expert.
            read: returns a tensor of the checkpoint by its name there.
        """
        shape = self._model.get_parameter(name).shape
        by_pattern: dict[str | None, list[CheckpointPart]] = defaultdict(list)
        for part in self.parts[name]:
            by_pattern[part.pattern].append(part)
        if any(len(parts) != shape[0] for parts in by_pattern.values()):
            return None
        value = self._join(name, [parts[index] for parts in by_pattern.values()], read)
        return value[0] if value.shape == (1, *shape[1:]) else None

    def _join(self, name: str, parts: Sequence[CheckpointPart], read: Callable[[str], Tensor]) -> Tensor:
        rule = deepcopy(self._by_pattern[str(parts[0].pattern)])
        for part in parts:
            rule.add_tensor(name, part.key, part.pattern, read(part.key))
        converted = rule.convert(name, model=self._model, config=self._model.config)
        if converted.keys() != {name}:
            raise LoraError(
                f"the checkpoint stores {', '.join(sorted(converted))} in one tensor: they cannot be merged one by one",
                hint="merge in memory: PEFT's merge_and_unload, then save_pretrained",
            )
        value: Any = converted[name]
        joined: Tensor = value[0] if isinstance(value, list) else value
        return joined

    def to_checkpoint(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """Return the tensors of the checkpoint, by name, that store `value` of the parameter `name`, in its dtype."""
        if not self.is_joined(name):
            return {self.parts[name][0].key if name in self.parts else name: value}
        # A private attribute: from_pretrained sets it and revert_weight_conversion reads it. This model was not loaded
        # by from_pretrained, and transformers has no official way to pass the rules in.
        self._model._weight_conversions = self._used
        tensors: dict[str, Tensor] = revert_weight_conversion(self._model, {name: value})
        if tensors.keys() != {part.key for part in self.parts[name]}:
            raise AssertionError(f"transformers splits {name} into {sorted(tensors)}")
        return tensors


def _copy_without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of `model` on the meta device: copying the weights would take as much memory as they do."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for parameter in model.parameters()
    }
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    return deepcopy(model, memo)
