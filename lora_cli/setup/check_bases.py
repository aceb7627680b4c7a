"""Compare the base of several adapters with the one that they were trained on, before and after it is loaded."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_cli.model.adapter_files import AdapterFiles
from lora_cli.model.base_model import BaseCheckpoint
from lora_cli.model.saved_adapter import check_same_base


@contextmanager
def check_bases(adapters: Iterable[AdapterFiles], base: BaseCheckpoint, *, allowed: bool) -> Iterator[None]:
    """Context manager around the loading of `base`: compare its weights with those that the adapters were trained on.

    A local model is compared before the block; a hub model after it, because only then are its files in the cache.

    Raises:
        LoraError: the weights differ, and `allowed` is False.
    """
    local = base.source.gguf_file is not None or Path(base.source.path).is_dir()
    for adapter in adapters if local else ():
        check_same_base(adapter, base, allowed=allowed)
    yield
    for adapter in () if local else adapters:
        check_same_base(adapter, base, allowed=allowed)
