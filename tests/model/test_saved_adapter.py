"""Opening adapters of other tools: the labels of a classification head without labels.json."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, BertConfig

from lora_cli.errors import LoraError
from lora_cli.model.adapter_files import open_adapter
from lora_cli.model.saved_adapter import find_base
from tests.inputs.tiny_tokenizers import build_encoder

CLASSES = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tokenizer = build_encoder("bert")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    AutoModelForSequenceClassification.from_config(config).bert.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_head_without_names_has_as_many_labels_as_outputs(
    task: str, size: int, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    model = CLASSES[task].from_pretrained(base, num_labels=size)
    config = LoraConfig(r=2, target_modules=["query"], task_type=task)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    opened = find_base(open_adapter(tmp_path / "adapter"), path=str(base), trust_remote_code=False)
    labels = opened.base.labels
    assert labels is not None
    assert labels.names == (("value",) if size == 1 else tuple(f"LABEL_{number}" for number in range(size)))
    assert labels.kind == ("regression" if size == 1 else "single")
    assert "has no labels.json: its head has" in capfd.readouterr().err
    assert opened.base.skeleton().classifier.weight.shape == torch.Size([size, 16])


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000])
def test_a_base_whose_name_is_too_long_for_a_path_is_refused(name: str, base: Path, tmp_path: Path):
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    get_peft_model(CLASSES["SEQ_CLS"].from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": name}))
    with pytest.raises(LoraError, match=r"base_model_name_or_path: .* is not a path or hub id"):
        open_adapter(tmp_path / "adapter")
