"""safetensors reports a full disk by an error of its own; here it becomes the OSError that everything else raises."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def disk_full_as_os_error(folder: Path) -> Iterator[None]:
    """Within the block, what safetensors could not write because of the disk is an OSError about `folder`."""
    try:
        yield
    except SafetensorError as error:
        # Its text ends as Rust's I/O errors do: "No space left on device (os error 28)".
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
