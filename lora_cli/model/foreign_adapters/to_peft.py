"""Build PEFT's configuration and tensors of low-rank updates from another tool, and compare what PEFT loads with them.

A fused weight of the base gets the factors of its parts in blocks: A has the rows of all parts, and B is zero outside
of each part's own rows. So ΔW is exact, with the sum of the ranks and the same scale.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_cli.errors import LoraError
from lora_cli.model.adapter_files import PREFIX
from lora_cli.model.empty_base import EmptyModel
from lora_cli.model.foreign_adapters.source_adapter import WRONG_BASE_HINT, Base, Piece, Update
from lora_cli.run.read_file import printable

PROBES = 8  # random inputs that each update is compared on
TOLERANCE = 1e-5  # of fp32, relative to the largest output of the module


class Converted(NamedTuple):
    """An adapter in PEFT's format, before it is written."""

    config: LoraConfig
    tensors: dict[str, Tensor]  # by PEFT's name
    ranks: dict[str, int]  # by module


def to_peft(updates: Sequence[Update], base: Base, *, dropout: float) -> Converted:
    """Return PEFT's configuration and tensors; the dtype of each tensor is the source's.

    Args:
        updates: of the modules.
        base: that they were placed on.
        dropout: of the training.

    Raises:
        LoraError: the base has no such module, or one of another shape.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for update in updates:
        rows = _check_shape(update, base)
        a, b = _factors(update, rows)
        key = PREFIX + update.module
        if update.is_embedding:
            tensors |= {f"{key}.lora_embedding_A": _transposed(b), f"{key}.lora_embedding_B": _transposed(a)}
        else:
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        if update.pieces[0].magnitude is not None:
            tensors[f"{key}.lora_magnitude_vector"] = _magnitude(update, rows)
        ranks[update.module] = a.shape[0]
        alphas[update.module] = update.pieces[0].scale * a.shape[0]
    (rank, alpha), _ = Counter(zip(ranks.values(), alphas.values(), strict=True)).most_common(1)[0]
    config = LoraConfig(
        r=rank,
        lora_alpha=_integer(alpha),
        rank_pattern={module: each for module, each in ranks.items() if each != rank},
        alpha_pattern={module: _integer(each) for module, each in alphas.items() if each != alpha},
        target_modules=_target_modules(set(ranks), base),
        lora_dropout=dropout,
        use_dora=any(update.pieces[0].magnitude is not None for update in updates),
        fan_in_fan_out=any(isinstance(base.find(module), Conv1D) for module in ranks),
        bias="none",
        task_type="CAUSAL_LM",
    )
    config.inference_mode = True
    return Converted(config, tensors, ranks)


def _transposed(factor: Tensor) -> Tensor:
    """Return a transposed copy; safetensors does not store tensors that share their memory."""
    return factor.T.clone(memory_format=torch.contiguous_format)


def _integer(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _check_shape(update: Update, base: Base) -> int:
    """Check that the base has the module, in the shape of the update; return the rows of its weight."""
    first, module = update.pieces[0], base.find(update.module)
    weight = getattr(module, "weight", None)
    if not isinstance(module, (nn.Linear, nn.Embedding, Conv1D)) or weight is None:
        raise LoraError(
            f"{printable(first.source)} adapts {printable(update.module)}, which {base.name} does not have",
            hint=WRONG_BASE_HINT,
        )
    rows, columns = reversed(weight.shape) if isinstance(module, Conv1D) else weight.shape
    for piece in update.pieces:
        if piece.a.shape[1] != columns or _last_row(piece) >= rows or (piece.rows is None and piece.b.shape[0] != rows):
            raise LoraError(
                f"{printable(piece.source)} is an update of {piece.b.shape[0]:,}x{piece.a.shape[1]:,}, and "
                f"{update.module} of {base.name} has {rows:,}x{columns:,}",
                hint=WRONG_BASE_HINT,
            )
    return int(rows)


def _last_row(piece: Piece) -> int:
    return piece.b.shape[0] - 1 if piece.rows is None else int(piece.rows.max())


def _factors(update: Update, rows: int) -> tuple[Tensor, Tensor]:
    """Return A [sum of the ranks, in] and B [out, sum of the ranks] of a module, without rounding."""
    if len(update.pieces) == 1 and update.pieces[0].rows is None:
        return update.pieces[0].a.contiguous(), update.pieces[0].b.contiguous()
    a = torch.cat([piece.a for piece in update.pieces])
    b = torch.zeros(rows, a.shape[0], dtype=_common_dtype([piece.b for piece in update.pieces]))
    begin = 0
    for piece in update.pieces:
        end = begin + piece.a.shape[0]
        placed = b.new_zeros(rows, end - begin)
        placed[piece.rows if piece.rows is not None else slice(None)] = piece.b.to(b.dtype)
        b[:, begin:end] = placed
        begin = end
    return a, b


def _common_dtype(parts: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype that has every value of the parts; the factors A and B of a tool may differ in it."""
    return reduce(torch.promote_types, (part.dtype for part in parts))


