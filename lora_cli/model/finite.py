"""Find weights that are not finite (NaN or infinite): a model with one of them answers nothing, and teaches nothing.

Each value is read once more, at the speed of memory, where it is in memory anyway: after a model was loaded, while a
tensor is copied, merged or exported, and before a weight is quantized, which hides it.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.errors import LoraError
from lora_cli.model.safetensors_header import StoredTensor
from lora_cli.model.safetensors_io import DTYPES
from lora_cli.run.read_file import open_regular, printable

NOT_FINITE_HINT = "fetch the model again, or give another one: with such weights it computes NaN"
BLOCK_BYTES = 16 << 20  # a multiple of every item size
BLOCK_VALUES = 1 << 22  # of a tensor that has a dtype which torch does not compare


def is_finite(values: Tensor) -> bool:
    """Return whether no value of a tensor, of any shape, dtype and device, is NaN or infinite."""
    return first_not_finite([("", values)]) is None


@torch.no_grad()
def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor with a value that is NaN or infinite; None if all are finite.

    The results of all tensors are fetched together: on a GPU, each fetch waits for the device.
    """
    names: list[str] = []
    flags: list[Tensor] = []
    for name, values in tensors:
        for part in _parts(values.detach()):
            names.append(name)
            # One pass without temporary tensors: a NaN is the smallest and the largest value.
            flags.append(torch.stack(torch.aminmax(part)).isfinite().all())
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
    return next((name for name, is_good in zip(names, finite, strict=True) if not is_good), None)


def describe_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that is not finite, and what it has: `lora_A has NaN`; None if all are."""
    name = first_not_finite(tensors.items())
    return None if name is None else f"{name} has {'NaN' if bool(tensors[name].isnan().any()) else 'an infinity'}"


def _parts(values: Tensor) -> Iterator[Tensor]:
    """Yield the values in parts that torch.aminmax accepts; nothing for integers and empty tensors."""
    if not values.is_floating_point() or not values.numel():
        return
    if values.dtype.itemsize > 1:
        yield values
    else:  # float8
        yield from (block.float() for block in values.reshape(-1).split(BLOCK_VALUES))


def stored_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a loaded model that have floating-point values, and the scales of quantized ones."""
    for name, parameter in model.named_parameters():
        weight: Any = parameter
        state = getattr(weight, "quant_state", None)
        if state is not None:  # 4 bits; the codes of 16-bit storage are no numbers
            yield name, state.absmax
            if state.nested:
                yield name, state.state2.absmax
                yield name, state.offset
        elif getattr(weight, "SCB", None) is not None:  # 8 bits
            yield name, weight.SCB
        else:
            yield name, parameter


def not_finite_error(name: str, where: Path | str) -> LoraError:
    """Return the error for a tensor of a model or of one of its files."""
    return LoraError(
        f"{where}: {name} has values that are not finite (NaN or infinite)",
        hint=NOT_FINITE_HINT,
    )


def check_finite(tensors: Mapping[str, StoredTensor], *, hint: str) -> None:
    """Check every value of the floating-point tensors.

    Args:
        tensors: of one or more files, by name.
        hint: what the user can do.

    Raises:
        LoraError: a value is not finite, or the dtype of a tensor is not one that torch computes with.
    """
    for name, stored in tensors.items():
        dtype = DTYPES.get(stored.dtype)
        if dtype is None:
            raise LoraError(f"{stored.file}: {printable(name)} has the unsupported dtype {stored.dtype}", hint=hint)
        if not dtype.is_floating_point:
            continue
        bad, first = _count_not_finite(stored, dtype)
        if bad:
            values = f"{bad:,} of {stored.size // dtype.itemsize:,} values" if bad > 1 else "a value"
            raise LoraError(
                f"{stored.file}: {printable(name)} has {values} that {'are' if bad > 1 else 'is'} not finite ({first})",
                hint=hint,
            )


def _count_not_finite(stored: StoredTensor, dtype: torch.dtype) -> tuple[int, float]:
    """Return how many values of a tensor are not finite, and the first of them."""
    bad, first, left = 0, 0.0, stored.size
    with open_regular(stored.file) as file:
        file.seek(stored.begin)
        while left:
            block = file.read(min(BLOCK_BYTES, left))
            if not block:
                raise LoraError(f"{stored.file}: ended while it was read", hint="fetch it again", exit_code=1)
            left -= len(block)
            values = torch.frombuffer(bytearray(block), dtype=dtype)
            if dtype.itemsize == 1:  # torch has no isfinite for 8-bit floating-point numbers
                values = values.float()
            wrong = values[~values.isfinite()]
            if not bad and len(wrong):
                first = float(wrong[0])
            bad += len(wrong)
    return bad, first
