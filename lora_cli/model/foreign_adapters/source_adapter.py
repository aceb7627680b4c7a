"""What a reader of another tool's adapter returns, and the checks that all readers share: pairs of factors, numbers."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.errors import LoraError
from lora_cli.model.finite import describe_not_finite
from lora_cli.run.read_file import printable

DAMAGED_HINT = "fetch the adapter again, or take an earlier checkpoint"
WRONG_BASE_HINT = "name the base that it was trained on with --base"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Part = Literal["a", "b", "magnitude"]


class Factors(NamedTuple):
    """The tensors of one module in the source's file, as they are there."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None


class Piece(NamedTuple):
    """A low-rank update of some rows of one weight of the base: ΔW[rows] = scale · b @ a, in PEFT's orientation."""

    source: str  # name of the module in the source's file
    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    scale: float
    rows: Tensor | None = (
        None  # [out]: the row of the base's weight for each row of b; None for all rows in their order
    )
    magnitude: Tensor | None = None  # [out], of DoRA


class Update(NamedTuple):
    """The update of one module of the base: one piece, or several if the base fuses what the source has apart."""

    module: str  # full name in the base
    pieces: tuple[Piece, ...]
    is_embedding: bool = False  # ΔW [rows, in] is of the embeddings' weight


class Base(NamedTuple):
    """The base that the adapter is converted for: its modules without weights."""

    name: str  # the user's
    model: PreTrainedModel

    @property
    def model_type(self) -> str:
        """Architecture, by transformers' name."""
        return str(self.model.config.model_type)

    @property
    def head(self) -> str:
        """Full name of the output head."""
        head = self.model.get_output_embeddings()
        return next((name for name, module in self.model.named_modules() if module is head), "lm_head")

    def find(self, module: str) -> nn.Module | None:
        """Return a module by its full name; None if the base has no such module."""
        return dict(self.model.named_modules()).get(module)


class SourceAdapter(NamedTuple):
    """An adapter of another tool, read and checked on its own."""

    file: Path  # of its weights
    base: str | None  # path or hub id that its configuration names
    tensors: int  # in the file; `place` uses each of them
    place: Callable[[Base], list[Update]]  # onto the modules of the base; raises LoraError
    dropout: float = 0.0  # in training
    notes: tuple[str, ...] = ()  # for the user


def group_factors(file: Path, tensors: Mapping[str, Tensor], suffixes: Mapping[str, Part]) -> dict[str, Factors]:
    """Return the tensors of a file by module.

    Args:
        file: for messages.
        tensors: of the file, by name.
        suffixes: endings of the names behind the module's name.

    Raises:
        LoraError: there are none, one is not finite or not a matrix of floats, has another name, or is alone.
    """
    if not tensors:
        raise LoraError(f"{file} has no tensors", hint=DAMAGED_HINT)
    modules: dict[str, dict[Part, Tensor]] = {}
    for name, tensor in tensors.items():
        suffix = next((each for each in suffixes if name.endswith(each)), None)
        if suffix is None:
            raise LoraError(
                f"{file}: {printable(name)} is not a tensor of LoRA: its name ends in none of {', '.join(suffixes)}",
                hint="only adapters can be converted: weights that were trained in full cannot",
            )
        if tensor.dtype not in FLOATS:
            raise LoraError(f"{file}: {printable(name)} is of {tensor.dtype}, not of floats", hint=DAMAGED_HINT)
        if not _fits_float32(tensor):
            raise LoraError(
                f"{file}: {printable(name)} has values that float32 does not have, and adapters are computed in it",
                hint=DAMAGED_HINT,
            )
        modules.setdefault(name.removesuffix(suffix), {})[suffixes[suffix]] = tensor
    if (problem := describe_not_finite(tensors)) is not None:
        raise LoraError(f"{file}: {printable(problem)}: such an adapter computes nothing", hint=DAMAGED_HINT)
    factors = {}
    for module, parts in modules.items():
        if missing := {"a", "b"} - parts.keys():
            ending = next(suffix for suffix, part in suffixes.items() if part in missing)
            raise LoraError(f"{file}: {printable(module)} has no {ending.lstrip('.')}", hint=DAMAGED_HINT)
        a, b, magnitude = parts["a"], parts["b"], parts.get("magnitude")
        if 0 in (*a.shape, *b.shape):
            raise shape_error(file, module, a, b)
        factors[module] = Factors(a, b, magnitude)
    if len({each.magnitude is None for each in factors.values()}) > 1:
        without = next(module for module, each in factors.items() if each.magnitude is None)
        raise LoraError(f"{file}: {printable(without)} has no magnitude of DoRA, as others have", hint=DAMAGED_HINT)
    return factors


