"""Disk full: convert the SafetensorError of a failed safetensors write into the OSError that other writes raise."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def disk_full_as_os_error(folder: Path) -> Iterator[None]:
    """Within the block, convert I/O errors of safetensors into an OSError about `folder`.

    Raises:
        OSError: safetensors could not write, for example because the disk is full.
    """
    try:
        yield
    except SafetensorError as error:
        # The message ends like every I/O error of Rust: "No space left on device (os error 28)".
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
