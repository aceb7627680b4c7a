"""Streamed weights: parameters of a model that take no memory; each operation that uses one reads it from its file.

A model with such parameters runs its own forward, whatever its architecture, in the memory of its activations and of
one weight. Products with a matrix read a few of its rows at a time, on several threads, and an embedding reads the rows
of its tokens. All other operations read the full weight.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from lora_cli.model.checkpoint_reader import CheckpointReader, row_blocks

CPU = torch.device("cpu")


class Source(NamedTuple):
    """Where the values of a streamed weight come from."""

    reader: CheckpointReader
    name: str  # of the parameter
    pool: ThreadPoolExecutor  # threads for products, which compute on one core each
    expert: int | None = None  # of a parameter that has all experts of a layer; None for the full parameter


class StreamedWeight(Tensor):
    """A weight whose values are read when an operation uses them; its shape, dtype and device (CPU) are known."""

    source: Source

    @staticmethod
    def __new__(cls, source: Source, shape: tuple[int, ...], dtype: torch.dtype) -> "StreamedWeight":
        """Return a weight of `shape` whose values are cast to `dtype`."""
        weight: StreamedWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=CPU)
        weight.source = source
        return weight

    def read(self) -> Tensor:
        """Return all values."""
        reader, name, _, expert = self.source
        value = reader.read(name) if expert is None else reader.read_expert(name, expert)
        return value.to(self.dtype)

    def has_rows(self) -> bool:
        """Return whether `read_rows` works: whether the rows of the weight are those of a tensor in a file."""
        return self.source.expert is None and self.source.reader.stored(self.source.name) is not None

    def read_rows(self, rows: slice) -> Tensor:
        """Return the values of some rows."""
        return self.source.reader.read_rows(self.source.name, rows.start, rows.stop).to(self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one of `FUNCTIONS` in place of torch's function; all other functions return plain tensors."""
        result = FUNCTIONS[func](*args, **(kwargs or {})) if func in FUNCTIONS else None
        if result is not None:
            return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own subclasses are declared in the same way
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run any operation of torch on the values."""
        if func is torch.ops.aten.detach.default:  # by `weight.data`, and by nn.Parameter
            return args[0]
        args, kwargs = tree_map_only(StreamedWeight, StreamedWeight.read, (args, kwargs or {}))
        return func(*args, **kwargs)


def _linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    """Return x·Wᵀ + b for x [..., in], as [..., out]; None if W is no streamed matrix."""
    if not isinstance(weight, StreamedWeight) or weight.ndim != 2:
        return None
    flat = x.reshape(-1, x.shape[-1])
    product = flat.new_empty(len(flat), weight.shape[0])
    rows_of = weight.read_rows if weight.has_rows() else weight.read().__getitem__

    def multiply(rows: slice) -> None:
        torch.mm(flat, rows_of(rows).T, out=product[:, rows])

    for _ in weight.source.pool.map(multiply, row_blocks(weight.shape)):
        pass
    return (product if bias is None else product + bias).view(*x.shape[:-1], weight.shape[0])


def _embedding(ids: Tensor, weight: Any, *_: Any, **__: Any) -> Tensor | None:
    """Return the rows [..., columns] of the tokens `ids`; None if the rows of the weight cannot be read one by one."""
    if not isinstance(weight, StreamedWeight) or not weight.has_rows():
        return None
    tokens, positions = ids.unique(return_inverse=True)
    return torch.cat([weight.read_rows(slice(token, token + 1)) for token in tokens.tolist()])[positions]


def _expert(weight: Any, index: Any) -> StreamedWeight | None:
    """Return one expert of stacked weights [experts, ...], not read yet; None for any other index."""
    if isinstance(index, Tensor) and index.ndim == 0 and not index.is_floating_point():
        index = int(index)
    if not isinstance(weight, StreamedWeight) or weight.ndim != 3 or not isinstance(index, int):
        return None
    return StreamedWeight(weight.source._replace(expert=index), tuple(weight.shape[1:]), weight.dtype)


FUNCTIONS: dict[Any, Callable[..., Tensor | None]] = {
    functional.linear: _linear,
    functional.embedding: _embedding,
    Tensor.__getitem__: _expert,
}


class Slot(NamedTuple):
    """The place of a parameter or buffer of a model."""

    module: nn.Module
    key: str  # its name there

    @property
    def value(self) -> Tensor:
        """The parameter or buffer."""
        value: Tensor = getattr(self.module, self.key)
        return value


def find_slots(model: nn.Module) -> dict[str, Slot]:
    """Return the place of each parameter and each saved buffer of `model` by its full name; tied ones have several.

    An adapter wraps modules of the model, which changes the names; the places stay the same.
    """
    slots = {
        f"{path}.{key}".removeprefix("."): Slot(module, key)
        for path, module in model.named_modules(remove_duplicate=False)
        for named in (module.named_parameters, module.named_buffers)
        for key, _ in named(recurse=False, remove_duplicate=False)
    }
    return {name: slots[name] for name in model.state_dict() if name in slots}


def stream_weights(
    slots: Mapping[str, Slot], reader: CheckpointReader, *, pool: ThreadPoolExecutor, dtypes: Mapping[str, torch.dtype]
) -> None:
    """Have a model's parameters read from a checkpoint by the operations that use them; its buffers are read now.

    Args:
        slots: of the parameters and buffers to replace; those that the checkpoint lacks are kept.
        reader: of the checkpoint.
        pool: threads for products.
        dtypes: of the floating-point parameters that are not fp32, by name.
    """
    for name, slot in slots.items():
        if not reader.has(name):
            continue
        before = slot.value
        if isinstance(before, nn.Parameter) and before.is_floating_point():
            dtype = dtypes.get(name, torch.float32)
            weight = StreamedWeight(Source(reader, name, pool), tuple(before.shape), dtype)
            setattr(slot.module, slot.key, nn.Parameter(weight, requires_grad=False))
        else:
            before.data = reader.read(name).to(before.dtype)
