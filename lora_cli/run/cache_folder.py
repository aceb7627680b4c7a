"""The cache folder for encoded rows, downloaded data files and unpacked GGUF files. No torch."""

import os
from pathlib import Path

from lora_cli.errors import LoraError

CACHE_VARIABLE = "LORA_CACHE"  # of the environment
HINT = f"set {CACHE_VARIABLE} to a folder that can be written"


def cache_folder() -> Path:
    """Return $LORA_CACHE, else ~/.cache/lora, which is created.

    Raises:
        LoraError: it cannot be created, or there is no home folder.
    """
    try:
        folder = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "lora")
    except RuntimeError:
        raise LoraError("there is no home folder for the cache: HOME is not set", hint=HINT) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoraError(f"the cache folder {folder} cannot be created: {error.strerror}", hint=HINT) from None
    return folder
