"""A LoRA as a GGUF adapter is the adapter: over the base in GGUF, llama.cpp computes what PEFT does."""

from pathlib import Path
from typing import Any

import gguf as library
import pytest
import torch

from lora_cli.errors import LoraError
from lora_cli.export.gguf import adapter as gguf_adapter
from lora_cli.export.gguf import model as gguf_model
from lora_cli.export.source import Check, ExportSource
from tests.export.sources import model, options, subject
from tests.model import zoo


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def with_adapter(found: ExportSource, folder: Path, **given: Any) -> ExportSource:
    """`found` with an adapter that changes it well."""
    base = model(found.name, vocabulary=found.config.vocab_size)
    zoo.adapted(base, **given).save_pretrained(folder)
    return found._replace(adapter=folder)


def checks(found: ExportSource, file: Path, over: Path, form: str = "f32") -> dict[str, Check]:
    gguf_adapter.refuse(found, options(form, over=over))
    gguf_adapter.write(found, file, options(form, over=over))
    return {check.name: check for check in gguf_adapter.prove(found, file, options(form, over=over))}


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("llama", {}),
        ("llama", {"method": "rslora", "alpha_pattern": {"q_proj": 2}, "rank_pattern": {"up_proj": 2}}),
        ("falcon", {}),
        ("gpt2", {}),
        ("phi3", {}),
        ("gemma2", {"target_modules": ["q_proj", "k_proj", "down_proj"]}),
    ],
    ids=["llama", "patterns", "falcon", "gpt2", "phi3", "gemma2"],
)
def test_it_is_the_adapter_over_the_base_in_gguf(family: str, given: dict[str, Any], tmp_path: Path):
    base = subject(family, tmp_path / "model")
    gguf_model.write(base, tmp_path / "base.gguf", options("f32"))
    found = with_adapter(base, tmp_path / "adapter", **given)
    made = checks(found, tmp_path / "out.gguf", tmp_path / "base.gguf")
    assert {name for name, check in made.items() if not check.passed} == set(), made
    # And it does something: without it, the base is another model.
    bare = {check.name: check for check in gguf_model.prove(found, tmp_path / "base.gguf", options("f32"))}
    assert not bare["distribution"].passed


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportSource, Path]:
    folder = tmp_path_factory.mktemp("llama")
    base = subject("llama", folder / "model")
    gguf_model.write(base, folder / "base.gguf", options("f32"))
    return base, folder / "base.gguf"


def test_a_lost_scale_is_found_out(llama: tuple[ExportSource, Path], tmp_path: Path):
    base, over = llama
    found = with_adapter(base, tmp_path / "adapter")
    gguf_adapter.write(found, tmp_path / "out.gguf", options(over=over))
    stronger = with_adapter(base, tmp_path / "stronger", alpha=16.0)
    made = {check.name: check for check in gguf_adapter.prove(stronger, tmp_path / "out.gguf", options(over=over))}
    assert not made["tensors"].passed
    assert not made["distribution"].passed


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "dora"}, "DoRA"),
        ({"method": "ia3"}, "method ia3"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: lm_head"),
        ({"bias": "all"}, "bias: all"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused(
    given: dict[str, Any], says: str, llama: tuple[ExportSource, Path], tmp_path: Path
):
    found = with_adapter(llama[0], tmp_path / "adapter", **given)
    with pytest.raises(LoraError, match=says) as refusal:
        gguf_adapter.refuse(found, options())
    assert "--to gguf" in str(refusal.value.hint)


def test_another_base_is_refused(llama: tuple[ExportSource, Path], tmp_path: Path):
    found = with_adapter(llama[0], tmp_path / "adapter")
    other = subject("llama", tmp_path / "other", intermediate_size=96)
    gguf_model.write(other, tmp_path / "other.gguf", options("f32"))
    with pytest.raises(LoraError, match=r"blk\.0\.ffn"):
        gguf_adapter.refuse(found, options(over=tmp_path / "other.gguf"))
    another = subject("qwen2", tmp_path / "another")
    gguf_model.write(another, tmp_path / "another.gguf", options("f32"))
    with pytest.raises(LoraError, match="architecture is qwen2"):
        gguf_adapter.refuse(found, options(over=tmp_path / "another.gguf"))
    (tmp_path / "none.gguf").write_bytes(b"no")
    with pytest.raises(LoraError, match="no GGUF file"):
        gguf_adapter.refuse(found, options(over=tmp_path / "none.gguf"))


def test_the_file_says_what_it_is(llama: tuple[ExportSource, Path], tmp_path: Path):
    found = with_adapter(llama[0], tmp_path / "adapter")
    gguf_adapter.write(found, tmp_path / "out.gguf", options())
    fields = library.GGUFReader(str(tmp_path / "out.gguf")).fields
    assert fields["general.type"].contents() == "adapter"
    assert fields["adapter.type"].contents() == "lora"
    assert fields["adapter.lora.alpha"].contents() == 8.0
