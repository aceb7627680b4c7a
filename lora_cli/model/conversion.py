"""How the tensors of a checkpoint become the parameters of its model, and how they go back, tensor by tensor.

transformers renames what it loads, and joins and splits some of it: the experts of a layer, one file entry each, are
one parameter. Its own rules are applied here to single parameters; nothing of them is repeated.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, NamedTuple

from torch import Tensor
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
    """A tensor of the checkpoint that a parameter is made of."""

    key: str  # its name in the checkpoint
    pattern: str | None  # of the rule that joins it with others; None where it is the parameter


class CheckpointMapping:
    """The checkpoint's tensors by the parameters that they become."""

    def __init__(self, model: PreTrainedModel, keys: Iterable[str]) -> None:
        """`model` has the parameters' names and shapes, and needs no weights."""
        self._model = model
        self._rules: list[WeightTransform] = get_model_conversion_mapping(model)
        joins = [rule for rule in self._rules if isinstance(rule, WeightConverter)]
        names = [rule for rule in self._rules if isinstance(rule, WeightRenaming)]
        self._by_pattern = {pattern: rule for rule in joins for pattern in rule.source_patterns}
        known, prefix = model.state_dict(), model.base_model_prefix
        self.parts: defaultdict[str, list[CheckpointPart]] = defaultdict(list)
        self.unknown: list[str] = []  # in the checkpoint, but not in the model
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = rename_source_key(key, names, joins, prefix, known)
            if name not in known and key in known:
                name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=known)
            if name in known:
                self.parts[name].append(CheckpointPart(key, pattern))
            else:
                self.unknown.append(key)

    def is_joined(self, name: str) -> bool:
        """Whether more than one tensor of the checkpoint makes the parameter, or less than one."""
        return name in self.parts and self.parts[name][0].pattern is not None

    def key(self, name: str) -> str:
        """The name in the checkpoint of a parameter that is not joined."""
        return self.parts[name][0].key

    def to_parameter(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The parameter `name`, from the tensors of the checkpoint that `read` gives by their names there.

        Raises:
            LoraError: the checkpoint keeps it together with other parameters, in one tensor.
        """
        parts = self.parts[name]
        if not self.is_joined(name):
            return read(parts[0].key)
        rule = deepcopy(self._by_pattern[str(parts[0].pattern)])
        for part in parts:
            rule.add_tensor(name, part.key, part.pattern, read(part.key))
        made = rule.convert(name, model=self._model, config=self._model.config)
        if made.keys() != {name}:
            raise LoraError(
                f"the checkpoint keeps {', '.join(sorted(made))} in one tensor, which cannot be merged one by one",
                hint="merge in memory: PEFT's merge_and_unload, then save_pretrained",
            )
        value: Any = made[name]
        joined: Tensor = value[0] if isinstance(value, list) else value
        return joined

    def to_checkpoint(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """The tensors of the checkpoint that the parameter `name` goes back to."""
        if not self.is_joined(name):
            return {self.parts[name][0].key if name in self.parts else name: value}
        self._model._weight_conversions = self._rules
        made: dict[str, Tensor] = revert_weight_conversion(self._model, {name: value})
        if made.keys() != {part.key for part in self.parts[name]}:
            raise AssertionError(f"transformers splits {name} into {sorted(made)}")
        return made
