"""torchtune's tokenizers: the text around messages, and Alpaca's text in the user's turn, are those of the recipe."""

import json
from pathlib import Path
from typing import Any

import pytest

from lora_cli.convert.config import Config
from lora_cli.convert.convert_config import Conversion, convert_config
from lora_cli.data.prepare import prepare_data
from lora_cli.recipe.load import parse_recipe
from tests.convert.minimal import MINIMAL
from tests.inputs.tiny_tokenizers import build, supervised_texts

REQUEST = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PROMPT = f"{REQUEST}\n\n### Instruction:\nWhy?\n\n### Response:\n"
# By tokenizer: its special tokens, and the text of a row before the answer and after it.
FAMILIES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "llama3.llama3_tokenizer": (
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        f"<|start_header_id|>user<|end_header_id|>\n\n{PROMPT.strip()}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>",
    ),
    "qwen2_5.qwen2_5_tokenizer": (
        ("<|im_start|>", "<|im_end|>"), f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>",
    ),
    "phi3.phi3_mini_tokenizer": (
        ("<|user|>", "<|assistant|>", "<|end|>"), f"<|user|>\n{PROMPT}<|end|>\n<|assistant|>\n", "<|end|>",
    ),
}  # fmt: skip


def conversion(tokenizer: str, *builders: str, **options: Any) -> Conversion:
    rows = [{"_component_": f"torchtune.datasets.{name}", "source": "r"} for name in builders]
    family = tokenizer.partition(".")[0]
    values = {
        **MINIMAL["torchtune"],
        "model": {"_component_": f"torchtune.models.{family}.lora_{family}", "lora_attn_modules": ["output_proj"]},
        "tokenizer": {"_component_": f"torchtune.models.{tokenizer}", "max_seq_len": 512, **options},
        "dataset": rows if len(rows) > 1 else rows[0],
    }
    return convert_config(Config(Path("x.yaml"), values), "torchtune")


@pytest.mark.parametrize("tokenizer", FAMILIES)
def test_alpaca_s_text_is_in_the_user_s_turn(tokenizer: str, tmp_path: Path):
    special, before, end = FAMILIES[tokenizer]
    result = conversion(tokenizer, "alpaca_dataset")
    assert result.to_accept() == []
    spec = parse_recipe(result.text, Path("r.yaml")).data
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps({"instruction": "Why?", "output": "So"}))
    changes = {"train": str(file), "loss_on": "assistant"}
    tiny = build(*special, eos="</s>")
    prepared = prepare_data(
        spec.model_copy(update=changes), tiny, seed=0, cache=tmp_path / "cache", info=lambda line: None,
        task="causal-lm",
    )  # fmt: skip
    (encoded,) = prepared.train
    assert tiny.decode(encoded.input_ids).startswith(f"{before}So{end}")
    (answer,) = supervised_texts(encoded, tiny)
    assert answer.startswith(f"So{end}")


@pytest.mark.parametrize(
    ("tokenizer", "template"),
    [
        ("llama3.llama3_tokenizer", "llama3"),
        ("qwen2.qwen2_tokenizer", "chatml"),
        ("phi3.phi3_mini_tokenizer", None),
        ("mistral.mistral_tokenizer", None),
    ],
)
def test_the_tokenizer_writes_no_system_message_of_the_base(tokenizer: str, template: str | None):
    result = conversion(tokenizer, "chat_dataset")
    assert parse_recipe(result.text, Path("r.yaml")).data.chat_template == template
    assert [each.value for each in result.draft.assumed if each.to == "data.chat_template"] == [template] * bool(
        template
    )


def test_alpaca_s_text_that_no_template_can_write_is_told():
    component = "dataset._component_"
    assert conversion("phi4.phi4_tokenizer", "alpaca_dataset").to_accept() == [component]
    template = "torchtune.data.ChatMLTemplate"
    own = conversion("llama3.llama3_tokenizer", "alpaca_dataset", prompt_template=template)
    assert own.to_accept() == [component, "tokenizer.prompt_template"]
    mixed = conversion("llama3.llama3_tokenizer", "chat_dataset", "alpaca_dataset")
    assert mixed.to_accept() == ["dataset[1]._component_"]
    assert parse_recipe(mixed.text, Path("r.yaml")).data.chat_template == "llama3"
