"""A data file with its type, and its bytes: plain or compressed (.gz .bz2 .xz .zst, .zip of one file). No torch."""

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

from lora_cli.errors import LoraError

BUFFER = 1 << 20  # bytes of decompressed content that are read at a time

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
        with self.path.open("rb") as raw:
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
        with _translated(name, compression), path.open("rb") as raw, zipfile.ZipFile(raw) as archive:
            suffix = PurePosixPath(_only_member(name, archive).filename).suffix.lower()
    return DataFile(path, name, suffix, compression, delimiter)


def _open_zst(raw: BinaryIO) -> Any:
    # Imported here because pyarrow takes half a second to import, and few files need it.
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")


COMPRESSIONS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zst,
    ".zip": zipfile.ZipFile,
}


class _Decompressed(io.RawIOBase):
    """The decompressed content of a file; errors of the libraries become a LoraError that names the file."""

    def __init__(self, name: str, compression: str, raw: BinaryIO) -> None:
        self._name, self._compression = name, compression
        with _translated(name, compression):
            opened = COMPRESSIONS[compression](raw)
            self._content = opened.open(_only_member(name, opened)) if compression == ".zip" else opened

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _translated(self._name, self._compression):
            block = self._content.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)


@contextmanager
def _translated(name: str, compression: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError) as error:
        raise LoraError(
            f"{name}: is not a complete {compression} file: {_first_line(error)}",
            hint="download or compress it again",
        ) from None
    except RuntimeError as error:  # zipfile raises it for encrypted members
        raise LoraError(f"{name}: cannot be read: {_first_line(error)}", hint="unpack the file") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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
