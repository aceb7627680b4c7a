"""Seeded mutations of a base model's files and of GGUF files, and what opening, running and listing the result gives.

`cases(seed)` yields mutations without end; `try_case(case, folder, ...)` applies one to a copy of a model in `folder`
and returns an outcome. Nothing here knows how lora_cli checks the files.
"""

import json
import random
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from lora_cli.commands.export import ExportRequest, _open_model
from lora_cli.data.token_text import token_texts
from lora_cli.errors import LoraError
from lora_cli.export.reference import eos_ids
from lora_cli.model import safetensors_io
from lora_cli.model.model_source import local_folder
from lora_cli.recipe.schema import Recipe
from lora_cli.run.console import no_output
from lora_cli.setup.inputs import load_inputs
from lora_cli.setup.training_model import load_base

HANG_S = 20  # far above the time of any healthy case
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**9, 10**400, 1.5, -0.5, 1e308, float("nan"), float("inf"), "", "x",
    "true", "1", "../x", "/etc/passwd", "\ud800", "\0", "a" * 100_000, [], [None], [[]], {}, {"a": 1}, [0] * 1000,
]  # fmt: skip
Bytes = Callable[[random.Random, bytes], bytes]


class Case(NamedTuple):
    """One mutation of a model's files."""

    kind: str  # of the file
    seed: int  # of the mutation
    base: str  # which of the models is changed: single, sharded or gguf
    apply: Callable[[Path], str]  # changes the model in a folder; returns a description


class Outcome(NamedTuple):
    """What the changed model gave."""

    kind: str  # refused, same, different, traceback or hang
    detail: str = ""  # message, exception or what differs


class Hang(BaseException):
    """The time limit has passed. Not an Exception, so that no code catches it."""


# --- mutations of JSON texts and of bytes


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """Change one place of a JSON document, at any depth; sometimes its bytes."""
    if rng.random() < 0.15:
        return mutate_bytes(rng, data)
    tree = json.loads(data)
    for _ in range(rng.choice([1, 1, 1, 2])):
        places = list(_places(tree))
        shallow = [place for place in places if place[2] <= 3]
        holder, key, _ = rng.choice(shallow if rng.random() < 0.7 else places)
        action = rng.choice(["hostile", "hostile", "hostile", "delete", "type", "swap", "rename", "number"])
        _change(rng, holder, key, action)
    text = json.dumps(tree)
    if rng.random() < 0.05 and isinstance(tree, dict) and tree:  # a key that stands twice
        key = rng.choice(list(tree))
        text = text[:-1] + f", {json.dumps(key)}: {json.dumps(rng.choice(HOSTILE[:8]))}}}"
    return text.encode("utf-8", "surrogatepass")


def _places(tree: Any, depth: int = 0) -> Iterator[tuple[Any, Any, int]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items)[:200]:
        yield tree, key, depth
        yield from _places(value, depth + 1)


