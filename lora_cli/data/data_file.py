"""A data file with its type, and its bytes: plain or compressed (.gz .bz2 .xz .zst, .zip of one file). No torch."""

import bz2
import gzip
import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

from lora_cli.errors import LoraError, first_line
from lora_cli.run.read_file import open_regular

BUFFER = 1 << 20  # bytes of decompressed content that are read at a time
# Texts shrink to a tenth, the same row again and again to a hundredth.
MAX_RATIO = 1000
SMALL = 1 << 26  # bytes of decompressed content that are read in any case
REGULAR_HINT = "write the path of a file"

# First bytes of compressed files, to recognize one whose name does not tell.
SIGNATURES = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst", b"PK\3\4": ".zip"}


class DataFile(NamedTuple):
    """One file of a source."""

    path: Path  # where its bytes are
    name: str  # in messages: its path or URL
    suffix: str  # type of its content, a key of `file_types.READERS`: `.jsonl`
    compression: str = ""  # a key of COMPRESSIONS
    delimiter: str | None = None  # of a file of cells; None: the one of its type

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the (decompressed) content for reading.

        Raises:
            LoraError: the file is compressed, but its name does not say so; or it is damaged, also while it is read.
        """
        with open_regular(self.path, hint=REGULAR_HINT) as raw:
            if not self.compression:
                start = raw.read(6)
                raw.seek(0)
                for signature, compression in SIGNATURES.items():
                    if start.startswith(signature):
                        raise LoraError(
                            f"{self.name}: is compressed, but its name does not end in {compression}",
                            hint=f"rename it to {PurePosixPath(self.name).name}{compression}",
                        )
                yield raw
                return
            stream = _Decompressed(self.name, self.compression, raw)
            with io.BufferedReader(stream, BUFFER) as content:
                yield cast(BinaryIO, content)


def data_file(path: Path, name: str | None = None, *, delimiter: str | None = None) -> DataFile:
    """Return the data file at `path`; its type is that of its name, in a .zip that of the name inside.

    Raises:
        LoraError: it is a .zip that does not contain one file.
    """
    name = name or str(path)
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    suffix = suffixes[-1] if suffixes else ""
    if compression == ".zip":
        with (
            _translated(name, compression),
            open_regular(path, hint=REGULAR_HINT) as raw,
            zipfile.ZipFile(raw) as archive,
        ):
            suffix = PurePosixPath(_only_member(name, archive).filename).suffix.lower()
    return DataFile(path, name, suffix, compression, delimiter)


def _open_zst(raw: BinaryIO) -> Any:
    # Imported here because pyarrow takes half a second to import, and few files need it.
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")


class _Streams:
    """The content of a file of bz2 or xz streams; unlike Python's own classes it does not ignore what is behind them.

    There, a damaged byte in the header of a later stream (parallel compressors write many) ends the file silently.
    """

    def __init__(self, raw: BinaryIO, new: Callable[[], Any]) -> None:
        self._raw, self._new = raw, new
        self._stream = new()

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes; none at the end."""
        while True:
            if self._stream.eof:
                # xz files may have zeros behind a stream.
                rest = self._stream.unused_data.lstrip(b"\0")
                while not rest and (block := self._raw.read(BUFFER)):
                    rest = block.lstrip(b"\0")
                if not rest:
                    return b""
                self._stream = self._new()
            else:
                rest = self._raw.read(BUFFER) if self._stream.needs_input else b""
                if self._stream.needs_input and not rest:
                    raise EOFError("the file ends within it")
            if data := self._stream.decompress(rest, size):
                return bytes(data)


COMPRESSIONS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": lambda raw: _Streams(raw, bz2.BZ2Decompressor),
    ".xz": lambda raw: _Streams(raw, lzma.LZMADecompressor),
    ".zst": _open_zst,
    ".zip": zipfile.ZipFile,
}


class _Decompressed(io.RawIOBase):
    """The decompressed content of a file; errors of the libraries become a LoraError that names the file."""

    def __init__(self, name: str, compression: str, raw: BinaryIO) -> None:
        self._name, self._compression, self._raw, self._size = name, compression, raw, 0
        with _translated(name, compression):
            opened = COMPRESSIONS[compression](raw)
            self._content = opened.open(_only_member(name, opened)) if compression == ".zip" else opened

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _translated(self._name, self._compression):
            block = self._content.read(len(buffer))
        self._size += len(block)
        if self._size > SMALL and self._size > MAX_RATIO * self._raw.tell():
            raise LoraError(
                f"{self._name}: expands to more than {MAX_RATIO:,} times its size, which rows do not",
                hint="check what it contains; if it is right, unpack it",
            )
        buffer[: len(block)] = block
        return len(block)


# Of damaged lists of files: wrong lengths, names that are not text, numbers out of range.
ZIP_ERRORS = (zipfile.BadZipFile, struct.error, ValueError, LookupError, OverflowError)


@contextmanager
def _translated(name: str, compression: str) -> Iterator[None]:
    try:
        yield
    except (*ZIP_ERRORS, EOFError, OSError, zlib.error, lzma.LZMAError, NotImplementedError) as error:
        raise LoraError(
            f"{name}: is not a complete {compression} file: {first_line(error)}",
            hint="download or compress it again",
        ) from None
    except RuntimeError as error:  # zipfile raises it for encrypted members
        raise LoraError(f"{name}: cannot be read: {first_line(error)}", hint="unpack the file") from None


def _only_member(name: str, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    # macOS adds a `__MACOSX` folder with a hidden file for each file.
    members = [
        member
        for member in archive.infolist()
        if not member.is_dir()
        and not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(member.filename).parts)
    ]
    if len(members) != 1:
        listed = ", ".join(member.filename for member in members[:3]) or "none"
        raise LoraError(
            f"{name}: contains {len(members)} files, not one: {listed}{', ...' * (len(members) > 3)}",
            hint="unpack it, and write the folder or the files as paths",
        )
    return members[0]
