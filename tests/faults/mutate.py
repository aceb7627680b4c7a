"""Seeded mutations of bytes, JSON trees and texts, for tests with damaged and hostile files. Pure: no files, no torch.

Every function takes a `random.Random` and returns a new value; the same seed gives the same mutation on every machine:

    mutation = mutate_bytes(file.read_bytes(), seed)     # one of BYTES: `mutation.name`, `mutation.value`
    mutation = mutate_json(json.loads(text), seed)       # one of TREES; `dump_json(mutation.value)` writes it as JSON
    mutation = mutate_text(template, seed)               # one of TEXTS

Further kinds for a format of files are added by the caller: `mutate_bytes(data, seed, kinds={**BYTES, **more})`.
"""

import copy
import json
import math
import random
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

BytesMutation = Callable[[bytes, random.Random], bytes]
TreeMutation = Callable[[Any, random.Random], Any]
TextMutation = Callable[[str, random.Random], str]
Seed = int | str


class Mutation(NamedTuple):
    """A mutated value, and the kind of the mutation for messages: `flip bits`."""

    name: str
    value: Any


def mutate_bytes(data: bytes, seed: Seed, *, kinds: Mapping[str, BytesMutation] | None = None) -> Mutation:
    """Return `data` after one to three mutations of one kind; a value that differs from `data`, unless it is empty."""
    rng = random.Random(f"bytes {seed}")
    name, mutate = rng.choice(sorted((kinds or BYTES).items(), key=lambda item: item[0]))
    mutated = data
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        mutated = mutate(mutated, rng)
    return Mutation(name, mutated if mutated != data else data + b"\0")


def mutate_json(value: Any, seed: Seed, *, kinds: Mapping[str, TreeMutation] | None = None) -> Mutation:
    """Return a copy of a JSON value after one mutation at a random place in it."""
    rng = random.Random(f"tree {seed}")
    name, mutate = rng.choice(sorted((kinds or TREES).items(), key=lambda item: item[0]))
    return Mutation(name, mutate(copy.deepcopy(value), rng))


def mutate_text(text: str, seed: Seed, *, kinds: Mapping[str, TextMutation] | None = None) -> Mutation:
    """Return `text` after one to three mutations of one kind."""
    rng = random.Random(f"text {seed}")
    name, mutate = rng.choice(sorted((kinds or TEXTS).items(), key=lambda item: item[0]))
    for _ in range(rng.choice((1, 1, 2, 3))):
        text = mutate(text, rng)
    return Mutation(name, text)


def dump_json(value: Any) -> str:
    """Return a mutated JSON value as text: NaN and infinity by these names, which Python's decoder reads."""
    return json.dumps(value, ensure_ascii=True)


# --- bytes ----------------------------------------------------------------------------------------------------------


def _range(data: bytes, rng: random.Random) -> tuple[int, int]:
    """Return the start and stop of a range of at least one byte, short ranges more often than long ones."""
    start = rng.randrange(len(data)) if data else 0
    longest = max(1, len(data) - start)
    return start, start + min(longest, int(math.exp(rng.uniform(0, math.log(longest + 1)))) or 1)


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    """Flip a bit in one byte."""
    if not data:
        return data
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def flip_bits_at_ends(data: bytes, rng: random.Random) -> bytes:
    """Flip a bit in the first or last 64 bytes, where most formats have their header or footer."""
    if not data:
        return data
    edge = min(64, len(data))
    at = rng.choice((rng.randrange(edge), len(data) - 1 - rng.randrange(edge)))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def truncate(data: bytes, rng: random.Random) -> bytes:
    """Cut the end off, at any place, also all of it."""
    return data[: rng.randrange(len(data))] if data else data


def cut_start(data: bytes, rng: random.Random) -> bytes:
    """Cut the start off."""
    return data[rng.randrange(1, len(data) + 1) :] if data else data


def remove_range(data: bytes, rng: random.Random) -> bytes:
    """Remove a range, so that everything behind it moves."""
    start, stop = _range(data, rng)
    return data[:start] + data[stop:]


def duplicate_range(data: bytes, rng: random.Random) -> bytes:
    """Repeat a range."""
    start, stop = _range(data, rng)
    return data[:stop] + data[start:stop] + data[stop:]


