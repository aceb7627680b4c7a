"""Open a zip archive of unknown origin (torch.save, .npz): entries stored without compression, none larger than it is.

Without compression there is no zip bomb: what an entry unpacks to is in the file, and all entries together are no
larger than the file.
"""

import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lora_cli.errors import LoraError
from lora_cli.run.read_file import open_regular, printable

# What zipfile raises for damaged archives; RuntimeError for encrypted entries.
ZIP_ERRORS = (zipfile.BadZipFile, EOFError, ValueError, OverflowError, NotImplementedError, RuntimeError, struct.error)

# The list of entries at the end of an archive, of which zipfile makes objects that are far larger.
MAX_DIRECTORY_BYTES = 8 << 20  # some hundred bytes for each entry
END, END_BYTES = b"PK\x05\x06", 22  # its last record, before a comment
END64, END64_BYTES, LOCATOR, LOCATOR_BYTES = b"PK\x06\x06", 56, b"PK\x06\x07", 20  # records of the long form
MAX_COMMENT = 1 << 16


class StoredZip:
    """An open archive whose entries were checked; each is read with its checksum."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, *, hint: str) -> None:
        self.path, self.size = path, path.stat().st_size  # of the file, bytes
        self._archive, self._hint = archive, hint
        self.entries: dict[str, int] = {}  # bytes, by name
        for entry in archive.infolist():
            name = printable(entry.filename)
            if entry.filename in self.entries:
                raise self.damage(f"it has {name} twice")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise LoraError(
                    f"{path}: {name} is compressed, and neither torch nor mlx-lm compresses adapters", hint=hint
                )
            if not 0 <= entry.header_offset <= self.size:  # zipfile goes there unchecked
                raise self.damage(f"{name} is at byte {entry.header_offset:,}, and the file has {self.size:,}")
            self.entries[entry.filename] = entry.file_size
        if (total := sum(self.entries.values())) > self.size:
            raise self.damage(f"its entries have {total:,} bytes, and the file {self.size:,}")

    def read(self, name: str) -> bytes:
        """Return the bytes of an entry.

        Raises:
            LoraError: it is damaged.
        """
        try:
            return self._archive.read(name)
        except ZIP_ERRORS as error:
            raise self.damage(f"{printable(name)} cannot be read: {printable(error)}") from None

    def damage(self, problem: str) -> LoraError:
        """Return the error of a damaged archive."""
        return LoraError(f"{self.path} is damaged: {problem}", hint=self._hint)


@contextmanager
def open_stored_zip(path: Path, *, hint: str) -> Iterator[StoredZip]:
    """Open the archive `path` for the block.

    Raises:
        LoraError: it is no regular file or no complete archive, or it has compressed entries.
    """
    with open_regular(path, hint=hint) as stream:
        _check_directory(stream, path, hint=hint)
        try:
            archive = zipfile.ZipFile(stream)
        except ZIP_ERRORS as error:
            raise LoraError(f"{path} is damaged: {printable(error)}", hint=hint) from None
        with archive:
            yield StoredZip(path, archive, hint=hint)


def _check_directory(stream: BinaryIO, path: Path, *, hint: str) -> None:
    """Check the size of the list of entries, by each record at the end of the file that could be the one of it.

    Raises:
        LoraError: the list is too large.
    """
    size = stream.seek(0, 2)
    stream.seek(max(0, size - END_BYTES - MAX_COMMENT - LOCATOR_BYTES - END64_BYTES))
    tail = stream.read()
    at = tail.find(END)
    while at >= 0:
        sizes = [int.from_bytes(tail[at + 12 : at + 16], "little")]
        locator = tail[max(0, at - LOCATOR_BYTES) : at]
        if locator.startswith(LOCATOR):  # versions of Python read the long form where it says, or right before it
            stream.seek(min(size, int.from_bytes(locator[8:16], "little")))
            before = tail[max(0, at - LOCATOR_BYTES - END64_BYTES) : at - LOCATOR_BYTES]
            records = [record for record in (stream.read(END64_BYTES), before) if record.startswith(END64)]
            sizes = [int.from_bytes(record[40:48], "little") for record in records] or sizes
        if max(sizes) > MAX_DIRECTORY_BYTES:
            raise LoraError(f"{path} is damaged: its list of entries has {max(sizes):,} bytes", hint=hint)
        at = tail.find(END, at + 1)
    stream.seek(0)
