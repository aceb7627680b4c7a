"""Commands on a damaged or hostile base: one error and one hint, exit code 2, nothing written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.commands.conftest import Lora, WriteRecipe

RESTORE = "hint: restore the file from its origin, or give another model"
NAN_HINT = "hint: fetch the model again, or give another one: with such weights it computes NaN"


def copy_base(name: str = "bad") -> Path:
    folder = Path(name)
    shutil.copytree(Path("base").resolve(), folder)
    return folder


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def spoil(folder: Path, name: str) -> None:
    """Set one value of a tensor to NaN."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def written() -> set[str]:
    return {str(path) for path in Path().rglob("*")}


COMMANDS = ["train recipe.yaml", "eval recipe.yaml", "chat bad", "export bad --to safetensors --out out --verify file"]


@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_base_that_is_not_finite_is_refused_by_name(recipe: WriteRecipe, lora: Lora, command: str, tensor: str):
    spoil(copy_base(), tensor)
    recipe({"model.path": "bad"})
    result = lora(*command.split())
    assert result.code == 2
    where = "bad/model.safetensors" if command.startswith("export") else "bad"
    assert result.last_two == [
        f"error: {where}: {tensor} has values that are not finite (NaN or infinite)",
        NAN_HINT,
    ]
    assert not Path("out").exists()
    assert not Path("runs/a/adapter").exists()
    assert not Path("runs/a/checkpoints").exists()


@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_merge_into_a_base_that_is_not_finite_is_refused_by_name(trained_run: Path, lora: Lora, tensor: str):
    """One of the tensors is copied, the other one is merged."""
    spoil(copy_base(), tensor)
    before = written()
    arguments = ("--out", "merged", "--base", "bad", "--other-base", "--verify", "tensors")
    result = lora("merge", "runs/a/adapter", *arguments)
    assert result.code == 2
    assert result.last_two == [
        f"error: bad/model.safetensors: {tensor} has values that are not finite (NaN or infinite)",
        NAN_HINT,
    ]
    assert written() == before


def link_away(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "truncated weights": (
        lambda folder: truncate(folder / "model.safetensors"),
        ["error: bad/model.safetensors: truncated: 501,508 bytes, but its header describes 501,608", RESTORE],
    ),
    "weights that are a pipe": (
        lambda folder: pipe(folder / "model.safetensors"),
        ["error: bad/model.safetensors is a pipe, not a file", RESTORE],
    ),
    "a config that is a link to nothing": (
        lambda folder: link_away(folder / "config.json"),
        ["error: bad/config.json is a link to nothing", RESTORE],
    ),
    "a config of ten million layers": (
        lambda folder: edit_json(folder / "config.json", num_hidden_layers=10**7),
        [
            "error: bad/config.json: num_hidden_layers is 10000000: at most 1,000 can be right, and the checkpoint has "
            "21 tensors",
            RESTORE,
        ],
    ),
    "a config of a hub kernel": (
        lambda folder: edit_json(folder / "config.json", attn_implementation="evil/kernel"),
        [
            'error: bad/config.json: attn_implementation is "evil/kernel": a kernel of the hub, whose code would run '
            "here",
            "hint: remove it from the file; if you trust that code, name it in the recipe's model.attention",
        ],
    ),
    "a tokenizer config that is a pipe": (
        lambda folder: pipe(folder / "tokenizer_config.json"),
        ["error: bad/tokenizer_config.json is a pipe, not a file", RESTORE],
    ),
    "a generation config without JSON": (
        lambda folder: (folder / "generation_config.json").write_text("{"),
        [
            "error: bad/generation_config.json is not JSON: Expecting property name enclosed in double quotes: line 1 "
            "column 2 (char 1)",
            RESTORE,
        ],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("command", ["check recipe.yaml", "export bad --to gguf --out x.gguf"])
def test_each_damage_is_named_before_rows_or_weights_are_read(recipe: WriteRecipe, lora: Lora, name: str, command: str):
    change, lines = DAMAGES[name]
    change(copy_base())
    recipe({"model.path": "bad"})
    before = written()
    result = lora(*command.split())
    assert (result.code, result.last_two) == (2, lines)
    assert written() == before


def test_a_model_that_is_an_adapter_too_is_refused(recipe: WriteRecipe, lora: Lora):
    """transformers would load the adapter on top of the model, and a merge would leave it out."""
    (copy_base() / "adapter_config.json").write_text("{}")
    recipe({"model.path": "bad"})
    assert lora("check", "recipe.yaml").last_two == [
        "error: model.path: bad is a model and an adapter: it has config.json and adapter_config.json",
        "hint: move the files of one of them to another folder",
    ]


def test_pickled_weights_are_refused_with_the_command_that_converts_them(recipe: WriteRecipe, lora: Lora):
    folder = copy_base()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    recipe({"model.path": "bad"})
    for command in ("train recipe.yaml", "export bad --to safetensors --out out"):
        result = lora(*command.split())
        assert result.code == 2
        assert result.last_two == [
            "error: bad has no model.safetensors, only pytorch_model.bin",
            "hint: lora reads no pickled weights; convert them once, if you trust their origin: python -c 'from "
            "transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
            '[c.from_pretrained("bad").save_pretrained("bad-safetensors") for c in (M, T)]\'',
        ]


def test_tokens_without_embeddings_are_named(recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    """A token of the chat template that only tokenizer_config.json has gets the next id, for which there is no row."""
    folder = copy_base()
    edit_json(folder / "tokenizer_config.json", eos_token="<|stop|>")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", "<|stop|>"))
    recipe({"model.path": "bad"})
    problem = "the token '<|stop|>' with the id 397, but the model has embeddings for 397"
    for command in ("train recipe.yaml", "check recipe.yaml"):
        result = lora(*command.split())
        assert result.code == 2
        assert result.last_two == [
            "error: rows.jsonl:1: the token '<|stop|>' has the id 397, but the model has embeddings for 397",
            RESTORE,
        ]
    Path("questions.txt").write_text("What is it?\n")
    with Path("questions.txt").open() as questions:
        monkeypatch.setattr("sys.stdin", questions)
        result = lora("chat", "bad", "--max-new-tokens", "2")
    assert problem in result.err
    assert "Traceback" not in result.err
