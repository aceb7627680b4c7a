"""Read the tensors of a file of torch.save (.bin, .pt, .pth) without unpickling: nothing of it is imported or called.

Such a file is a zip archive: a pickle that describes a tree of dictionaries and tensors, and an entry of bytes for each
storage. A pickle is a program for a stack machine, whose dangerous instructions import a name and call it. The machine
here knows the instructions that dictionaries of tensors need. A name stays a name, and the only calls are those of
`_CALLS`, which build records of this file. So a hostile pickle can do nothing but be refused. The loaders of pickle and
torch (also with weights_only, whose restrictions have been broken before) are not used.
"""

import math
import pickletools
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_cli.errors import LoraError
from lora_cli.model.foreign_adapters.stored_zip import StoredZip, open_stored_zip
from lora_cli.run.read_file import open_regular, printable
from lora_cli.run.shell import python_text

FETCH_HINT = "fetch the adapter again"
PICKLE = "data.pkl"  # in the folder of the archive, as the storages in data/
MAX_PICKLE_BYTES = 16 << 20  # it has names and shapes: some hundred bytes for each tensor
MAX_DIMENSIONS = 8
# torch's names of storages, with floating-point values only: factors of adapters.
STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
}
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # of files that torch before 1.6 wrote
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = (
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"),
)


class _Mark:
    """The mark on the stack where a list of arguments begins."""


class _Name(NamedTuple):
    """A name that the pickle wants to import; it never is."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class _Storage(NamedTuple):
    key: str  # name of its entry in the archive
    dtype: torch.dtype
    numel: int


class _Tensor(NamedTuple):
    """A tensor that the pickle describes: a view of a storage."""

    storage: _Storage
    offset: int  # elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # elements


class _Refused(Exception):
    """The pickle has something else than dictionaries of tensors."""


KINDS = {
    dict: "a dictionary", list: "a list", tuple: "a list", str: "a text", bytes: "bytes", bool: "a truth value",
    int: "a number", float: "a number", type(None): "nothing", _Tensor: "a tensor", _Storage: "a storage",
}  # fmt: skip


def read_torch_file(path: Path, *, inner: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a file of torch.save, by name, each with its own memory.

    Args:
        path: of the file, which contains a dictionary of tensors.
        inner: key under which the dictionary may have the tensors.

    Raises:
        LoraError: the file is not such a file, is damaged, or contains anything else than floating-point tensors.
    """
    _check_start(path)
    with open_stored_zip(path, hint=FETCH_HINT) as archive:
        folder = _folder(archive)
        if archive.entries[folder + PICKLE] > MAX_PICKLE_BYTES:
            raise archive.damage(f"{PICKLE} has {archive.entries[folder + PICKLE]:,} bytes")
        if (order := f"{folder}byteorder") in archive.entries and archive.read(order) != b"little":
            raise LoraError(f"{path} was written by a big-endian machine", hint=_resave_hint(path))
        try:
            content = _run(archive.read(folder + PICKLE))
            found = content.get(inner, content) if isinstance(content, dict) else content
            if not isinstance(found, dict):
                raise _Refused(f"{_kind(found)} in place of a dictionary of tensors")
            views = {_text(name): _view(name, value) for name, value in found.items()}
        except _Refused as problem:
            raise LoraError(
                f"{path}: its pickle has {problem}",
                hint="nothing of it was run; adapters are dictionaries of tensors: fetch it again from a source you "
                "trust, as safetensors if there is one",
            ) from None
        return _read_views(archive, folder, views)


def _check_start(path: Path) -> None:
    with open_regular(path, hint=FETCH_HINT) as stream:
        start = stream.read(512)
    if start.startswith(LEGACY_START) or start[257:262] == b"ustar":
        raise LoraError(f"{path} has the format of torch before 1.6, which is not read", hint=_resave_hint(path))
    if not start.startswith(b"PK"):
        raise LoraError(f"{path} is not a file of torch.save", hint=FETCH_HINT)


