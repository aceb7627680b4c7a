"""Versions that the entries of the cache depend on: of the format of encoded rows, and of libraries. No torch."""

from importlib.metadata import version

CACHE_VERSION = 8  # increase it if identical rows and options would encode or be counted differently than before


def encoded_versions() -> dict[str, str]:
    """Return the versions that encoded rows depend on; rows of others are encoded again."""
    return {"format": str(CACHE_VERSION), "transformers": version("transformers"), "tokenizers": version("tokenizers")}


def gguf_versions() -> dict[str, str]:
    """Return the versions that an unpacked GGUF file depends on."""
    return {"transformers": version("transformers")}
