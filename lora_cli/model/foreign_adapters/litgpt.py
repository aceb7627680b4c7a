"""Adapters of LitGPT: lit_model.pth.lora, whose fused qkv has factors of its own for q, k and v in two tensors.

lora_A [parts · rank, in] has the rows of the adapted parts of q, k, v one after the other, and lora_B [rows, rank] the
rows of their outputs: all queries, all keys, all values. The scale is lora_alpha / lora_r. Names and layouts of the
bases are those of LitGPT's conversion (scripts/convert_lit_checkpoint.py).
"""

import re
from collections.abc import Mapping
from pathlib import Path
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
    check_part,
    check_rank,
    group_factors,
    read_dropout,
    read_number,
    shape_error,
    unknown_family,
)
from lora_cli.model.foreign_adapters.torch_file import read_torch_file
from lora_cli.recipe.problem import Location, UnreadableRecipe
from lora_cli.recipe.yaml_tree import parse_yaml
from lora_cli.run.read_file import printable, read_text

SUFFIXES: dict[str, Part] = {".lora_A": "a", ".lora_B": "b"}
TRAINING_FILE, MODEL_FILE = "hyperparameters.yaml", "model_config.yaml"
MAX_CONFIG_BYTES = 1 << 20
RESTORE_HINT = "restore it from the folder that litgpt finetune_lora wrote"
MERGE_HINT = "merge it with LitGPT (litgpt merge_lora, then litgpt convert_from_litgpt), and use the merged model"
LAYER = re.compile(r"transformer\.h\.(?P<number>\d+)\.(?P<part>.+)")
# Sizes in model_config.yaml, and their names in transformers.
SIZES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size"}
PARTS = ("query", "key", "value")
QKV = "attn.qkv"


class Layout(NamedTuple):
    """The names of LitGPT's modules in a family of transformers' models."""

    layers: str
    qkv: tuple[str, ...]  # the modules of q, k and v; or one module that fuses them
    modules: Mapping[str, str]
    gate_up: str | None = None  # a module that fuses fc_1 and fc_2
    interleaved: bool = False  # the fused module has q, k, v of the first group of heads, then of the second, ...


LLAMA = Layout(
    "model.layers",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    {
        "attn.proj": "self_attn.o_proj",
        "mlp.fc_1": "mlp.gate_proj",
        "mlp.fc_2": "mlp.up_proj",
        "mlp.proj": "mlp.down_proj",
    },
)
PHI = LLAMA._replace(modules={"attn.proj": "self_attn.dense", "mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2"})
PHI3 = LLAMA._replace(
    qkv=("self_attn.qkv_proj",),
    modules={"attn.proj": "self_attn.o_proj", "mlp.proj": "mlp.down_proj"},
    gate_up="mlp.gate_up_proj",
)
FALCON = Layout(
    "transformer.h",
    ("self_attention.query_key_value",),
    {"attn.proj": "self_attention.dense", "mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h"},
    interleaved=True,
)
GPT_NEOX = FALCON._replace(
    layers="gpt_neox.layers",
    qkv=("attention.query_key_value",),
    modules={**FALCON.modules, "attn.proj": "attention.dense"},
)
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "olmo2"), LLAMA),
    "phi": PHI,
    "phi3": PHI3,
    "falcon": FALCON,
    "gpt_neox": GPT_NEOX,
}


class Heads(NamedTuple):
    """The attention of a model of LitGPT, and which of q, k and v have factors."""

    heads: int
    groups: int  # of queries that share a key
    size: int
    adapted: tuple[bool, bool, bool]

    @property
    def rows(self) -> tuple[int, int, int]:
        """Rows of q, k and v in the fused weight."""
        return self.heads * self.size, self.groups * self.size, self.groups * self.size


def read(found: Found) -> SourceAdapter:
    """Read an adapter of LitGPT: lit_model.pth.lora, hyperparameters.yaml and model_config.yaml.

    Raises:
        LoraError: a file is damaged or missing.
    """
    file, training_file, model_file = found.weights, found.folder / TRAINING_FILE, found.folder / MODEL_FILE
    training, model = _read_yaml(training_file), _read_yaml(model_file)
    rank = int(read_number(training_file, training, "lora_r", hint=RESTORE_HINT, integer=True))
    scale = read_number(training_file, training, "lora_alpha", hint=RESTORE_HINT) / rank
    sizes = [
        int(read_number(model_file, model, key, hint=RESTORE_HINT, integer=True))
        for key in ("n_head", "n_query_groups", "head_size")
    ]
    q, k, v = (training.get(f"lora_{part}") is True for part in PARTS)
    heads = Heads(sizes[0], sizes[1], sizes[2], (q, k, v))
    tensors = read_torch_file(file, inner="model")
    factors = group_factors(file, tensors, SUFFIXES)
    for module, (a, b, _) in factors.items():
        parts = sum(heads.adapted) if module.endswith(QKV) else 1
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != parts * b.shape[1]:
            raise shape_error(file, module, a, b)
        check_rank(file, module, b.shape[1], rank)
    quantize = training.get("quantize")
    notes = (f"LitGPT quantized the base in training ({printable(quantize)})",) if quantize else ()
    return SourceAdapter(
        file,
        _base_name(model),
        len(tensors),
        lambda base: _place(file, factors, scale, heads, _check_sizes(model_file, model, base)),
        read_dropout(training, "lora_dropout"),
        notes,
    )