def _resave_hint(path: Path) -> str:
    new = path.with_name(f"{path.stem}-new{path.suffix}")
    code = (
        f'import torch; torch.save(torch.load({python_text(path)}, map_location="cpu", weights_only=True), '
        f"{python_text(new)})"
    )
    return f"save it again, if you trust its origin: python -c {shlex.quote(code)}"


def _folder(archive: StoredZip) -> str:
    """Return the folder of the archive's entries, with a slash."""
    folders = [name.removesuffix(PICKLE) for name in archive.entries if name.endswith(f"/{PICKLE}")]
    if len(folders) != 1 or folders[0].count("/") != 1:
        raise archive.damage(f"it has no {PICKLE}, as files of torch.save do")
    return folders[0]


def _run(program: bytes) -> Any:
    """Run a pickle on the machine of this file, and return what it builds.

    Raises:
        _Refused: it has an instruction, a name or a value that dictionaries of tensors do not need.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for operation, argument, _ in pickletools.genops(program):
            if operation.name == "STOP":
                (result,) = stack
                return result
            _step(operation.name, argument, stack, memo)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, UnicodeDecodeError):
        raise _Refused("an instruction that is not complete: the file is damaged") from None
    raise _Refused("no end: the file is damaged")


def _step(operation: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """Do one instruction of a pickle; the names are those of Python's pickletools."""
    match operation:
        case "PROTO" | "FRAME":
            pass
        case "MARK":
            stack.append(_Mark)
        case "EMPTY_DICT":
            stack.append({})
        case "EMPTY_LIST":
            stack.append([])
        case "EMPTY_TUPLE":
            stack.append(())
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            count = int(operation[-1])
            stack[-count:] = [tuple(stack[-count:])]
        case "TUPLE":
            stack.append(tuple(_pop_to_mark(stack)))
        case "APPEND" | "APPENDS":
            values = [stack.pop()] if operation == "APPEND" else _pop_to_mark(stack)
            _top(stack, list).extend(values)
        case "SETITEM" | "SETITEMS":
            pairs = [stack.pop(-2), stack.pop()] if operation == "SETITEM" else _pop_to_mark(stack)
            _top(stack, dict).update((_text(key), value) for key, value in zip(pairs[::2], pairs[1::2], strict=True))
        case "BINPUT" | "LONG_BINPUT":
            memo[argument] = stack[-1]
        case "MEMOIZE":
            memo[len(memo)] = stack[-1]
        case "BINGET" | "LONG_BINGET":
            stack.append(memo[argument])
        case "GLOBAL":
            module, _, name = argument.partition(" ")
            stack.append(_Name(module, name))
        case "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(_Name(_text(module), _text(name)))
        case "REDUCE":
            arguments, called = stack.pop(), stack.pop()
            stack.append(_call(called, arguments))
        case "BUILD":  # the attributes of an OrderedDict: _metadata of a state dict
            stack.pop()
            _top(stack, dict)
        case "BINPERSID":
            stack.append(_storage(stack.pop()))
        case _ if operation in CONSTANTS:
            stack.append(CONSTANTS[operation])
        case _ if operation in LITERALS:
            stack.append(argument)
        case _:
            raise _Refused(f"the instruction {operation}")


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    for at in reversed(range(len(stack))):
        if stack[at] is _Mark:
            values = stack[at + 1 :]
            del stack[at:]
            return values
    raise _Refused("no mark where a list of arguments begins")


def _top(stack: list[Any], kind: type) -> Any:
    if type(stack[-1]) is not kind:
        raise _Refused(f"{_kind(stack[-1])} that is changed as {KINDS[kind]}")
    return stack[-1]


