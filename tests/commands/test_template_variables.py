"""Template variables and the date of a run: recorded, and used by check, train, eval, chat and the saved template."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lora_cli.commands.chat import Chat, ChatOptions
from lora_cli.setup.chat_model import load_chat
from tests.commands.conftest import Lora, WriteRecipe
from tests.inputs.chat_models import MODELS
from tests.model import families

pytestmark = pytest.mark.slow

OPTIONS = ChatOptions(temperature=0, max_new_tokens=1, system=None, seed=0)
ON_DATE = "the chat template writes the date: {} in every prompt of this run (data.template_date)"


def write_base(name: str) -> None:
    """Write a tiny base with the tokenizer of the chat model `name` into the folder `thinking`."""
    tokenizer = MODELS[name].tokenizer()
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    family = families.FAMILIES["llama"]
    families.write(family._replace(options={**family.options, **ids}), Path("thinking"))
    tokenizer.save_pretrained("thinking")


def prompt_of(adapter: Path) -> str:
    """Return the prompt of `lora chat` for a question."""
    loaded = load_chat(adapter, [], None)
    chat = Chat(loaded, OPTIONS)
    ids = chat._prompt_ids([{"role": "user", "content": "Hi"}], "chat", loaded.prompting["adapter"].template)
    return loaded.tokenizer.decode(ids)


def test_chat_and_the_saved_template_prompt_as_in_training(recipe: WriteRecipe, lora: Lora):
    write_base("qwen3")
    changes = {"model.path": "thinking", "training.max_steps": 1, "data.template_variables": {"enable_thinking": False}}
    result = lora("train", recipe(changes))
    assert result.code == 0, result.err
    adapter = Path("runs/a/adapter")
    assert json.loads((adapter / "trained_on.json").read_text())["template_variables"] == {"enable_thinking": False}
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert prompt_of(adapter) == prompt
    saved = AutoTokenizer.from_pretrained(adapter)
    chat = [{"role": "user", "content": "Hi"}]
    assert saved.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == prompt
    on = saved.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, enable_thinking=True)
    assert on == prompt.removesuffix("<think>\n\n</think>\n\n")


def test_the_date_of_a_run_is_recorded_and_used_again(recipe: WriteRecipe, lora: Lora):
    write_base("llama3.1")
    changes = {"model.path": "thinking", "training.max_steps": 2, "data.max_length": 256}
    written = recipe({**changes, "data.template_date": "2026-01-05"})
    result = lora("train", written)
    assert result.code == 0, result.err
    assert result.err.count(ON_DATE.format("2026-01-05")) == 1
    assert "template_date: '2026-01-05'" in Path("runs/a/recipe.yaml").read_text()
    assert "Today Date: 05 Jan 2026" in prompt_of(Path("runs/a/adapter"))
    # Without a date in the recipe, as for a run that took the day of its start: that day, not today.
    written = recipe(changes)
    resumed = lora("train", written, "--resume")
    assert resumed.code == 0, resumed.err
    for result in (resumed, lora("eval", written), lora("eval", "runs/a")):
        assert ON_DATE.format("2026-01-05") in result.err
    # The template that is saved writes the date of the server.
    assert "05 Jan 2026" not in (Path("runs/a/adapter") / "chat_template.jinja").read_text()