def _magnitude(update: Update, rows: int) -> Tensor:
    """Return DoRA's magnitudes [out] of a module.

    Raises:
        LoraError: only some rows of a fused weight have one: those of the others are of the base's weights.
    """
    covered = sum(len(piece.b) for piece in update.pieces)
    if covered != rows:
        raise LoraError(
            f"{printable(update.pieces[0].source)} is DoRA of a part of {update.module}, which PEFT adapts as a whole",
            hint="merge it with the tool that trained it",
        )
    magnitudes = [piece.magnitude for piece in update.pieces if piece.magnitude is not None]
    assert len(magnitudes) == len(update.pieces)
    result = torch.zeros(rows, dtype=_common_dtype(magnitudes))
    for piece, magnitude in zip(update.pieces, magnitudes, strict=True):
        result[piece.rows if piece.rows is not None else slice(None)] = magnitude.to(result.dtype)
    return result


def _target_modules(modules: set[str], base: Base) -> list[str]:
    """Return the last parts of the names if they match no other module, as PEFT's users write; else the full names."""
    short = sorted({module.rpartition(".")[2] for module in modules})
    matched = {name for name, _ in base.model.named_modules() if name.rpartition(".")[2] in short}
    return short if matched == modules else sorted(modules)


def compare_with_source(updates: Sequence[Update], loaded: EmptyModel) -> float:
    """Compare each update as PEFT loaded it from the written folder with the source's, on random inputs in fp64.

    Returns:
        The largest difference, relative to the largest output of the module; infinite if PEFT adapts other modules.
    """
    layers = {
        name.removeprefix(PREFIX): layer for name, layer in loaded.model.named_modules() if isinstance(layer, LoraLayer)
    }
    if layers.keys() != {update.module for update in updates}:
        return math.inf
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for update in updates:
        layer = layers[update.module]
        (key,) = layer.scaling
        if update.is_embedding:
            a, b = layer.lora_embedding_B[key].T, layer.lora_embedding_A[key].T
        else:
            a, b = layer.lora_A[key].weight, layer.lora_B[key].weight
        inputs = torch.randn(PROBES, a.shape[1], dtype=torch.float64, generator=generator)
        written = layer.scaling[key] * (inputs @ a.double().T) @ b.double().T
        expected = torch.zeros_like(written)
        for piece in update.pieces:
            output = piece.scale * (inputs @ piece.a.double().T) @ piece.b.double().T
            expected[:, piece.rows if piece.rows is not None else slice(None)] += output
        worst = max(worst, _relative(written - expected, expected))
        if layer.use_dora[key]:
            magnitudes = layer.lora_magnitude_vector[key].weight
            differences = [
                magnitudes[piece.rows if piece.rows is not None else slice(None)] - piece.magnitude
                for piece in update.pieces
            ]
            worst = max(worst, *(_relative(each, magnitudes) for each in differences))
    return worst


def _relative(difference: Tensor, of: Tensor) -> float:
    """Return the largest difference, relative to the largest value of `of`; infinite instead of NaN."""
    size, largest = float(of.abs().max()), float(difference.abs().max())
    result = largest / size if size else largest
    return math.inf if math.isnan(result) else result
