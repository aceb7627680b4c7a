"""Damaged or hostile tokenizer files are refused, and a tokenizer that loads has the ids of its file."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_cli.errors import LoraError
from lora_cli.model import tokenizer_files
from lora_cli.model.model_source import ModelSource, load_tokenizer
from tests.inputs.tiny_tokenizers import build, build_encoder, build_sentencepiece

Tree = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path) -> Path:
    """A copy of the tiny model."""
    shutil.copytree(tiny_folder, tmp_path / "base")
    return tmp_path / "base"


def change(folder: Path, file: str, edit: Callable[[Tree], object]) -> None:
    content = json.loads((folder / file).read_text())
    edit(content)
    (folder / file).write_text(json.dumps(content))


def model(**values: Any) -> Callable[[Tree], object]:
    return lambda tree: tree["model"].update(values)


def vocab(**values: Any) -> Callable[[Tree], object]:
    return lambda tree: tree["model"]["vocab"].update(values)


def top(**values: Any) -> Callable[[Tree], object]:
    return lambda tree: tree.update(values)


def added(**values: Any) -> Callable[[Tree], object]:
    return lambda tree: tree["added_tokens"][0].update(values)


def regex(pattern: str) -> Callable[[Tree], object]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return lambda tree: tree.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [split, tree["pre_tokenizer"]]})


TOKENIZER: dict[str, tuple[Callable[[Tree], object], str]] = {
    "no model": (top(model=None), "has no model with a vocab"),
    "a vocab that is a text": (model(vocab="x"), "has no model with a vocab"),
    "an id that is a text": (vocab(a="1"), 'a has the id "1"'),
    "an id below zero": (vocab(a=-1), "a has the id -1"),
    "an id of 2^40": (vocab(a=2**40), "a has the id 1099511627776"),
    "an id twice": (vocab(a=5), "have the same id 5"),
    "an added id twice": (added(id=395), "have the same id 395"),
    "an added id beyond the others": (added(id=5000), "has the id 5,000, but the tokenizers library loads it as"),
    "an added token without content": (added(content=""), "not a token with an id"),
    "added tokens in a text": (top(added_tokens="x"), 'added_tokens is "x": not a list'),
    "added tokens of numbers": (top(added_tokens=[1]), "added_tokens has 1: not a token with an id"),
    "a merge of unknown parts": (model(merges=[["a", "\u2603"]]), "out of vocabulary"),
    "merges in a text": (model(merges="x"), "its tokenizer: "),
    "an unknown kind of model": (model(type="XYZ"), "its tokenizer: "),
    "an unknown normalizer": (top(normalizer={"type": "XYZ"}), "its tokenizer: "),
    "an unknown pre-tokenizer": (top(pre_tokenizer=[]), "its tokenizer: "),
    "an unknown decoder": (top(decoder={"type": "XYZ"}), "its tokenizer: "),
    "an unknown post-processor": (top(post_processor=1), "its tokenizer: "),
    "a regex that is none": (regex("("), "its tokenizer: "),
    "a regex of exponential time": (regex("(a+)+$"), "fails on a short text: Onig: Regex search error: retry-limit"),
    "a regex of exponential time on spaces": (regex(r"( +)+\t"), "fails on a short text"),
}
CONFIG: dict[str, tuple[Tree, str]] = {
    "a class that is a number": ({"tokenizer_class": 1}, "tokenizer_class is 1: not a name"),
    "a token that is a number": ({"eos_token": 2}, "eos_token is 2: not a token"),
    "a token without content": ({"eos_token": {"special": True}}, "not a token"),
    "a length that is a text": ({"model_max_length": "1024"}, 'model_max_length is "1024": not a number of tokens'),
    "a side that is none": ({"padding_side": "top"}, 'padding_side is "top": not left or right'),
    "a switch that is a text": ({"add_bos_token": "false"}, 'add_bos_token is "false": neither true nor false'),
    "a name of Python": ({"__class__": "x"}, "no name of a setting"),
    "templates without names": ({"chat_template": [{"template": "x"}]}, "neither a text nor a list of named texts"),
    "added tokens in a list": ({"added_tokens_decoder": []}, "not an object of ids and tokens"),
    "added tokens with texts as ids": ({"added_tokens_decoder": {"x": {"content": "a"}}}, "not an object of ids"),
    "code of its own in a text": ({"auto_map": "x"}, 'auto_map is "x": not an object'),
}


def refusal(folder: Path) -> LoraError:
    with pytest.raises(LoraError) as caught:
        load_tokenizer(ModelSource(str(folder)))
    assert str(folder) in caught.value.message
    assert caught.value.message.isprintable()
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("name", TOKENIZER)
def test_each_damage_of_tokenizer_json_is_one_error(folder: Path, name: str, capfd: pytest.CaptureFixture[str]):
    edit, message = TOKENIZER[name]
    change(folder, "tokenizer.json", edit)
    assert message in refusal(folder).message
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize("name", CONFIG)
def test_each_damage_of_tokenizer_config_is_one_error(folder: Path, name: str):
    values, message = CONFIG[name]
    change(folder, "tokenizer_config.json", top(**values))
    assert message in refusal(folder).message


FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "merges.txt")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_only_regular_files_are_opened(folder: Path, file: str, kind: str):
    (folder / file).unlink(missing_ok=True)
    make = {"pipe": os.mkfifo, "folder": Path.mkdir, "link": lambda path: path.symlink_to("nowhere")}[kind]
    make(folder / file)
    assert file in refusal(folder).message


def test_a_tokenizer_that_does_not_finish_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Each run of spaces costs this expression a tenth of the library's own limit."""
    change(folder, "tokenizer.json", regex(r"(?:\x20|\x20\x20){18}(?!.)|."))
    monkeypatch.setattr(tokenizer_files, "PROBE_LIMIT_S", 0.05)
    assert "does not finish a short text in 0 s" in refusal(folder).message


TOKENIZERS = {
    "byte-level": lambda: build("<|im_start|>", eos="<|im_end|>"),
    "with bos": lambda: build(eos="</s>", bos="<s>", adds_bos=True),
    "sentencepiece": lambda: build_sentencepiece("{{ messages }}"),
    "wordpiece": lambda: build_encoder("bert"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_of_all_kinds_are_accepted(tmp_path: Path, kind: str):
    saved = TOKENIZERS[kind]()
    saved.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(ModelSource(str(tmp_path))).get_vocab() == saved.get_vocab()