def _read_yaml(file: Path) -> dict[str, Any]:
    text = read_text(file, limit=MAX_CONFIG_BYTES, hint=RESTORE_HINT)
    try:  # in bounded time and memory: aliases of aliases are values without end
        tree, problems = parse_yaml(text, lambda line: Location(line, f"{file}:{line}"))
    except UnreadableRecipe as error:
        problems = [error.problem]
    if problems:
        line, message = problems[0].location.order, problems[0].message
        raise LoraError(f"{file} is not YAML that is read here: line {line}: {message}", hint=RESTORE_HINT)
    values = tree.plain() if tree is not None else None
    if not isinstance(values, dict):
        raise LoraError(f"{file} has no keys", hint=RESTORE_HINT)
    return values


def _base_name(model: Mapping[str, Any]) -> str | None:
    names = model.get("hf_config")
    if not isinstance(names, dict):
        return None
    name, organization = names.get("name"), names.get("org")
    if not isinstance(name, str) or not name:
        return None
    return f"{organization}/{name}" if isinstance(organization, str) and organization else name


def _check_sizes(file: Path, model: Mapping[str, Any], base: Base) -> Base:
    """Return the base after a comparison of its sizes with those of LitGPT's model.

    Raises:
        LoraError: they differ: rows of q, k and v would be taken for those of other heads.
    """
    for key, ours in SIZES.items():
        expected, found = model.get(key), getattr(base.model.config, ours, None)
        if None not in (expected, found) and expected != found:
            raise LoraError(
                f"{file}: {key}: {printable(expected)}, and {base.name} has {ours}: {found}",
                hint="name the base that it was trained on with --base",
            )
    return base


def _place(file: Path, factors: Mapping[str, Factors], scale: float, heads: Heads, base: Base) -> list[Update]:
    layout = FAMILIES.get(base.model_type)
    if layout is None:
        raise unknown_family("LitGPT", base, FAMILIES, MERGE_HINT)
    pieces: dict[str, list[Piece]] = {}
    for module, (a, b, _) in factors.items():
        match = LAYER.fullmatch(module)
        layer, part = (f"{layout.layers}.{match['number']}", match["part"]) if match else ("", module)
        if part == "lm_head" and not match:
            placed = {base.head: Piece(module, a, b, scale)}
        elif part == QKV:
            placed = _place_qkv(file, module, a, b, scale, heads, layout, layer)
        elif layout.gate_up is not None and part in ("mlp.fc_1", "mlp.fc_2"):
            size = int(base.model.config.intermediate_size)
            check_part(file, module, b.shape[0], size, base)
            first = 0 if part == "mlp.fc_1" else size
            rows = torch.arange(first, first + size)
            placed = {f"{layer}.{layout.gate_up}": Piece(module, a, b, scale, rows)}
        elif part in layout.modules:
            placed = {f"{layer}.{layout.modules[part]}": Piece(module, a, b, scale)}
        else:
            raise LoraError(
                f"{file}: {printable(module)} has no place in {base.name}, which is {base.model_type}", hint=MERGE_HINT
            )
        for target, piece in placed.items():
            pieces.setdefault(target, []).append(piece)
    return [Update(target, tuple(each)) for target, each in pieces.items()]


def _place_qkv(
    file: Path, module: str, a: Tensor, b: Tensor, scale: float, heads: Heads, layout: Layout, layer: str
) -> dict[str, Piece]:
    """Return the pieces of q, k and v by their modules in the base; one piece with all of them where it fuses them."""
    adapted = [(number, rows) for number, rows in enumerate(heads.rows) if heads.adapted[number]]
    if b.shape[0] != sum(rows for _, rows in adapted):
        raise shape_error(file, module, a, b)
    factors_a = a.chunk(len(adapted))
    factors_b = b.split([rows for _, rows in adapted])
    if len(layout.qkv) == 3:
        return {
            f"{layer}.{layout.qkv[number]}": Piece(f"{module} ({PARTS[number]})", part_a.clone(), part_b.clone(), scale)
            for (number, _), part_a, part_b in zip(adapted, factors_a, factors_b, strict=True)
        }
    rank = b.shape[1]
    fused = b.new_zeros(b.shape[0], rank * len(adapted))
    begin = 0
    for number, part_b in enumerate(factors_b):
        fused[begin : begin + len(part_b), number * rank : (number + 1) * rank] = part_b
        begin += len(part_b)
    place = _interleaved_rows(heads) if layout.interleaved else torch.arange(sum(heads.rows))
    starts = [sum(heads.rows[:number]) for number in range(3)]
    rows = torch.cat([place[starts[number] : starts[number] + size] for number, size in adapted])
    return {f"{layer}.{layout.qkv[0]}": Piece(module, a, fused, scale, rows)}


def _interleaved_rows(heads: Heads) -> Tensor:
    """Return for each row of [all q, all k, all v] its row in [q, k, v of group 0, q, k, v of group 1, ...]."""
    rows = torch.arange(sum(heads.rows))
    groups = [part.view(heads.groups, -1) for part in rows.split(heads.rows)]
    return torch.cat(groups, dim=1).reshape(-1).argsort()
