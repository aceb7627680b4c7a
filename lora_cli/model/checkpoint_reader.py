"""Read single parameters of a model from its checkpoint: in full, some rows, or one expert, without loading the model.

A parameter has a name in the model. The checkpoint may store it under another key, in several tensors, with fewer rows,
or once for several tied names.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lora_cli.model.conversion import CheckpointMapping
from lora_cli.model.safetensors_io import ShardFiles, TensorInfo

BLOCK_WEIGHTS = 1 << 19  # weights per block: few enough that their fp32 copies stay in the CPU caches

Transforms = Mapping[str, Callable[[Tensor], Tensor]]  # by parameter name: applied to the value that is stored


class CheckpointReader:
    """Reads the parameters of one checkpoint by their names in the model; several threads may use it."""

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        mapping: CheckpointMapping,
        files: ShardFiles,
        *,
        tied: Iterable[Sequence[str]],
        shapes: Mapping[str, tuple[int, ...]],
        transforms: Transforms,
    ) -> None:
        """Open the files of the checkpoint.

        Args:
            tensors: of the checkpoint, by key.
            mapping: from the model's parameters to the keys.
            files: opens them for reading.
            tied: groups of names that are one parameter of the model.
            shapes: of the parameters in the model, by name; those that are left out have the shape that is stored. One
                with more rows than are stored gets the mean row, which new tokens start from.
            transforms: of stored values, to values of the same shape.
        """
        self.tensors, self.transforms = tensors, transforms
        self._mapping, self._keys = mapping, mapping.keys(tied)
        self._files, self._shapes = files, shapes
        self._mean_rows: dict[str, Tensor] = {}
        for stored in tensors.values():
            files.open(stored.file)  # only one thread may open a file

    def has(self, name: str) -> bool:
        """Return whether the checkpoint has the parameter `name`."""
        return bool(self.keys_of(name))

    def keys_of(self, name: str) -> tuple[str, ...]:
        """Return the keys of the tensors that the parameter `name` is stored in; none if the checkpoint lacks it."""
        if self._mapping.is_joined(name):
            return tuple(part.key for part in self._mapping.parts[name])
        return (self._keys[name],) if name in self._keys else ()

    def stored(self, name: str) -> TensorInfo | None:
        """Return the tensor that has the values of the parameter `name`, or its first rows; None if there is none."""
        return None if name in self.transforms or name not in self._keys else self.tensors[self._keys[name]]

    def read(self, name: str) -> Tensor:
        """Return the parameter `name`, in its shape in the model, in the dtype that is stored or transformed to.

        Raises:
            LoraError: the checkpoint stores the parameter in one tensor together with others, or a file is incomplete.
        """
        if self._mapping.is_joined(name):
            value = self._mapping.to_parameter(name, self._read_key)
        else:
            value = self._read_key(self._keys[name])
            shape = self._shapes.get(name, tuple(value.shape))
            if has_new_rows(tuple(value.shape), shape):
                value = value.float()
                return torch.cat([value, self._mean_row(name, value).expand(shape[0] - len(value), -1)])
        return self.transforms[name](value) if name in self.transforms else value

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return [stop - start, ...] of a parameter that is stored: in the dtype of the file, new rows in fp32.

        Raises:
            LoraError: the file is incomplete.
        """
        stored = self.tensors[self._keys[name]]
        last = stored.shape[0]
        if stop <= last:
            return self._files.read_rows(stored, start, stop)
        own = self._files.read_rows(stored, min(start, last), last).float()
        return torch.cat([own, self._mean_row(name).expand(stop - max(start, last), -1)])

    def read_expert(self, name: str, index: int) -> Tensor:
        """Return one expert of a parameter that has all experts of a layer, in the dtype that is stored."""
        if self.stored(name) is not None:
            return self.read_rows(name, index, index + 1)[0]
        if name not in self.transforms:
            expert = self._mapping.to_expert(name, index, self._read_key)
            if expert is not None:
                return expert
        return self.read(name)[index]

    def _mean_row(self, name: str, value: Tensor | None = None) -> Tensor:
        if name not in self._mean_rows:
            value = self._read_key(self._keys[name]).float() if value is None else value
            self._mean_rows[name] = value.mean(dim=0, keepdim=True)
        return self._mean_rows[name]

    def _read_key(self, key: str) -> Tensor:
        return self._files.read_tensor(self.tensors[key])


def has_new_rows(stored: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Return whether a tensor of shape `stored` lacks only the last rows of a parameter of shape `expected`."""
    return len(stored) == len(expected) and stored[1:] == expected[1:] and stored[:1] < expected[:1]


def row_blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Yield slices of the rows of a tensor, each of at most `BLOCK_WEIGHTS` weights, or of one row."""
    rows = max(1, BLOCK_WEIGHTS // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))
