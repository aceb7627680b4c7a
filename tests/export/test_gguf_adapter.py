"""GGUF export of LoRA adapters: with the base in GGUF, llama.cpp gives the same outputs as PEFT."""

from pathlib import Path
from typing import Any

import gguf
import pytest

from lora_cli.errors import LoraError
from lora_cli.export.gguf import adapter as gguf_adapter
from lora_cli.export.gguf import model as gguf_model
from lora_cli.export.source import Check, ExportSource
from lora_cli.model.adapter_files import open_adapter
from tests.export.sources import options, tiny_model, tiny_source
from tests.model import zoo

pytestmark = pytest.mark.slow


def with_adapter(source: ExportSource, folder: Path, **adapter_options: Any) -> ExportSource:
    """Return `source` with an adapter that changes its outputs clearly."""
    base = tiny_model(source.name, vocabulary=source.config.vocab_size)
    zoo.adapted(base, **adapter_options).save_pretrained(folder)
    return source._replace(adapter=open_adapter(folder))


def checks(source: ExportSource, file: Path, over: Path, quantize: str = "f32") -> dict[str, Check]:
    gguf_adapter.check_supported(source, options(quantize, over=over))
    gguf_adapter.write(source, file, options(quantize, over=over))
    return {check.name: check for check in gguf_adapter.verify(source, file, options(quantize, over=over))}


@pytest.mark.parametrize(
    ("family", "adapter_options"),
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
def test_the_adapter_passes_its_checks_on_the_base_in_gguf(
    family: str, adapter_options: dict[str, Any], tmp_path: Path
):
    base = tiny_source(family, tmp_path / "model")
    gguf_model.write(base, tmp_path / "base.gguf", options("f32"))
    source = with_adapter(base, tmp_path / "adapter", **adapter_options)
    results = checks(source, tmp_path / "out.gguf", tmp_path / "base.gguf")
    assert {name for name, check in results.items() if not check.passed} == set(), results
    # The adapter has an effect: without it, the output check fails.
    without_adapter = {check.name: check for check in gguf_model.verify(source, tmp_path / "base.gguf", options("f32"))}
    assert not without_adapter["distribution"].passed


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportSource, Path]:
    folder = tmp_path_factory.mktemp("llama")
    base = tiny_source("llama", folder / "model")
    gguf_model.write(base, folder / "base.gguf", options("f32"))
    return base, folder / "base.gguf"


def test_a_wrong_scale_fails_the_checks(llama: tuple[ExportSource, Path], tmp_path: Path):
    base, over = llama
    source = with_adapter(base, tmp_path / "adapter")
    gguf_adapter.write(source, tmp_path / "out.gguf", options(over=over))
    stronger = with_adapter(base, tmp_path / "stronger", alpha=16.0)
    results = {check.name: check for check in gguf_adapter.verify(stronger, tmp_path / "out.gguf", options(over=over))}
    assert not results["tensors"].passed
    assert not results["distribution"].passed


@pytest.mark.parametrize(
    ("adapter_options", "message"),
    [
        ({"method": "dora"}, "DoRA"),
        ({"method": "ia3"}, "method ia3"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: lm_head"),
        ({"bias": "all"}, "bias: all"),
    ],
)
def test_adapters_that_llama_cpp_does_not_support_are_refused(
    adapter_options: dict[str, Any], message: str, llama: tuple[ExportSource, Path], tmp_path: Path
):
    source = with_adapter(llama[0], tmp_path / "adapter", **adapter_options)
    with pytest.raises(LoraError, match=message) as refusal:
        gguf_adapter.check_supported(source, options())
    assert "--to gguf" in str(refusal.value.hint)


def test_another_base_is_refused(llama: tuple[ExportSource, Path], tmp_path: Path):
    source = with_adapter(llama[0], tmp_path / "adapter")
    other = tiny_source("llama", tmp_path / "other", intermediate_size=96)
    gguf_model.write(other, tmp_path / "other.gguf", options("f32"))
    with pytest.raises(LoraError, match=r"blk\.0\.ffn"):
        gguf_adapter.check_supported(source, options(over=tmp_path / "other.gguf"))
    another = tiny_source("qwen2", tmp_path / "another")
    gguf_model.write(another, tmp_path / "another.gguf", options("f32"))
    with pytest.raises(LoraError, match="architecture is qwen2"):
        gguf_adapter.check_supported(source, options(over=tmp_path / "another.gguf"))
    (tmp_path / "none.gguf").write_bytes(b"no")
    with pytest.raises(LoraError, match="not a GGUF file"):
        gguf_adapter.check_supported(source, options(over=tmp_path / "none.gguf"))


def test_the_metadata_of_the_file(llama: tuple[ExportSource, Path], tmp_path: Path):
    source = with_adapter(llama[0], tmp_path / "adapter")
    gguf_adapter.write(source, tmp_path / "out.gguf", options())
    fields = gguf.GGUFReader(str(tmp_path / "out.gguf")).fields
    assert fields["general.type"].contents() == "adapter"
    assert fields["adapter.type"].contents() == "lora"
    assert fields["adapter.lora.alpha"].contents() == 8.0
