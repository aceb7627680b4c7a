"""Exports of multimodal bases: the text decoder in llama.cpp, processors in folders, refusals before any weight."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMultimodalLM

from lora_cli.errors import LoraError
from lora_cli.export.gguf import model as gguf_model
from lora_cli.export.hf import model as hf_model
from lora_cli.export.source import ExportSource
from lora_cli.model import safetensors_io
from tests.export.sources import export_source, options
from tests.inputs.tiny_tokenizers import CHATML, build
from tests.model import multimodal_families
from tests.model.multimodal_families import MULTIMODAL

# Six layers, because llama.cpp computes full attention in every sixth layer.
GEMMA = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "sliding_window": 512,
    "tie_word_embeddings": True,
}


def source_of(name: str, folder: Path) -> ExportSource:
    """Save a tiny checkpoint with a tokenizer, and norm weights that are not all ones."""
    # No other token may end a text: llama.cpp knows some by their names.
    saved, family = build("<|im_start|>", eos="<|im_end|>", template=CHATML), MULTIMODAL[name]
    ids = {"vocab_size": len(saved), "eos_token_id": saved.eos_token_id, "pad_token_id": None}
    text = {**family.text, **(GEMMA if name == "gemma3" else {}), **ids}
    torch.manual_seed(0)
    config = multimodal_families.config_of(family._replace(text=text))
    model: Any = AutoModelForMultimodalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, parameter.mean().item(), 0.2)
    model.generation_config.eos_token_id = saved.eos_token_id
    model.save_pretrained(folder)
    saved.save_pretrained(folder)
    prompts = tuple(tuple(range(5 + 3 * n, 17 + 5 * n)) for n in range(2))
    return export_source(name, folder, saved, prompts=prompts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "qwen2.5-vl", "qwen3-vl", "mistral3", "internvl", "idefics3"])
def test_llama_cpp_computes_the_text_decoder_as_transformers_does(name: str, tmp_path: Path):
    source, settings = source_of(name, tmp_path / "model"), options("f32")
    gguf_model.check_supported(source, settings)
    gguf_model.write(source, tmp_path / "out.gguf", settings)
    checks = list(gguf_model.verify(source, tmp_path / "out.gguf", settings))
    assert {"tensors", "distribution"} <= {check.name for check in checks}
    assert [check for check in checks if not check.passed] == []
    notes = [
        check.found for check in checks if check.found.startswith("the file has the text decoder only; not in it: ")
    ]
    assert [all(kind in note for kind in MULTIMODAL[name].towers) for note in notes] == [True]


@pytest.mark.parametrize("name", ["gemma4", "glm4v", "lfm2-vl", "llama4", "qwen3-vl-moe"])
def test_a_decoder_that_cannot_be_written_is_refused_by_name(name: str, tmp_path: Path):
    with pytest.raises(LoraError, match=r"--to gguf: \w+ForConditionalGeneration is not supported; supported: llama"):
        gguf_model.check_supported(source_of(name, tmp_path), options("f32"))


@pytest.mark.slow
def test_a_folder_keeps_towers_and_processors(tmp_path: Path):
    source, settings = source_of("gemma3", tmp_path / "model"), options("bf16")
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}')
    hf_model.write(source, tmp_path / "out", settings)
    assert all(check.passed for check in hf_model.verify(source, tmp_path / "out", settings))
    stored = [safetensors_io.list_tensors(folder).keys() for folder in (tmp_path / "model", tmp_path / "out")]
    assert stored[0] == stored[1]
    assert "SiglipImageProcessor" in (tmp_path / "out" / "preprocessor_config.json").read_text()
    loader = "model = AutoModelForCausalLM.from_pretrained("
    assert any(line.startswith(loader) for line in hf_model.usage(source, tmp_path / "out", settings))
