"""Adapters of torchtune: adapter_model.pt or adapter_N.pt in torchtune's own names, next to adapter_config.json.

Its rotary embeddings pair neighboring dimensions of a head, as Meta's original weights do, where transformers pairs
both halves. torchtune reorders the rows of q and k when it loads such a base, so the rows of their factors B, and of
DoRA's magnitudes, are reordered back here. torchtune's own copy in PEFT's format leaves the magnitudes as they are.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_cli.errors import LoraError
from lora_cli.model.foreign_adapters.detect import Found
from lora_cli.model.foreign_adapters.source_adapter import (
    Base,
    Factors,
    Part,
    Piece,
    SourceAdapter,
    Update,
    check_magnitude,
    check_part,
    check_rank,
    group_factors,
    read_number,
    shape_error,
    unknown_family,
)
from lora_cli.model.foreign_adapters.torch_file import read_torch_file
from lora_cli.run.folder import CONFIG_FILE
from lora_cli.run.read_file import printable, read_json_object

SUFFIXES: dict[str, Part] = {".lora_a.weight": "a", ".lora_b.weight": "b", ".magnitude": "magnitude"}
MAX_CONFIG_BYTES = 8 << 20
CONFIG_HINT = 'write {"r": 8, "lora_alpha": 16} with the values of the training into adapter_config.json'
MERGE_HINT = "let torchtune save the merged model (save_adapter_weights_only: False), and use that"
LAYER = re.compile(r"layers\.(?P<number>\d+)\.(?P<part>.+)")
HEAD = "output"


class Layout(NamedTuple):
    """The names of torchtune's modules in a family of transformers' models."""

    permutes: bool  # the rows of q and k are in the order of Meta's rotary embeddings
    modules: Mapping[str, str]
    fused: Mapping[str, tuple[str, int]] = MappingProxyType({})  # the module that fuses it, and its place there


LLAMA = Layout(
    True,
    {
        "attn.q_proj": "self_attn.q_proj",
        "attn.k_proj": "self_attn.k_proj",
        "attn.v_proj": "self_attn.v_proj",
        "attn.output_proj": "self_attn.o_proj",
        "mlp.w1": "mlp.gate_proj",
        "mlp.w2": "mlp.down_proj",
        "mlp.w3": "mlp.up_proj",
    },
)
PHI3 = Layout(
    False,
    {"attn.output_proj": "self_attn.o_proj", "mlp.w2": "mlp.down_proj"},
    {
        "attn.q_proj": ("self_attn.qkv_proj", 0),
        "attn.k_proj": ("self_attn.qkv_proj", 1),
        "attn.v_proj": ("self_attn.qkv_proj", 2),
        "mlp.w1": ("mlp.gate_up_proj", 0),
        "mlp.w3": ("mlp.gate_up_proj", 1),
    },
)
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "gemma", "gemma2"), LLAMA),
    "qwen2": LLAMA._replace(permutes=False),
    "phi3": PHI3,
}


def read(found: Found) -> SourceAdapter:
    """Read an adapter of torchtune: its file of weights, and adapter_config.json next to it.

    Raises:
        LoraError: a file is damaged or missing.
    """
    file, config_file = found.weights, found.folder / CONFIG_FILE
    if not os.path.lexists(config_file):
        raise LoraError(
            f"{found.folder} has no {CONFIG_FILE}, without which the scale of the updates is unknown", hint=CONFIG_HINT
        )
    config = read_json_object(config_file, limit=MAX_CONFIG_BYTES)
    rank = int(read_number(config_file, config, "r", hint=CONFIG_HINT, integer=True))
    scale = read_number(config_file, config, "lora_alpha", hint=CONFIG_HINT) / rank
    tensors = read_torch_file(file)
    if any(name.startswith("base_model.") for name in tensors):
        raise LoraError(f"{file} has the names of PEFT, not of torchtune", hint="convert it with --from bin")
    factors = group_factors(file, tensors, SUFFIXES)
    for module, (a, b, magnitude) in factors.items():
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise shape_error(file, module, a, b)
        check_magnitude(file, module, magnitude, b.shape[0])
        check_rank(file, module, a.shape[0], rank)
    base = config.get("base_model_name_or_path")
    name = base if isinstance(base, str) and base else None
    return SourceAdapter(file, name, len(tensors), lambda base: _place(file, factors, scale, base))


def _place(file: Path, factors: Mapping[str, Factors], scale: float, base: Base) -> list[Update]:
    layout = FAMILIES.get(base.model_type)
    if layout is None:
        raise unknown_family("torchtune", base, FAMILIES, MERGE_HINT)
    config = base.model.config
    heads = {"attn.q_proj": config.num_attention_heads, "attn.k_proj": config.num_key_value_heads}
    pieces: dict[str, list[Piece]] = {}
    for module, (a, b, magnitude) in factors.items():
        match = LAYER.fullmatch(module)
        layer, part = (f"model.layers.{match['number']}", match["part"]) if match else ("", module)
        rows = None
        if part == HEAD and not match:
            target = base.head
        elif part in layout.fused:
            fused, place = layout.fused[part]
            target = f"{layer}.{fused}"
            part_rows = _rows_of_part(part, place, config)
            check_part(file, module, b.shape[0], len(part_rows), base)
            rows = torch.tensor(part_rows)
        elif part in layout.modules:
            target = f"{layer}.{layout.modules[part]}"
            if layout.permutes and part in heads:
                if b.shape[0] % (2 * heads[part]):
                    raise shape_error(file, module, a, b)
                rows = _rows_of_halves(b.shape[0], heads[part])
        else:
            raise LoraError(
                f"{file}: {printable(module)} has no place in {base.name}, which is {base.model_type}", hint=MERGE_HINT
            )
        if magnitude is not None and getattr(base.find(target), "bias", None) is not None:
            raise LoraError(
                f"{file}: {printable(module)} is DoRA of a layer with a bias: torchtune scales the bias too, and PEFT "
                "does not",
                hint=MERGE_HINT,
            )
        pieces.setdefault(target, []).append(Piece(module, a, b, scale, rows, magnitude))
    return [Update(target, tuple(each)) for target, each in pieces.items()]


def _rows_of_part(part: str, place: int, config: Any) -> range:
    """Return the rows of a part of a fused weight."""
    if part.startswith("mlp."):
        return range(place * config.intermediate_size, (place + 1) * config.intermediate_size)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    ends = (0, queries, queries + keys, queries + 2 * keys)
    return range(ends[place], ends[place + 1])


def _rows_of_halves(rows: int, heads: int) -> Tensor:
    """Return for each row of q or k in torchtune its row in transformers.

    Dimension 2i + j of a head (j of 0 and 1: a pair that is rotated) is dimension i of half j in transformers.
    """
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1).argsort()