def _fits_float32(tensor: Tensor) -> bool:
    """Return whether float32 has the largest value of a tensor; of values that are not finite, it has them all."""
    if tensor.dtype != torch.float64 or not tensor.numel():
        return True
    largest, bounds = float(tensor.abs().max()), torch.finfo(torch.float32)
    return largest == 0 or not math.isfinite(largest) or bounds.tiny <= largest <= bounds.max


def shape_error(file: Path, module: str, a: Tensor, b: Tensor) -> LoraError:
    """Return the error of two factors that do not go together."""
    shapes = " and ".join("x".join(map(str, each.shape)) or "a single number" for each in (a, b))
    return LoraError(f"{file}: {printable(module)} has factors of {shapes}, which are no pair", hint=DAMAGED_HINT)


def check_magnitude(file: Path, module: str, magnitude: Tensor | None, outputs: int) -> None:
    """Raise if there are magnitudes of DoRA that are not one for each output of the module.

    Raises:
        LoraError: they are not.
    """
    if magnitude is not None and magnitude.shape != (outputs,):
        shape = "x".join(map(str, magnitude.shape)) or "a single number"
        raise LoraError(
            f"{file}: {printable(module)} has magnitudes of DoRA of shape {shape}, for {outputs:,} outputs",
            hint=DAMAGED_HINT,
        )


def check_part(file: Path, module: str, outputs: int, expected: int, base: Base) -> None:
    """Raise if a module has another number of outputs than its part of a fused weight of the base has rows.

    Raises:
        LoraError: it has.
    """
    if outputs != expected:
        raise LoraError(
            f"{file}: {printable(module)} has {outputs:,} outputs, and {base.name} has {expected:,} there",
            hint=WRONG_BASE_HINT,
        )


def check_rank(file: Path, module: str, rank: int, expected: int) -> None:
    """Raise if a factor has another rank than the configuration says.

    Raises:
        LoraError: it has.
    """
    if rank != expected:
        raise LoraError(
            f"{file}: {printable(module)} has rank {rank:,}, and its configuration says {expected:,}",
            hint="restore both from one adapter",
        )


def read_number(file: Path, values: Mapping[str, Any], key: str, *, hint: str, integer: bool = False) -> float:
    """Return a positive number of a configuration.

    Raises:
        LoraError: it is missing, or not such a number.
    """
    value = values.get(key)
    if value is None:
        raise LoraError(f"{file} has no {key}, without which the size of the updates is unknown", hint=hint)
    kinds = (int,) if integer else (int, float)
    if (
        type(value) not in kinds
        or not 1e-12 <= abs(value) <= 1e12  # nor of NaN; an integer can be beyond every float
        or (integer and value < 1)
    ):
        kind = "an integer above 0" if integer else "a number from 1e-12 to 1e12"
        raise LoraError(f"{file}: {key}: {printable(value)} is not {kind}", hint=hint)
    return float(value)


def read_dropout(values: Mapping[str, Any], key: str) -> float:
    """Return the dropout of a configuration; 0 if it has none: it has no effect after training."""
    value = values.get(key)
    return float(value) if isinstance(value, (int, float)) and 0 <= value < 1 else 0.0


def unknown_family(tool: str, base: Base, known: Mapping[str, Any], way_out: str) -> LoraError:
    """Return the error of an architecture whose names and layout in `tool` are not known."""
    return LoraError(
        f"{base.name} is {base.model_type}, whose layers in {tool} are not known here: {', '.join(sorted(known))} are",
        hint=way_out,
    )
