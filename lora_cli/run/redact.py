"""Remove the folders of this machine from paths that are written into results, which are published. No torch."""

from pathlib import Path


def redact_path(path: str) -> str:
    """Return `path` without the folders of this machine: unchanged if relative or a hub id, else only its last part."""
    return Path(path).name if Path(path).is_absolute() or path.startswith("~") else path
