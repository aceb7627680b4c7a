"""What a script does several times, after training, or to objects that it has created: all of it is in the report."""

from pathlib import Path

import pytest

from lora_cli.convert.draft import Outcome
from tests.convert.test_scripts_and_commands import SCRIPT, UNSLOTH, read, recipe_of, rows, script


@pytest.mark.parametrize(
    ("more", "keys"),
    [
        ("ds = ds.map(f)\nds = ds.map(g)", ["dataset.map", "map, line 8"]),
        ("ds = ds.map(f).map(g).map(h)", ["dataset.map", "map, line 7", "map, line 7 again"]),
        ("ds = ds.map(f)\nds = ds.map(f)", ["dataset.map"]),
        ("ds = ds.train_test_split(0.1)\nds = ds['train'].train_test_split(0.2)",
         ["dataset.train_test_split", "train_test_split, line 8"]),
        ("other = LoraConfig(r=64)", ["LoraConfig, line 7"]),
        ("model = AutoModelForCausalLM.from_pretrained('a/b', x=1)", ["from_pretrained, line 2", "from_pretrained.x"]),
        ("tokenizer = AutoTokenizer.from_pretrained('a/b')", ["tokenizer, line 7"]),
        ("tokenizer.add_tokens(['x'])\ntokenizer.add_tokens(['y'])", ["calls.add_tokens", "calls.add_tokens again"]),
        ("def f(rows):\n    return rows.filter(g)\nds = f(ds)", ["dataset.filter"]),
        ("ds: Dataset = ds.map(f)", ["dataset.map"]),
        ("ds = concatenate_datasets([ds, more])", ["dataset.concatenate_datasets"]),
        ("ds = ds.add_column('x', values)", ["dataset.add_column"]),
    ],
)  # fmt: skip
def test_steps_that_are_repeated_are_all_in_the_report(tmp_path: Path, more: str, keys: list[str]):
    result = script(tmp_path, more)
    assert sorted(result.to_accept()) == sorted(keys)
    for key in keys:
        assert key in result.draft.config.places


def test_the_call_that_the_trainer_gets_is_read(tmp_path: Path):
    text = SCRIPT.replace("# more", "mine = LoraConfig(r=64)").replace("peft_config=peft_config", "peft_config=mine")
    result = read(tmp_path, "train.py", text)
    assert result.to_accept() == ["LoraConfig, line 5"]
    assert "rank: 64" in result.text
    model = script(tmp_path, "model = AutoModelForCausalLM.from_pretrained('a/c')")
    assert "path: a/c" in model.text


@pytest.mark.parametrize(
    "after",
    [
        "model = AutoModelForCausalLM.from_pretrained('out')",
        "rows = ds.map(answer)",
        "tokenizer.add_tokens(['x'])",
        "model.config.x = 1",
        "trainer = SFTTrainer(model)",
    ],
)
def test_what_comes_after_training_has_no_effect(tmp_path: Path, after: str):
    trained = f"{SCRIPT}trainer.train()\n{after}\n"
    result = read(tmp_path, "train.py", trained)
    recipe_of(result)
    if "=" in after and "config.x" not in after:
        (line,) = [line for line in result.lines if line.key.startswith("after training.")]
        assert (line.outcome, line.key.rpartition(" ")[2]) == (Outcome.NO_EFFECT, "10")
    assert read(tmp_path, "train.py", f"{SCRIPT}{after}\n").to_accept() != []


def test_functions_after_training_may_be_called_before(tmp_path: Path):
    text = (
        SCRIPT.replace("# more", "ds = prepare(ds)") + "trainer.train()\ndef prepare(rows):\n    return rows.map(f)\n"
    )
    assert read(tmp_path, "train.py", text).to_accept() == ["dataset.map"]


@pytest.mark.parametrize(
    "more",
    [
        "lr = 1e-4\nlr = 2e-4",
        "lr = 1e-4\nlr += 1e-4",
        "options = {'learning_rate': 1e-4}\noptions['learning_rate'] = 2e-4",
        "options = {'learning_rate': 1e-4}\noptions.update(learning_rate=2e-4)",
    ],
)
def test_a_name_that_changes_is_no_literal(tmp_path: Path, more: str):
    given = "**options" if "options" in more else "learning_rate=lr"
    text = SCRIPT.replace("max_length=512", f"max_length=512, {given}")
    text = text.replace("args = ", f"{more}\nargs = ")
    assert read(tmp_path, "train.py", text).to_accept() == [
        "SFTConfig.**" if "options" in more else "SFTConfig.learning_rate"
    ]