def _call(called: Any, arguments: Any) -> Any:
    if not isinstance(called, _Name) or called not in _CALLS:
        raise _Refused(f"a call of {printable(called)}" if isinstance(called, _Name) else "a call of a value")
    if not isinstance(arguments, tuple):
        raise _Refused("a call without arguments")
    return _CALLS[called](*arguments)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> _Tensor:
    if not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise _Refused("a tensor without a shape")
    if len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
        raise _Refused(f"a tensor of {len(shape)} dimensions with {len(stride)} strides")
    sizes = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
        raise _Refused("a tensor without a storage, or with sizes that are none")
    return _Tensor(storage, offset, shape, stride)


def _parameter(tensor: Any, *rest: Any) -> _Tensor:
    if not isinstance(tensor, _Tensor):
        raise _Refused("a parameter that is no tensor")
    return tensor


_CALLS: dict[_Name, Callable[..., Any]] = {
    _Name(
        "collections", "OrderedDict"
    ): lambda: {},  # its entries follow; a list of pairs could be used again and again
    _Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    _Name("torch._utils", "_rebuild_parameter"): _parameter,
}


def _storage(reference: Any) -> _Storage:
    """Return the storage that a persistent id names: ("storage", type, key, device, number of elements)."""
    if not isinstance(reference, tuple) or len(reference) != 5 or reference[0] != "storage":
        raise _Refused("a reference to something else than a storage")
    _, kind, key, _, numel = reference
    if not isinstance(kind, _Name) or kind.module != "torch" or kind.name not in STORAGES:
        raise _Refused(f"a storage of {printable(kind)}, not of floating-point values")
    if not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 2**63:
        raise _Refused("a storage without a size")
    return _Storage(key, STORAGES[kind.name], numel)


def _view(name: Any, value: Any) -> _Tensor:
    if not isinstance(value, _Tensor):
        raise _Refused(f"{_kind(value)} as {printable(name)}, not a tensor")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Refused(f"{_kind(value)} as a name")
    return value


def _kind(value: Any) -> str:
    """Return what a value is, for messages; never its contents, which may be nested without end."""
    if isinstance(value, _Name):
        return f"the name {printable(value)}"
    return KINDS.get(type(value), "a value of another kind")


def _read_views(archive: StoredZip, folder: str, views: dict[str, _Tensor]) -> dict[str, Tensor]:
    """Read the storages, and copy each view out of its own; all tensors together are no larger than the file."""
    total = 0
    names: dict[str, list[str]] = {}  # by storage
    for name, view in views.items():
        names.setdefault(view.storage.key, []).append(name)
        storage, count = view.storage, math.prod(view.shape)
        entry = f"{folder}data/{storage.key}"
        stored = archive.entries.get(entry)
        if stored is None or stored != storage.numel * storage.dtype.itemsize:
            has = "no entry" if stored is None else f"an entry of {stored:,} bytes"
            raise archive.damage(
                f"{printable(name)} needs {storage.numel:,} values of {_dtype(storage.dtype)}, and has {has}"
            )
        last = view.offset + sum((size - 1) * step for size, step in zip(view.shape, view.stride, strict=True))
        if count and (last >= storage.numel or count > storage.numel):
            raise archive.damage(f"{printable(name)} is larger than its storage")
        total += count * storage.dtype.itemsize
    if total > archive.size:
        raise archive.damage(f"its tensors have {total:,} bytes, and the file {archive.size:,}")
    tensors: dict[str, Tensor] = {}
    for key, of_storage in names.items():
        content = bytearray(archive.read(f"{folder}data/{key}"))
        tensors |= {name: _copy(content, views[name]) for name in of_storage}
    return {name: tensors[name] for name in views}


def _copy(content: bytearray, view: _Tensor) -> Tensor:
    if not math.prod(view.shape):
        return torch.empty(view.shape, dtype=view.storage.dtype)
    values = torch.frombuffer(content, dtype=view.storage.dtype)
    return values.as_strided(view.shape, view.stride, view.offset).clone(memory_format=torch.contiguous_format)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