def swap_ranges(data: bytes, rng: random.Random) -> bytes:
    """Exchange two ranges of the same length, as blocks of a disk."""
    if len(data) < 2:
        return data
    size = rng.randrange(1, min(4096, len(data) // 2) + 1)
    first = rng.randrange(len(data) - 2 * size + 1)
    second = rng.randrange(first + size, len(data) - size + 1)
    middle = data[first + size : second]
    return data[:first] + data[second : second + size] + middle + data[first : first + size] + data[second + size :]


def zero_range(data: bytes, rng: random.Random) -> bytes:
    """Overwrite a range with zeros, as a file system does after a crash."""
    start, stop = _range(data, rng)
    return data[:start] + bytes(len(data[start:stop])) + data[stop:]


def fill_range(data: bytes, rng: random.Random) -> bytes:
    """Overwrite a range with one byte: 0xff, a bracket, a line break."""
    start, stop = _range(data, rng)
    return data[:start] + rng.choice((b"\xff", b"[", b"{", b"\n", b'"', b"A")) * len(data[start:stop]) + data[stop:]


def random_range(data: bytes, rng: random.Random) -> bytes:
    """Overwrite a range of up to 64 bytes with random bytes."""
    start, stop = _range(data, rng)
    stop = min(stop, start + 64)
    return data[:start] + rng.randbytes(len(data[start:stop])) + data[stop:]


def insert_bytes(data: bytes, rng: random.Random) -> bytes:
    """Insert up to 64 random bytes."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.randrange(1, 65)) + data[at:]


INTEGERS = (
    0,
    1,
    -1,
    127,
    128,
    255,
    256,
    2**15 - 1,
    2**16 - 1,
    2**31 - 1,
    -(2**31),
    2**32 - 1,
    2**40,
    2**63 - 1,
    -(2**63),
)


def write_integer(data: bytes, rng: random.Random) -> bytes:
    """Overwrite 4 or 8 bytes with a number at the border of a type, as a length or an offset."""
    packed = struct.pack(rng.choice("<>") + "q", rng.choice(INTEGERS))
    packed = packed[: rng.choice((4, 8))]
    at = rng.randrange(max(1, len(data) - len(packed) + 1))
    return data[:at] + packed + data[at + len(packed) :]


def change_length(data: bytes, rng: random.Random) -> bytes:
    """Change a little-endian 32-bit number that can be a length of something in `data`, if there is one."""
    places = [
        at for at in range(0, min(len(data) - 3, 1 << 16)) if 0 < struct.unpack_from("<I", data, at)[0] <= len(data)
    ]
    if not places:
        return write_integer(data, rng)
    at = rng.choice(places)
    length = struct.unpack_from("<I", data, at)[0]
    changed = rng.choice((0, length - 1, length + 1, length * 2, length * 65536, 2**31 - 1, 2**32 - 1)) % 2**32
    return data[:at] + struct.pack("<I", changed) + data[at + 4 :]


def append_bytes(data: bytes, rng: random.Random) -> bytes:
    """Append zeros, random bytes, or a part of `data`."""
    size = min(rng.choice((1, 7, 512, 4096)), max(1, len(data) // 2))
    return data + rng.choice((bytes(size), rng.randbytes(size), data[:size]))


def repeat_all(data: bytes, rng: random.Random) -> bytes:
    """Write the whole twice or thrice."""
    return data * rng.choice((2, 3))


BYTES: dict[str, BytesMutation] = {
    "flip bits": flip_bits,
    "flip bits at the ends": flip_bits_at_ends,
    "truncate": truncate,
    "cut the start": cut_start,
    "remove a range": remove_range,
    "duplicate a range": duplicate_range,
    "swap ranges": swap_ranges,
    "zero a range": zero_range,
    "fill a range": fill_range,
    "random range": random_range,
    "insert bytes": insert_bytes,
    "write an integer": write_integer,
    "change a length": change_length,
    "append bytes": append_bytes,
    "repeat all": repeat_all,
}

# --- JSON trees -----------------------------------------------------------------------------------------------------


def _nested(kind: str, depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


# Values of each type, and at the borders of types. Each one is JSON; texts with lone surrogates are escaped.
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 0.5, -0.0, 1e308, math.inf, -math.inf, math.nan),
    *(2**31, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *("", " ", "0", "1", "null", "true", "nan", "1e999", "x" * 10_000, "a\nb", "\0", "\x1b[2J", "\ufeff", "\u202e"),
    *("\ud800", "é" * 300, "../../etc/passwd", "/dev/zero", "{{ 7 * 7 }}", "{0.__class__}", "%s%n", "__class__"),
    *([], {}, [None], [[]], [{}], {"": None}, {"a": {"b": ["c"]}}, ["a", 1, None, {}], {"__class__": "x"}),
    *(_nested("list", 64), _nested("dict", 64), list(range(1000)), {str(number): number for number in range(1000)}),
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return every container in a tree with each of its keys or indices."""
    found, open_ = [], [value]
    while open_:
        each = open_.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ()
        for key in keys:
            found.append((each, key))
            open_.append(each[key])
    return found


def replace_value(tree: Any, rng: random.Random) -> Any:
    """Replace a value by one of another type or at the border of its type."""
    places = _places(tree)
    odd = copy.deepcopy(rng.choice(ODD_VALUES))
    if not places or rng.random() < 0.02:
        return odd
    container, key = rng.choice(places)
    container[key] = odd
    return tree


def change_number(tree: Any, rng: random.Random) -> Any:
    """Change a number by one, its sign or its size; another value where there is no number."""
    places = [(c, k) for c, k in _places(tree) if isinstance(c[k], int | float) and not isinstance(c[k], bool)]
    if not places:
        return replace_value(tree, rng)
    container, key = rng.choice(places)
    number = container[key]
    container[key] = rng.choice(
        (number + 1, number - 1, -number, number * 2, number * 10**6, 0, number + 0.5, str(number))
    )
    return tree


def remove_key(tree: Any, rng: random.Random) -> Any:
    """Remove a key or an item."""
    places = _places(tree)
    if places:
        container, key = rng.choice(places)
        del container[key]
    return tree


def rename_key(tree: Any, rng: random.Random) -> Any:
    """Misspell a key, or write one with other letters."""
    places = [(container, key) for container, key in _places(tree) if isinstance(container, dict)]
    if places:
        container, key = rng.choice(places)
        value = container.pop(key)
        container[rng.choice((key + "s", key[:-1], key.upper(), "", "\ud800", key.replace("_", "-"), " " + key))] = (
            value
        )
    return tree


def add_key(tree: Any, rng: random.Random) -> Any:
    """Add a key or an item with an odd value."""
    containers = [each for each in [tree, *(c[k] for c, k in _places(tree))] if isinstance(each, dict | list)]
    if not containers:
        return tree
    container, odd = rng.choice(containers), copy.deepcopy(rng.choice(ODD_VALUES))
    if isinstance(container, dict):
        container[rng.choice(("extra", "", "__class__", "path", "type", "name", "\0"))] = odd
    else:
        container.insert(rng.randrange(len(container) + 1), odd)
    return tree


def copy_value(tree: Any, rng: random.Random) -> Any:
    """Write one value of the tree at the place of another."""
    places = _places(tree)
    if places:
        (container, key), (other, other_key) = rng.choice(places), rng.choice(places)
        container[key] = copy.deepcopy(other[other_key])
    return tree


def wrap_value(tree: Any, rng: random.Random) -> Any:
    """Put a value into a list, an object, or a text."""
    places = _places(tree)
    if not places:
        return [tree]
    container, key = rng.choice(places)
    value = container[key]
    container[key] = rng.choice(([value], {"value": value}, [value, copy.deepcopy(value)], str(value)))
    return tree


def repeat_items(tree: Any, rng: random.Random) -> Any:
    """Repeat the items of a list a thousand times, up to a hundred thousand items; reverse it where it is longer."""
    lists = [each for each in [tree, *(c[k] for c, k in _places(tree))] if isinstance(each, list) and each]
    if not lists:
        return replace_value(tree, rng)
    chosen = rng.choice(lists)
    if len(chosen) <= 100:
        chosen *= 1000
    else:
        chosen.reverse()
    return tree


TREES: dict[str, TreeMutation] = {
    "replace a value": replace_value,
    "replace another value": replace_value,  # twice, because it is the most common mistake
    "change a number": change_number,
    "remove a key": remove_key,
    "rename a key": rename_key,
    "add a key": add_key,
    "copy a value": copy_value,
    "wrap a value": wrap_value,
    "repeat items": repeat_items,
}

# --- texts ----------------------------------------------------------------------------------------------------------

ODD_TEXTS = (
    *(
        "\0",
        "\x1b]0;x\x07",
        "\x7f",
        "\r",
        "\r\n",
        "\u2028",
        "\u202e",
        "\u200b",
        "\ufeff",
        "\ud800",
        "\U0010ffff",
        "\u0301" * 50,
    ),
    *(
        "<|im_end|>",
        "<|im_start|>",
        "<|endoftext|>",
        "</s>",
        "{{",
        "}}",
        "{%",
        "%}",
        "{#",
        "\\",
        '"',
        "'",
        "`",
        "- ",
        ": ",
        "#",
    ),
)


def insert_text(text: str, rng: random.Random) -> str:
    """Insert a control character, an invisible character, a token or a bracket."""
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(ODD_TEXTS) + text[at:]


def remove_text(text: str, rng: random.Random) -> str:
    """Remove a range of characters."""
    start = rng.randrange(len(text) + 1)
    return text[:start] + text[start + rng.randrange(1, 20) :]


def repeat_text(text: str, rng: random.Random) -> str:
    """Repeat a range of characters up to a thousand times."""
    start = rng.randrange(len(text) + 1)
    piece = text[start : start + rng.randrange(1, 20)]
    return text[:start] + piece * rng.choice((2, 10, 1000)) + text[start + len(piece) :]


def swap_lines(text: str, rng: random.Random) -> str:
    """Exchange two lines."""
    lines = text.splitlines(keepends=True)
    if len(lines) > 1:
        first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
        lines[first], lines[second] = lines[second], lines[first]
    return "".join(lines)


def change_digits(text: str, rng: random.Random) -> str:
    """Replace a number by a large, negative or wrong one."""
    digits = [at for at, character in enumerate(text) if character.isdigit()]
    if not digits:
        return insert_text(text, rng)
    at = rng.choice(digits)
    return text[:at] + rng.choice(("0", "-1", "10000000000", "1e999", ".5", "x")) + text[at + 1 :]


TEXTS: dict[str, TextMutation] = {
    "insert text": insert_text,
    "remove text": remove_text,
    "repeat text": repeat_text,
    "swap lines": swap_lines,
    "change digits": change_digits,
}