def test_an_argument_that_two_calls_have_with_different_values(tmp_path: Path):
    text = UNSLOTH.replace('"out"', '"out", max_seq_length=256')
    result = read(tmp_path, "train.py", text)
    assert result.to_accept() == ["from_pretrained.max_seq_length"]
    assert "max_length: 256" in result.text
    recipe_of(read(tmp_path, "train.py", text.replace("256", "512")))


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ("tokenizer.eos_token = '<|im_end|>'", "set.tokenizer.eos_token"),
        ("model.config.attention_dropout = 0.1", "set.model.config.attention_dropout"),
        ("for p in model.parameters():\n    p.requires_grad = False", "set.p.requires_grad"),
        ("trainer.add_callback(Mine())", "calls.add_callback"),
        ("tokenizer = AutoTokenizer.from_pretrained('a/other')", "tokenizer, line 7"),
    ],
)
def test_changes_of_the_model_and_its_tokenizer(tmp_path: Path, more: str, key: str):
    assert script(tmp_path, more).to_accept() == [key]


def test_the_tokenizer_is_that_of_the_base(tmp_path: Path):
    other = SCRIPT.replace(
        'AutoTokenizer.from_pretrained("a/b")', 'AutoTokenizer.from_pretrained("a/c", use_fast=True)'
    )
    assert read(tmp_path, "train.py", other).to_accept() == ["AutoTokenizer.path"]
    bos = SCRIPT.replace('AutoTokenizer.from_pretrained("a/b")', 'AutoTokenizer.from_pretrained("a/b", bos_token="x")')
    assert read(tmp_path, "train.py", bos).to_accept() == ["AutoTokenizer.bos_token"]


def test_callbacks_may_change_the_training(tmp_path: Path):
    stops = "eval_strategy='steps', eval_steps=10, load_best_model_at_end=True"
    text = SCRIPT.replace("max_length=512", f"max_length=512, {stops}")
    early = text.replace("args=args", "args=args, callbacks=[EarlyStoppingCallback(early_stopping_patience=3)]")
    spec = recipe_of(read(tmp_path, "train.py", early)).training
    assert (spec.stop_after, spec.eval_every, spec.keep) == (3, 10, "best")
    both = early.replace("callbacks=[", "callbacks=[Mine(), ")
    assert read(tmp_path, "train.py", both).to_accept() == ["SFTTrainer.callbacks"]
    unknown = text.replace("args=args", "args=args, callbacks=mine")
    assert read(tmp_path, "train.py", unknown).to_accept() == ["SFTTrainer.callbacks"]


def test_early_stopping_needs_rows_to_evaluate(tmp_path: Path):
    text = SCRIPT.replace("args=args", "args=args, callbacks=[EarlyStoppingCallback(early_stopping_patience=3)]")
    result = read(tmp_path, "train.py", text)
    assert result.to_accept() == ["SFTTrainer.early_stopping_patience"]
    assert "stop_after" not in result.text


RENDER = """\
def write(row):
    {before}
    return {{"text": tokenizer.apply_chat_template({rows}, tokenize=False{options})}}
ds = ds.map(write)"""


@pytest.mark.parametrize(
    ("before", "given", "options", "accepted"),
    [
        ("pass", "row['messages']", "", []),
        ("pass", "row['talk']", ", add_generation_prompt=False", []),
        ("pass", "row['messages']", ", enable_thinking=False", ["dataset.map"]),
        ("turns = [{'role': 'user', 'content': row['q']}]", "turns", "", ["dataset.map"]),
        ("turns = row['a'] + row['b']", "turns", "", ["dataset.map"]),
    ],
)
def test_a_function_that_renders_the_chat_template(
    tmp_path: Path, before: str, given: str, options: str, accepted: list[str]
):
    result = script(tmp_path, RENDER.format(before=before, rows=given, options=options))
    assert result.to_accept() == accepted
    if given == "row['talk']":
        assert rows(recipe_of(result))["columns"] == {"messages": "talk"}


PROMPT = """\
text = {text!r}
def write(row):
    return {{"text": text.format({columns}) + tokenizer.eos_token}}
ds = ds.map(write)"""


@pytest.mark.parametrize(
    ("text", "columns", "template"),
    [
        ("Q: {}\nA: {}", ["q", "a"], "{{ 'Q: ' + message['content'] + '' }}{% else %}{{ '\\nA: ' + message"),
        ("Q: {}\nMore: {}\nA: {}!", ["q", "m", "a"], "{% else %}{{ '\\nA: ' + message['content'] + '!' + eos_token }}"),
    ],
)
def test_a_function_that_fills_a_prompt(tmp_path: Path, text: str, columns: list[str], template: str):
    given = ", ".join(f"row[{name!r}]" for name in columns)
    recipe = recipe_of(script(tmp_path, PROMPT.format(text=text, columns=given)))
    assert template in str(recipe.data.chat_template)
    expected = {"instruction": "q", "input": "m" if len(columns) == 3 else None, "output": "a"}
    assert rows(recipe)["columns"] == expected


def test_a_prompt_of_other_columns_is_code(tmp_path: Path):
    given = "row['q'], row['a'] + row['b']"
    assert script(tmp_path, PROMPT.format(text="Q: {}\nA: {}", columns=given)).to_accept() == ["dataset.map"]
