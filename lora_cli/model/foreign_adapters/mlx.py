"""Adapters of mlx-lm: LoRA and DoRA whose factors are transposed, scaled by `scale` itself, not by alpha over rank.

mlx-lm computes y + scale · (x @ lora_a) @ lora_b, with lora_a [in, rank] and lora_b [rank, out]; for embeddings
lora_a [rows, rank] and lora_b [rank, size]. DoRA's magnitude m [out] is that of PEFT: m / ‖W + ΔW‖, without the bias.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from lora_cli.errors import LoraError
from lora_cli.model.foreign_adapters.detect import Found
from lora_cli.model.foreign_adapters.npz_file import read_npz
from lora_cli.model.foreign_adapters.source_adapter import (
    DAMAGED_HINT,
    Base,
    Factors,
    Part,
    Piece,
    SourceAdapter,
    Update,
    check_magnitude,
    check_rank,
    group_factors,
    read_dropout,
    read_number,
    shape_error,
    unknown_family,
)
from lora_cli.model.safetensors_header import read_header
from lora_cli.model.target_modules import layer_index
from lora_cli.run.folder import CONFIG_FILE
from lora_cli.run.read_file import printable, read_json_object

SUFFIXES: dict[str, Part] = {".lora_a": "a", ".lora_b": "b", ".m": "magnitude"}
MAX_CONFIG_BYTES = 8 << 20
# The architectures whose layers are the same in mlx-lm and transformers, with the prefixes of names that differ. The
# weights of some others are changed when mlx-lm loads them: those of Falcon-H1 are multiplied, for example.
SAME: dict[str, str] = {}
HEAD = "the head"  # in place of its name, which transformers has changed
FAMILIES: dict[str, dict[str, str]] = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "phi", "cohere", "cohere2", "granite"),
            *("olmo2", "smollm3", "starcoder2", "stablelm", "gemma3_text"),
        ),
        SAME,
    ),
    "gemma3": {"language_model.model.": "model.language_model.", "language_model.": ""},
    "gpt2": {"model.": "transformer."},
    "gpt_neox": {"model.h.": "gpt_neox.layers.", "model.embed_out": HEAD, "model.": "gpt_neox."},
}
FUSE_HINT = "fuse it with mlx-lm (mlx_lm.fuse --dequantize), and use the fused model"


def read(found: Found) -> SourceAdapter:
    """Read an adapter of mlx-lm: its weights, and adapter_config.json next to them.

    Raises:
        LoraError: a file is damaged or missing, or it is no adapter.
    """
    file, config_file = found.weights, found.folder / CONFIG_FILE
    if not os.path.lexists(config_file):
        raise LoraError(
            f"{found.folder} has no {CONFIG_FILE}, without which the scale of the updates is unknown",
            hint='write it, with the values of the training: {"model": "ORG/NAME", "num_layers": 16, '
            '"lora_parameters": {"rank": 8, "scale": 20.0}}',
        )
    config = read_json_object(config_file, limit=MAX_CONFIG_BYTES)
    kind = config.get("fine_tune_type", "dora" if config.get("use_dora") is True else "lora")
    if kind not in ("lora", "dora"):
        raise LoraError(
            f"{config_file}: fine_tune_type: {printable(kind)} is no adapter of LoRA or DoRA", hint=FUSE_HINT
        )
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise LoraError(f"{config_file} has no lora_parameters", hint="restore it; mlx-lm writes rank and scale there")
    scale, notes = _scale(config_file, config, parameters)
    rank = read_number(config_file, parameters, "rank", hint="write the rank of the training", integer=True)
    tensors = _tensors(file)
    factors = group_factors(file, tensors, SUFFIXES)
    for module, each in factors.items():
        if each.a.dim() == 3:
            raise LoraError(
                f"{file}: {printable(module)} adapts the stacked experts of a mixture, which is not converted",
                hint=FUSE_HINT,
            )
        if each.a.dim() != 2 or each.b.dim() != 2 or each.a.shape[1] != each.b.shape[0]:
            raise shape_error(file, module, each.a, each.b)
        check_magnitude(file, module, each.magnitude, each.b.shape[1])
        check_rank(file, module, each.a.shape[1], int(rank))
    notes = (*notes, *_note_on_layers(config, factors))
    if (kind == "dora") != any(each.magnitude is not None for each in factors.values()):
        has = "has no magnitudes of DoRA" if kind == "dora" else "has magnitudes of DoRA"
        raise LoraError(f"{config_file} says {kind}, and {file.name} {has}", hint="restore both from one adapter")
    base = config.get("model")
    return SourceAdapter(
        file,
        base if isinstance(base, str) and base else None,
        len(tensors),
        lambda base: _place(file, factors, scale, base),
        read_dropout(parameters, "dropout"),
        notes,
    )


def _tensors(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".npz":
        return read_npz(file)
    read_header(file, hint=DAMAGED_HINT)  # the library's own errors name no file
    return load_file(file)


def _scale(file: Path, config: Mapping[str, Any], parameters: Mapping[str, Any]) -> tuple[float, tuple[str, ...]]:
    """Return the factor of the updates, and notes on it.

    Up to 0.13 mlx-lm multiplied by scale · alpha / rank, and since then by scale, whatever alpha is; its defaults had
    an alpha until 2025. Configurations with num_layers or use_dora are from the later versions.
    """
    hint = "write the scale of the training (mlx-lm's default is 20.0)"
    scale = read_number(file, parameters, "scale", hint=hint)
    alpha, rank = parameters.get("alpha"), parameters.get("rank")
    if alpha is None or alpha == rank:
        return scale, ()
    if "num_layers" in config or "use_dora" in config:
        return scale, (f"mlx-lm does not use alpha: {printable(alpha)} of its configuration, only scale: {scale:g}",)
    alpha = read_number(file, parameters, "alpha", hint="remove it, or write the alpha of the training")
    rank = read_number(file, parameters, "rank", hint="write the rank of the training", integer=True)
    raise LoraError(
        f"{file} has scale and alpha: mlx-lm up to 0.13 multiplied the updates by {scale * alpha / rank:g}, later "
        f"versions by {scale:g}, and the file does not tell which one wrote it",
        hint="remove alpha from lora_parameters, and set scale to the factor of the version that trained it",
    )


def _note_on_layers(config: Mapping[str, Any], factors: Mapping[str, Factors]) -> tuple[str, ...]:
    """Return a note if the file does not adapt as many layers as the configuration says, as mlx-lm 0.19 wrote them."""
    count = config.get("num_layers", config.get("lora_layers"))
    layers = {number for module in factors if (number := layer_index(module)) is not None}
    if type(count) is not int or count < 0 or len(layers) == count:
        return ()
    return (f"the configuration says {count} layers, and the file adapts {len(layers)}: all of these are converted",)


def _place(file: Path, factors: Mapping[str, Factors], scale: float, base: Base) -> list[Update]:
    if base.model_type not in FAMILIES:
        raise unknown_family("mlx-lm", base, FAMILIES, FUSE_HINT)
    prefixes = FAMILIES[base.model_type]
    updates = []
    for module, (a, b, magnitude) in factors.items():
        prefix = next((each for each in prefixes if module.startswith(each)), "")
        name = (prefixes.get(prefix, "") + module.removeprefix(prefix)).replace(HEAD, base.head)
        found = base.find(name)
        if not isinstance(found, nn.Embedding):
            piece = Piece(module, a.T.contiguous(), b.T.contiguous(), scale, magnitude=magnitude)
            updates.append(Update(name, (piece,)))
            continue
        if magnitude is not None:
            raise LoraError(
                f"{file}: {printable(module)} is DoRA of embeddings, which PEFT computes otherwise", hint=FUSE_HINT
            )
        piece = Piece(module, b, a, scale)
        updates.append(Update(name, (piece,), is_embedding=True))
        if base.model.config.tie_word_embeddings:
            # In mlx-lm a tied head is the embeddings' layer, with its update; in PEFT it is a layer of its own.
            updates.append(Update(base.head, (piece,)))
    return updates
