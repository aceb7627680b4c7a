"""What users get wrong most often, each with the exact two lines it is answered with."""

# ruff: noqa: E501 - a line of the terminal is a line here
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.commands.conftest import Lora, WriteRecipe

LAYERS = "its linear layers are: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


class Mistake(NamedTuple):
    """Changes to the recipe and the folder, what is typed, and the answer."""

    changes: dict[str, Any]
    said: list[str]  # the last two lines
    words: str = "train recipe.yaml"
    before: Callable[[], object] = lambda: None


def write(name: str, text: str | bytes) -> Callable[[], object]:
    return lambda: Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())


def folder(name: str, file: str = "", text: str = "{}") -> Callable[[], object]:
    def make() -> None:
        Path(name).mkdir()
        if file:
            (Path(name) / file).write_text(text)

    return make


def without_template() -> None:
    Path("plain").mkdir()
    for file in Path("base").iterdir():
        if file.name != "chat_template.jinja":
            (Path("plain") / file.name).write_bytes(file.read_bytes())
    config = json.loads(Path("plain/tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    Path("plain/tokenizer_config.json").write_text(json.dumps(config))


MISTAKES = {
    "typo in a target module": Mistake(
        {"adapter.target_modules": ["q_prj", "v_proj"]},
        ["error: adapter.target_modules: q_prj matches no layer", f"hint: did you mean q_proj? {LAYERS}"],
    ),
    "a regex that matches nothing": Mistake(
        {"adapter.target_modules": "model.*attn.*qkv"},
        ["error: adapter.target_modules: the regex 'model.*attn.*qkv' matches no layer", f"hint: {LAYERS}"],
    ),
    "no data file": Mistake(
        {"data.train": "row.jsonl"},
        ["error: data: row.jsonl does not exist", "hint: did you mean rows.jsonl?"],
    ),
    "an empty data file": Mistake(
        {},
        ["error: rows.jsonl: holds no rows", "hint: leave the file out, or fill it"],
        before=write("rows.jsonl", ""),
    ),
    "data of another shape": Mistake(
        {"data.format": "alpaca"},
        [
            "error: rows.jsonl: 24 of 24 rows are bad",
            "hint: they look like messages: write format: auto",
        ],
    ),
    "a folder without rows": Mistake(
        {"data.train": "empty"},
        ["error: data: the folder empty holds no data files", "hint: known are .jsonl .json .csv .parquet .txt"],
        before=folder("empty"),
    ),
    "no model folder": Mistake(
        {"model.path": "./bse"},
        [
            "error: model.path: there is no folder ./bse",
            "hint: . holds base, recipe.yaml, rows.jsonl, runs; model.path takes a .gguf file, a folder or a hub id",
        ],
    ),
    "no gguf file": Mistake(
        {"model.path": "models/x.gguf"},
        [
            "error: model.path: there is no file models/x.gguf",
            "hint: there is no folder models either; model.path takes a .gguf file, a folder or a hub id",
        ],
    ),
    "a gguf that is none": Mistake(
        {"model.path": "x.gguf"},
        ["error: x.gguf: not a GGUF file", "hint: model.path takes a .gguf file, a local folder or a hub id"],
        before=write("x.gguf", b"<html>not found</html>"),
    ),
    "a gguf that is cut": Mistake(
        {"model.path": "x.gguf"},
        [
            "error: x.gguf: transformers cannot read this GGUF: the file is cut short",
            "hint: fetch it again, or use the model's original (safetensors) folder or hub id as model.path",
        ],
        before=write("x.gguf", b"GGUF\x03\0\0\0"),
    ),
    "an adapter as model": Mistake(
        {"model.path": "lora"},
        [
            "error: model.path: lora has no config.json",
            "hint: this is an adapter: give the base model it was trained on",
        ],
        before=folder("lora", "adapter_config.json"),
    ),
    "a folder of something else as model": Mistake(
        {"model.path": "x"},
        [
            "error: model.path: x has no config.json",
            "hint: model.path takes a folder that save_pretrained wrote, a .gguf file or a hub id",
        ],
        before=folder("x", "notes.txt"),
    ),
    "a model of an unknown architecture": Mistake(
        {"model.path": "x"},
        [
            "error: model.path: x cannot be loaded: The checkpoint you are trying to load has model type `gizmo` but Transformers does not recognize this architecture. This could be because of an issue with the checkpoint, or because your version of Transformers is out of date.",
            "hint: give a model that the installed transformers knows, or upgrade it: pip install -U transformers",
        ],
        before=folder("x", "config.json", '{"model_type": "gizmo"}'),
    ),
    "a hub id that is not in the cache": Mistake(
        {"model.path": "nobody/nothing"},
        [
            "error: model.path: nobody/nothing cannot be loaded: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files.",
            "hint: HF_HUB_OFFLINE is set and this model is not in the cache; unset it, or give a local path",
        ],
    ),
    "conversations for a model without chat template": Mistake(
        {"model.path": "plain"},
        [
            "error: data: the rows are conversations, and the tokenizer has no chat template",
            "hint: set data.chat_template: a named template (chatml, alpaca, ...), a path, or inline Jinja",
        ],
        before=without_template,
    ),
    "max_length above the model's positions": Mistake(
        {"data.max_length": 4096},
        ["error: data.max_length: 4,096 tokens, but the model has positions for 2,048", "hint: at most 2048"],
    ),
    "rows longer than max_length": Mistake(
        {"data.max_length": 16},
        [
            "error: rows.jsonl: 24 of 24 rows are longer than data.max_length (16 tokens)",
            "hint: raise data.max_length, or set data.overlong to drop or truncate, counted",
        ],
    ),
    "output inside a file": Mistake(
        {"output": "rows.jsonl/run"},
        ["error: rows.jsonl/run is, or lies in, a file", "hint: name a folder as output"],
    ),
    "output where other files are": Mistake(
        {"output": "mine"},
        ["error: mine holds files, but no run: thesis.tex", "hint: name a new or empty folder as output"],
        before=folder("mine", "thesis.tex"),
    ),
    "resume of nothing": Mistake(
        {},
        ["error: there is no run in runs/a to resume", "hint: start it without --resume"],
        words="train recipe.yaml --resume",
    ),
    "resume and fresh": Mistake(
        {},
        ["error: --resume and --fresh are both given", "hint: keep one"],
        words="train recipe.yaml --resume --fresh",
    ),
    "an attention that is none": Mistake(
        {"model.attention": "flsh"},
        [
            "error: model.attention: flsh is not known",
            "hint: known are auto, eager, flash_attention_2, flash_attention_3, flash_attention_4, flex_attention, sdpa",
        ],
    ),
    "an attention without its package": Mistake(
        {"model.attention": "flash_attention_2"},
        [
            "error: model.attention: flash_attention_2 needs its package, which is not installed or does not work here",
            "hint: write auto, or install the package that fits your GPU and torch",
        ],
    ),
    "epochs and max_steps": Mistake(
        {"training.epochs": 1},
        [
            "recipe.yaml:13: training.max_steps: epochs and max_steps are both set — keep one",
            "error: 1 problem in recipe.yaml",
        ],
    ),
    "no recipe": Mistake(
        {},
        ["error: there is no file recpe.yaml", "hint: name the recipe, a .yaml file"],
        words="train recpe.yaml",
    ),
    "the data file as recipe": Mistake(
        {},
        [
            "rows.jsonl:2: not valid YAML: expected '<document start>', but found '{' — check it in an editor that knows YAML",
            "error: 1 problem in rows.jsonl",
        ],
        words="train rows.jsonl",
    ),
    "the model as recipe": Mistake(
        {},
        ["error: base is a folder", "hint: name the recipe, a .yaml file"],
        words="train base",
    ),
    "a --set that is no key": Mistake(
        {},
        ["--set lr=1: lr: unknown key — here it is training.learning_rate", "error: 1 problem in recipe.yaml"],
        words="train recipe.yaml --set lr=1",
    ),
    "a --set without a value": Mistake(
        {},
        ["--set training.seed: no `=` — write it as training.learning_rate=1e-4", "error: 1 problem in recipe.yaml"],
        words="train recipe.yaml --set training.seed",
    ),
    "eval on rows that are all left out": Mistake(
        {"data.on_bad_row": "skip", "data.max_loss": 1.0},
        [
            "error: other.jsonl: no row is left",
            "hint: see data.on_bad_row, data.overlong and the weights",
        ],
        words="eval recipe.yaml --data other.jsonl",
        before=write("other.jsonl", "nope\n"),
    ),
    "eval of a base model": Mistake(
        {},
        ["error: base is no recipe, run or adapter folder", "hint: give a YAML file, or a folder of lora train"],
        words="eval base",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_is_answered_in_two_lines(name: str, recipe: WriteRecipe, lora: Lora):
    mistake = MISTAKES[name]
    recipe(mistake.changes)
    mistake.before()
    done = lora(*mistake.words.split())
    assert (done.code, done.out) == (2, "")
    assert "Traceback" not in done.err
    assert done.last_two == mistake.said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trian recipe.yaml", "No such command 'trian'"),
        ("train", "Missing argument 'RECIPE'"),
        ("train recipe.yaml --outptu x", "No such option: --outptu"),
        ("train recipe.yaml --processes 0", "Invalid value for '--processes'"),
        ("eval runs/a --answers -1", "Invalid value for '--answers'"),
    ],
)
def test_words_that_are_no_command(words: str, said: str, lora: Lora):
    done = lora(*words.split())
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert "Traceback" not in done.err
