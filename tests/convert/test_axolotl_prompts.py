"""axolotl's prompt types: rows are written as axolotl's prompters write them, and what they do otherwise is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from lora_cli.convert.axolotl_prompts import PROMPTS
from lora_cli.convert.config import Config
from lora_cli.convert.convert_config import Conversion, convert_config
from lora_cli.data.prepare import prepare_data
from lora_cli.recipe.load import parse_recipe
from tests.convert.minimal import MINIMAL, convert
from tests.inputs.tiny_tokenizers import build, supervised_texts

REQUEST = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
CONCISE = (
    "Below is an instruction from a USER that describes a task. The ASSISTANT writes a response that appropriately "
    "and concisely completes the request."
)
ALPACA_ROW = {"instruction": "Why?", "output": "So"}
ORCA_ROW = {"system_prompt": "Be brief.", "question": "Why?", "response": "So", "input": "not read"}
# A row of each type, and the text of axolotl's prompter before the answer.
ROWS: dict[str, tuple[dict[str, str], str]] = {
    "alpaca": (ALPACA_ROW, f"{REQUEST}\n\n### Instruction:\nWhy?\n\n### Response:\n"),
    "alpaca:chat": (ALPACA_ROW, f"SYSTEM: {REQUEST}\nUSER: Why?\nASSISTANT:"),
    "alpaca_instruct.load_no_prompt": (ALPACA_ROW, "### Instruction:\nWhy?\n\n### Response:\n"),
    "alpaca_chat.load_no_prompt": (ALPACA_ROW, "USER: Why?\nASSISTANT:"),
    "alpaca_chat.load_qa": (
        {"question": "Why?", "answer": "So", "input": "not read"}, f"SYSTEM: {CONCISE}\n\n\nUSER: Why?\nASSISTANT:",
    ),
    "alpaca_w_system": ({**ALPACA_ROW, "system": "Be brief."}, "SYSTEM: Be brief.\nUSER: Why?\nASSISTANT:"),
    "alpaca_w_system.load_instruct": (
        {**ALPACA_ROW, "system": "Be brief."}, "Be brief.\n\n### Instruction:\nWhy?\n\n### Response:\n",
    ),
    "alpaca_w_system.load_open_orca": (ORCA_ROW, "### System:\nBe brief.\n### Human:\nWhy?\n### Assistant:\n"),
    "orcamini": (ORCA_ROW, "### System:\nBe brief.\n\n### User:\nWhy?\n\n### Response:\n"),
    "oasst": (
        {"INSTRUCTION": "Why?", "RESPONSE": "So"}, f"{REQUEST}\n\n### Instruction:\nWhy?\n\n### Response:\n",
    ),
    "gpteacher": (
        {"instruction": "Why?", "response": "So"}, f"{REQUEST}\n\n### Instruction:\nWhy?\n\n### Response:\n",
    ),
}  # fmt: skip


def conversion(entry: dict[str, Any], **changes: Any) -> Conversion:
    values = {**MINIMAL["axolotl"], "datasets": [{"path": "r.jsonl", **entry}], **changes}
    return convert_config(Config(Path("x.yaml"), values), "axolotl")


def texts(folder: Path, result: Conversion, row: dict[str, str]) -> tuple[str, list[str]]:
    """The text that a row becomes by the recipe, and the texts with loss."""
    (folder / "r.jsonl").write_text(json.dumps(row) + "\n")
    tokenizer = build(eos="</s>")
    spec = parse_recipe(result.text, Path("r.yaml")).data
    prepared = prepare_data(spec, tokenizer, seed=0, cache=folder / "cache", info=lambda line: None, task="causal-lm")
    (encoded,) = prepared.train
    return tokenizer.decode(encoded.input_ids), supervised_texts(encoded, tokenizer)


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_written_as_their_type(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    row, prompt = ROWS[name]
    result = conversion({"type": name}, chat_template="llama3")
    assert result.to_accept() == []
    text, supervised = texts(tmp_path, result, row)
    assert text.rstrip() == f"{prompt}So</s>"
    assert supervised == ["So</s>"]


def test_a_type_that_the_config_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    own = {
        "field_instruction": "q", "field_input": "more", "field_output": "a", "system_prompt": "Be brief.",
        "system_format": "<<{system}>>\n", "format": "Q: {instruction}\n{input}\nA:",
    }  # fmt: skip
    result = conversion({"type": own})
    assert result.to_accept() == []
    row = {"q": "Why?", "more": "Now", "a": "So", "input": "not read"}
    assert texts(tmp_path, result, row) == ("<<Be brief.>>\nQ: Why?\nNow\nA:So</s>", ["So</s>"])


@pytest.mark.parametrize(
    ("own", "refused"),
    [
        ({"format": "{instruction} {input}", "field_input": "i"}, ["format"]),
        ({"format": "{instruction}", "no_input_format": "Q: {instruction}", "field_input": "i"},
         ["format", "no_input_format"]),
        ({"format": "{{x}} {instruction}"}, ["format"]),
        ({"format": "{instruction}", "system_prompt": "Be brief."}, []),
        ({"format": "{instruction}", "system_prompt": "x", "system_format": "{system}", "field_system": "s"}, []),
    ],
)  # fmt: skip
def test_texts_that_no_template_writes(own: dict[str, str], refused: list[str]):
    result = conversion({"type": {"field_instruction": "q", "field_output": "a", **own}})
    assert result.to_accept() == [f"datasets[0].type.{key}" for key in refused]


@pytest.mark.parametrize("name", ["jeopardy", "context_qa", "context_qa.load_404", "alpaca:phi", "explainchoice"])
def test_types_with_a_text_of_their_own_are_not_offered(name: str):
    assert conversion({"type": name}).to_accept() == ["datasets[0].type"]


def test_types_of_two_texts_cannot_be_mixed():
    second = {"path": "s.jsonl", "type": "orcamini"}
    result = conversion({}, datasets=[{"path": "r.jsonl", "type": "alpaca"}, second])
    assert result.to_accept() == ["datasets: type alpaca"]


def test_each_type_has_one_text():
    assert {name for name, prompt in PROMPTS.items() if prompt.template == "alpaca"} == {
        "alpaca", "alpaca:instruct", "alpaca_instruct", "alpaca_w_system.load_instruct", "gpteacher",
        "gpteacher:instruct", "oasst", "oasst:instruct",
    }  # fmt: skip


def test_conversations_of_fastchat():
    """Without a name, its text is Vicuna's; chat_template: chatml gives it the name chatml."""
    assert conversion({"type": "sharegpt"}).to_accept() == ["datasets[0].type"]
    assert conversion({"type": "sharegpt"}, chat_template="chatml").to_accept() == []
    named = conversion({"type": "sharegpt", "conversation": "chatml"})
    assert named.to_accept() == []
    assert parse_recipe(named.text, Path("r.yaml")).data.chat_template == "chatml"
    assert conversion({"type": "sharegpt", "conversation": "tulu"}).to_accept() == ["datasets[0].conversation"]
    assert conversion({"type": "chat_template", "conversation": "x"}).to_accept() == ["datasets[0].conversation"]


def test_long_documents_are_split():
    documents = {"path": "d.jsonl", "type": "completion"}
    assert convert("axolotl", datasets=[documents]).data.overlong == "split"
    mixed = conversion({}, datasets=[documents, {"path": "r.jsonl", "type": "chat_template"}])
    assert mixed.to_accept() == ["datasets: long rows of type completion"]
    assert parse_recipe(mixed.text, Path("r.yaml")).data.overlong == "drop"