def _change(rng: random.Random, holder: Any, key: Any, action: str) -> None:
    value = holder[key]
    match action:
        case "delete":
            del holder[key]
        case "type":
            holder[key] = rng.choice([[value], {"x": value}, str(value), [value, value]])
        case "swap":
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            other = rng.choice(keys)
            holder[key], holder[other] = holder[other], holder[key]
        case "rename" if isinstance(holder, dict):
            holder[rng.choice(["x", "", "__class__", "model_type", "__metadata__"])] = holder.pop(key)
        case "number" if isinstance(value, int) and not isinstance(value, bool):
            holder[key] = rng.choice(
                [value + 1, value - 1, -value, value * 2, value * 1000, value // 2, 0, float(value)]
            )
        case _:
            holder[key] = rng.choice(HOSTILE)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip a bit, remove or insert bytes, or cut the end off."""
    if not data:
        return bytes([rng.randrange(256)])
    at = rng.randrange(len(data))
    match rng.randrange(5):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[at + rng.randrange(1, 20) :]
        case 2:
            return data[:at] + rng.randbytes(rng.randrange(1, 20)) + data[at:]
        case _:
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def mutate_header(rng: random.Random, data: bytes) -> bytes:
    """Change the header of a safetensors file: its length, its JSON, or one entry in a way that stays JSON."""
    length = int.from_bytes(data[:8], "little")
    header, tensors = data[8 : 8 + length], data[8 + length :]
    roll = rng.random()
    if roll < 0.1:
        wrong = rng.choice([0, 1, length - 1, length + 1, length * 2, 2**31, 2**63, 2**64 - 1, len(data), 100 << 20])
        return wrong.to_bytes(8, "little") + data[8:]
    if roll < 0.2:
        return data[:8] + mutate_bytes(rng, header) + tensors
    if roll < 0.25:
        return mutate_bytes(rng, data[:8]) + data[8:]
    changed = mutate_json(rng, header) if roll < 0.55 else _change_entries(rng, json.loads(header))
    return len(changed).to_bytes(8, "little") + changed + tensors


def _change_entries(rng: random.Random, header: dict[str, Any]) -> bytes:
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.choices(names, k=2)
    entry = header[one]
    begin, end = entry["data_offsets"]
    match rng.randrange(10):
        case 0:
            entry["data_offsets"] = header[other]["data_offsets"]  # overlapping
        case 1:
            entry["data_offsets"] = [end, begin]
        case 2:
            entry["data_offsets"] = [begin - 8, end - 8]
        case 3:
            entry["data_offsets"] = [begin, end + rng.choice([4, 10**6, 2**62])]
        case 4:
            entry["shape"] = rng.choice(
                [[-1, -(end - begin) // 4], [2**32, 2**32], entry["shape"][::-1], [], [0], [2**62]]
            )
        case 5:
            entry["dtype"] = rng.choice(["F16", "BF16", "I32", "F128", "f32", "", "U16", "F8_E8M0", "C64"])
        case 6:
            header[one], header[other] = header[other], header[one]
        case 7:
            del header[one]
        case 8:
            text = json.dumps(header)
            return (text[:-1] + f", {json.dumps(one)}: {json.dumps(header[other])}}}").encode()
        case _:
            header["new." + one] = entry
    return json.dumps(header).encode()


def mutate_gguf(rng: random.Random, data: bytes) -> bytes:
    """Change the head of a GGUF file: counts, lengths, types, or any byte before the tensors."""
    head = data[: rng.choice([24, 24, 200, 2000, 12_000])]
    rest = data[len(head) :]
    match rng.randrange(8):
        case 0:
            return data[:4] + struct.pack("<I", rng.choice([0, 1, 2, 4, 2**31, 3 << 24])) + data[8:]
        case 1:
            return data[:8] + struct.pack("<Q", rng.choice(_COUNTS)) + data[16:]
        case 2:
            return data[:16] + struct.pack("<Q", rng.choice(_COUNTS)) + data[24:]
        case 3:  # eight bytes somewhere: a length, an offset or a dimension
            at = rng.randrange(24, max(25, len(head)))
            return data[:at] + struct.pack("<Q", rng.choice(_COUNTS)) + data[at + 8 :]
        case 4:
            at = rng.randrange(24, max(25, len(head)))
            return data[:at] + struct.pack("<I", rng.randrange(40)) + data[at + 4 :]
        case 5:
            return data[: rng.randrange(len(data))]
        case _:
            return mutate_bytes(rng, head) + rest


_COUNTS = [0, 1, 2, 10**6, 2**31, 2**32, 2**62, 2**63, 2**64 - 1]


def damage(rng: random.Random, file: Path) -> str:
    """Truncate, empty or remove a file, or put a folder, a pipe or a link in its place."""
    import os

    data = file.read_bytes()
    kind = rng.choice(["truncated", "emptied", "removed", "folder", "pipe", "dangling link", "link to itself", "zeros"])
    file.unlink()
    match kind:
        case "truncated":
            file.write_bytes(data[: rng.randrange(len(data))])
        case "emptied":
            file.write_bytes(b"")
        case "folder":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
        case "dangling link":
            file.symlink_to("nowhere")
        case "link to itself":
            file.symlink_to(file.name)
        case "zeros":
            file.write_bytes(bytes(len(data)))
    return f"{file.name} {kind}"


# --- cases

FILES: dict[str, tuple[str, str, Bytes]] = {  # kind: base, pattern of the file, mutation
    "header": ("single", "model.safetensors", mutate_header),
    "shard header": ("sharded", "model-0*.safetensors", mutate_header),
    "index": ("sharded", "model.safetensors.index.json", mutate_json),
    "config": ("single", "config.json", mutate_json),
    "tokenizer": ("single", "tokenizer.json", mutate_json),
    "tokenizer_config": ("single", "tokenizer_config.json", mutate_json),
    "generation_config": ("single", "generation_config.json", mutate_json),
    "gguf": ("gguf", "model.gguf", mutate_gguf),
}
DAMAGED = {"damage": ("single", "*"), "shard damage": ("sharded", "model*"), "gguf damage": ("gguf", "model.gguf")}
WEIGHTS = {"header": 3, "shard header": 1, "index": 3, "config": 5, "tokenizer": 5, "tokenizer_config": 3,
           "generation_config": 1, "gguf": 5, "damage": 2, "shard damage": 1, "gguf damage": 1}  # fmt: skip


def cases(seed: int, kinds: list[str] | None = None) -> Iterator[Case]:
    """Yield mutations without end, the same for the same seed; of `kinds`, or of all."""
    rng = random.Random(seed)
    names = kinds or list(WEIGHTS)
    while True:
        kind = rng.choices(names, [WEIGHTS[name] for name in names])[0]
        yield case(kind, rng.randrange(2**32))


def case(kind: str, seed: int) -> Case:
    """Return the mutation of `kind` with this seed."""

    def apply(folder: Path) -> str:
        rng = random.Random(seed)
        if kind in DAMAGED:
            return damage(rng, rng.choice(sorted(folder.glob(DAMAGED[kind][1]))))
        _, pattern, mutate = FILES[kind]
        file = rng.choice(sorted(folder.glob(pattern)))
        file.write_bytes(mutate(rng, file.read_bytes()))
        return file.name

    return Case(kind, seed, (FILES.get(kind) or DAMAGED[kind])[0], apply)


# --- opening and running


class Results(NamedTuple):
    """What a model gives, for comparison."""

    ids: list[list[int]]  # of the training rows
    texts: list[str]
    logits: torch.Tensor  # of the first row
    stored: dict[str, Any]  # shapes and dtypes of the tensors of its files
    eos: tuple[int, ...]


def run_model(path: str, rows: Path) -> Results:
    """Open a model as train and export do, and run it.

    Raises:
        LoraError: it is refused.
    """
    recipe = Recipe.model_validate(
        {
            "model": {"path": path, "dtype": "float32"},
            "adapter": {"rank": 4, "alpha": 8},
            "data": {"train": str(rows), "max_length": 128, "packing": False},
            "training": {"max_steps": 1},
            "output": "runs/x",
        }
    )
    inputs = load_inputs(recipe, info=no_output)
    ids = [inputs.data.train[number].input_ids.tolist() for number in range(len(inputs.data.train))]
    inputs.base.skeleton()
    model = load_base(inputs.recipe, inputs).model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[0]])).logits
    request = ExportRequest("safetensors", None, None, None, "file", False, False, False)
    source = _open_model(path, request)
    listed = safetensors_io.list_tensors(local_folder(source.base.source, fetch=False))
    stored = {name: (str(info.dtype), info.shape) for name, info in listed.items()}
    texts = token_texts(ids[0], inputs.base.tokenizer)
    return Results(ids, texts, logits, stored, eos_ids(source))


def try_case(case: Case, folder: Path, *, models: dict[str, Path], rows: Path, expected: dict[str, Results]) -> Outcome:
    """Apply `case` to a copy of its model, open and run it.

    Args:
        case: the mutation.
        folder: for the copy; created and removed.
        models: folders of the unchanged models: single, sharded and gguf (with the file model.gguf).
        rows: a file of training rows.
        expected: results of the unchanged models.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(models[case.base], folder)
    what = case.apply(folder)
    path = str(folder / "model.gguf" if case.base == "gguf" else folder)
    try:
        with time_limit(HANG_S):
            results = run_model(path, rows)
    except LoraError as error:
        return Outcome("refused", f"{error.message} | {error.hint}")
    except Hang:
        return Outcome("hang", what)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Outcome("traceback", f"{type(error).__name__}: {str(error)[:300]}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    wrong = [
        name for name, a, b in zip(Results._fields, results, expected[case.base], strict=True)
        if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)
    ]  # fmt: skip
    return Outcome("different", f"{what}: {', '.join(wrong)}") if wrong else Outcome("same", what)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Hang in the block after `seconds`; a loop inside a library that is not Python is not interrupted."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
