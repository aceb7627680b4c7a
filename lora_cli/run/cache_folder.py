"""The cache folder for encoded rows, downloaded data files and unpacked GGUF files. No torch."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $LORA_CACHE, else ~/.cache/lora."""
    return Path(os.environ.get("LORA_CACHE") or Path.home() / ".cache" / "lora")
