"""Damages of an adapter folder, drawn by a random generator: DAMAGES, by the part of the folder that they change."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
HUGE = float("1e400")
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**40, 10**30, 0.5, -0.5, float("nan"), HUGE, -HUGE, "", "16", "none", "é" * 3000,
    "\x00", "\ud800", "\x1b[2J", "LORA", [], [None], [1], ["q_proj"], ["q_proj", 1], [[]], {}, {"q_proj": 2},
    {"q_proj": None}, {"": ""}, {"q_proj": 10**9},
]  # fmt: skip
# Values of one key that look like those of other adapters.
PLAUSIBLE: dict[str, list[Any]] = {
    "target_modules": [
        "all-linear", r".*\.(q|v)_proj", r"(\w+\.?)+!", r"([a-z.]+)*\d", "(", "a{99999999999}", ["q_proj", "("],
        ["q_proj", "lm_head"], ["model.layers.0.self_attn.q_proj"],
    ],
    "exclude_modules": [r"(\w+\.?)+!", "(", ["q_proj"], ".*"],
    "modules_to_save": [["lm_head"], ["(" ], [r"(\w+\.?)+!"], ["score"], ["nowhere"]],
    "rank_pattern": [{"q_proj": 4}, {"(": 4}, {r"(\w+\.?)+!": 4}, {"q_proj": 8}, {"q_proj": "4"}, {"q_proj": 10**9}],
    "alpha_pattern": [{"q_proj": 8}, {"(": 8}, {r"(\w+\.?)+!": 4}, {"q_proj": float("nan")}, {"q_proj": "8"}],
    "layers_to_transform": [0, [0], [7], ["0"], [0.5], [-1]],
    "layers_pattern": ["layers", "(", r"(\w+\.?)+!", ["layers"]],
    "base_model_name_or_path": [
        "/nowhere/base", "../base", "../" * 300, "org/base", ".", "/", "a" * 5000, "rows.jsonl", "runs/other/adapter",
        "base\n", "tiny-llama/model.safetensors",
    ],
    "peft_type": ["LOHA", "ADALORA", "PREFIX_TUNING", "P_TUNING", "XLORA", "lora", "IA3", "VERA"],
    "task_type": ["SEQ_CLS", "CAUSAL_LM", "TOKEN_CLS", "FEATURE_EXTRACTION", "causal_lm"],
    "init_lora_weights": ["gaussian", "pissa", "eva", "foo", "loftq", False],
    "bias": ["all", "lora_only", "some"],
    "revision": ["main", "../..", "v1"],
    "r": [2, 8, 4096, 4.0],
    "lora_alpha": [8.0, 9, 0, -8, 1e-320, 1e300],
    "lora_dropout": [2, 1.0],
    "use_dora": [True],
    "use_rslora": [True],
    "fan_in_fan_out": [True],
    "lora_bias": [True],
    "target_parameters": [["q_proj.weight"], ["model.layers.0.self_attn.q_proj.weight"]],
    "trainable_token_indices": [[1], [10**9], {"embed_tokens": [1]}, {"embed_tokens": [-1]}],
    "auto_mapping": [{"base_model_class": "X", "parent_library": "os"}],
    "peft_version": ["99.0"],
    # Of trained_on.json and labels.json.
    "fingerprint": ["0" * 64, "abc"],
    "dtype": ["float16", "bfloat16", "float64", "__name__", "nowhere"],
    "quantization": [{"bits": 4}, {"bits": 3}, {"bits": 4, "type": "nf4", "double_quant": True}],
    "prompts": ["text", "chat", "both", "other"],
    "origins": [[{}], [{"adapter": 1}], [{"adapter": "a", "digest": "b", "step": 1}]],
    "template_date": ["2026-02-31", "2026-01-31", "tomorrow"],
    "template_variables": [{"enable_thinking": False}, {"a": [1]}],
    "kind": ["multi", "regression"],
    "names": [["a"], ["a", "a", "b"], ["odd", "good", "bad"], ["a", "b", "c", "d"]],
}  # fmt: skip


def _pick_json(path: Path, rng: Random) -> str:
    """Change a JSON object by one value, key or byte."""
    if not path.is_file():
        return "nothing"
    tree = json.loads(path.read_text(encoding="utf-8"))
    key, kind = rng.choice([*tree]), rng.random()
    if kind < 0.15:
        return _damage_bytes(path, rng)
    if kind < 0.25:
        text = rng.choice(["", "[]", "null", "1", '"x"', "{", "[" * 100_000, '{"r": 1, "r": 2}', "{}", "9" * 5000])
        path.write_text(text)
        return f"{path.name}: {text[:20]!r}"
    if kind < 0.35:
        del tree[key]
        change = f"no {key}"
    elif kind < 0.42:
        value = rng.choice(VALUES)
        tree["new_key"] = value
        change = f"new_key: {str(value)[:40]!r}"
    else:
        plausible = PLAUSIBLE.get(key, [])
        value = rng.choice(plausible if plausible and rng.random() < 0.5 else VALUES)
        tree[key] = value
        change = f"{key}: {str(value)[:40]!r}"
    path.write_text(json.dumps(tree).replace("Infinity", "1e400"))
    return f"{path.name}: {change}"


def _damage_bytes(path: Path, rng: Random, *, start: int = 0, end: int | None = None) -> str:
    """Flip bits, cut, add, or overwrite bytes between two offsets."""
    data = bytearray(path.read_bytes())
    end = min(end or len(data), len(data))
    if end <= start:
        return "nothing"
    at, kind = rng.randrange(start, end), rng.randrange(5)
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at : at + 8] = rng.randbytes(8)
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        data[at:at] = rng.randbytes(rng.randrange(1, 40))
    else:
        del data[at : at + rng.randrange(1, 40)]
    path.write_bytes(data)
    return f"{path.name}: {('bit', 'bytes', 'cut', 'added', 'removed')[kind]} at {at}"


def _config(folder: Path, rng: Random) -> str:
    return _pick_json(folder / "adapter_config.json", rng)


def _record(folder: Path, rng: Random) -> str:
    return _pick_json(folder / rng.choice(["trained_on.json", "trained_on.json", "labels.json"]), rng)


def _header(folder: Path, rng: Random) -> str:
    """Change the header of the weights: a field of a tensor, its name, the length, or bytes."""
    path = folder / WEIGHTS
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name, kind = rng.choice([*header]), rng.randrange(8)
    change = f"{name}: "
    if kind == 0:
        return _damage_bytes(path, rng, end=8 + length)
    if kind == 1:
        stated = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, len(data)])
        path.write_bytes(stated.to_bytes(8, "little") + data[8:])
        return f"header length {stated}"
    if kind == 2:
        header[rng.choice(["x", "", "base_model.model.lm_head.weight", name + "x", "\ud800"])] = header.pop(name)
        change += "renamed"
    elif kind == 3:
        del header[name]
        change += "removed"
    elif kind == 4:
        header["extra"] = rng.choice([*VALUES, header[name]])
        change = f"extra: {str(header['extra'])[:60]}"
    else:
        entry = header[name]
        key = rng.choice([*entry])
        own = {
            "dtype": ["F16", "BF16", "I32", "F64", "BOOL", "F8_E4M3", "F4", "f32"],
            "shape": [[-1, 4], [2**40, 2**40], [4], [1, 4], [4, 4, 4], [0], [4.0, 64]],
            "data_offsets": [[0, 4], [0, 0], [8, 4], [-4, 0], [0, 2**63], [0], [0, 4, 8], [2**70, 2**70 + 4]],
        }.get(key, [])
        entry[key] = rng.choice([*own, *VALUES])
        change += f"{key}: {str(entry[key])[:40]!r}"
    text = json.dumps(header).replace("Infinity", "1e400").encode("utf-8", "surrogatepass")
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return change


def _weights(folder: Path, rng: Random) -> str:
    """Write other tensors in a file that is well formed."""
    path = folder / WEIGHTS
    tensors = load_file(path)
    name, other = rng.sample(sorted(tensors), 2)
    tensor = tensors[name]
    changes: dict[str, Callable[[], Tensor | None]] = {
        "NaN": lambda: _set_one(tensor, float("nan"), rng),
        "infinite": lambda: _set_one(tensor, float("inf"), rng),
        "huge": lambda: tensor * 3e38,
        "zero": lambda: tensor * 0,
        "transposed": lambda: tensor.T.contiguous(),
        "another rank": lambda: torch.cat([tensor, tensor]),
        "empty": lambda: tensor[:0],
        "one dimension": lambda: tensor.flatten(),
        "float16": tensor.half,
        "int8": lambda: tensor.to(torch.int8),
        "bool": lambda: tensor.bool(),
        "float8": lambda: tensor.to(torch.float8_e4m3fn),
        "float64": tensor.double,
        "missing": lambda: None,
        "of another": lambda: tensors[other],
    }
    what = rng.choice([*changes, "swapped", "all A and B swapped", "extra", "renamed", "bytes", "bytes"])
    if what == "bytes":
        length = int.from_bytes(path.read_bytes()[:8], "little")
        return _damage_bytes(path, rng, start=8 + length)
    if what == "swapped":
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif what == "all A and B swapped":
        swap = {"lora_A": "lora_B", "lora_B": "lora_A"}
        tensors = {
            next((key.replace(a, b) for a, b in swap.items() if a in key), key): each for key, each in tensors.items()
        }
    elif what == "extra":
        extra = name.replace("layers.0", "layers.7").replace("score", "other")
        tensors[rng.choice([extra, "base_model.model.model.norm.weight", "x"])] = tensor.clone()
    elif what == "renamed":
        tensors[name.replace("_proj", "").replace("base_model.", "") + "x"] = tensors.pop(name)
    elif (value := changes[what]()) is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file({key: each.clone().contiguous() for key, each in tensors.items()}, path, {"format": "pt"})
    return f"{name}: {what}"


def _set_one(tensor: Tensor, value: float, rng: Random) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[rng.randrange(changed.numel())] = value
    return changed


def _files(folder: Path, rng: Random) -> str:
    """Remove, empty or replace a file, or put another kind of entry in its place."""
    path = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    original = path.read_bytes()
    what = rng.choice(
        ["missing", "empty", "cut", "folder", "pipe", "dangling link", "loop", "link", "of another", "bin"]
    )
    if what == "bin":
        (folder / WEIGHTS).rename(folder / "adapter_model.bin")
        return "only adapter_model.bin"
    other = folder.parent.parent / "other" / "adapter" / path.name
    path.unlink()
    match what:
        case "empty":
            path.touch()
        case "cut":
            path.write_bytes(original[: rng.randrange(len(original) + 1)])
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "dangling link":
            path.symlink_to("nowhere")
        case "loop":
            path.symlink_to(path.name)
        case "link":
            (folder.parent / "copy").write_bytes(original)
            path.symlink_to(folder.parent / "copy")
        case "of another" if other.is_file():
            shutil.copyfile(other, path)
        case _:
            what = "missing"
    return f"{path.name}: {what}"


DAMAGES: dict[str, Callable[[Path, Random], str]] = {
    "adapter_config.json": _config,
    "trained_on.json": _record,
    "header": _header,
    "tensors": _weights,
    "files": _files,
}
