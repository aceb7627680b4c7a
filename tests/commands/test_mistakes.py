"""What users get wrong most often, each with the exact two lines it is answered with."""

# ruff: noqa: E501 - a line of the terminal is a line here
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file, save_file

from tests.commands.conftest import Lora, WriteRecipe
from tests.inputs.tiny_tokenizers import build_encoder
from tests.model import families

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


def custom_code() -> None:
    """A model whose repository brings its Python along."""
    Path("custom").mkdir()
    for file in Path("base").iterdir():
        (Path("custom") / file.name).write_bytes(file.read_bytes())
    config = json.loads(Path("custom/config.json").read_text())
    places = {"AutoConfig": "configuration_gizmo.Gizmo", "AutoModelForCausalLM": "modeling_gizmo.GizmoForCausalLM"}
    Path("custom/config.json").write_text(json.dumps({**config, "model_type": "gizmo", "auto_map": places}))
    Path("custom/configuration_gizmo.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass Gizmo(LlamaConfig):\n    model_type = 'gizmo'\n"
    )
    Path("custom/modeling_gizmo.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_gizmo import Gizmo\n\n\n"
        "class GizmoForCausalLM(LlamaForCausalLM):\n    config_class = Gizmo\n"
    )


def quantised_before() -> None:
    config = json.loads(Path("base/config.json").read_text())
    section = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    folder("small", "config.json", json.dumps({**config, "quantization_config": section}))()


def encoder() -> None:
    """A tiny BERT, and rows of three classes."""
    tokenizer, family = build_encoder("bert"), families.FAMILIES["bert"]
    families.write(family._replace(options={"vocab_size": len(tokenizer)}), Path("bert"))
    tokenizer.save_pretrained("bert")
    labels = ["yes", "no", "maybe"]
    rows = [{"text": f"the fox {i}", "label": labels[i % 3]} for i in range(30)]
    Path("classes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def half_a_checkpoint() -> None:
    Path("half").mkdir()
    for file in Path("base").iterdir():
        (Path("half") / file.name).write_bytes(file.read_bytes())
    tensors = load_file("half/model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, "half/model.safetensors", {"format": "pt"})


CLASSES = {"model.path": "bert", "task": "seq-cls", "data.train": "classes.jsonl"}
MISTAKES = {
    "a base that is quantised already": Mistake(
        {"model.path": "small", "quantization": {"bits": 4}},
        [
            "error: quantization: small is already quantized (gptq, 4 bits) and cannot be quantized again",
            "hint: remove the quantization section, or set model.path to the 16-bit model",
        ],
        before=quantised_before,
    ),
    "a base of GPTQ without its packages": Mistake(
        {"model.path": "small"},
        [
            "error: model.path: small is already quantized (gptq, 4 bits), which needs optimum and gptqmodel",
            "hint: pip install optimum gptqmodel; or set model.path to the 16-bit model; to save memory, add quantization: {bits: 4}",
        ],
        before=quantised_before,
    ),
    "eight bits of a four-bit kind": Mistake(
        {"quantization": {"bits": 8, "type": "fp4"}, "data.packing": False},
        [
            "recipe.yaml:21: quantization.type: has no effect with 8 bits — remove it, or write bits: 4",
            "error: 1 problem in recipe.yaml",
        ],
    ),
    "DoRA over eight bits": Mistake(
        {"quantization": {"bits": 8}, "adapter.method": "dora"},
        [
            "recipe.yaml:8: adapter.method: dora does not support 8-bit quantization: PEFT supports it with 4 bits only — write bits: 4, or method lora",
            "error: 1 problem in recipe.yaml",
        ],
    ),
    "DoRA of another method": Mistake(
        {"adapter": {"method": "loha", "use_dora": True}},
        [
            "recipe.yaml:6: adapter.use_dora: unknown key — write `adapter: {method: dora}`",
            "error: 1 problem in recipe.yaml",
        ],
    ),
    "prefix tuning of packed rows": Mistake(
        {"adapter": {"method": "prefix"}, "data.packing": True},
        [
            "recipe.yaml:10: data.packing: method prefix puts virtual tokens before each row, so rows cannot be packed — write packing: false, or remove it",
            "error: 1 problem in recipe.yaml",
        ],
    ),
    "code that is not trusted": Mistake(
        {"model.path": "custom"},
        [
            "error: model.path: custom cannot be loaded: it needs Python code from its repository, which runs only if you trust it",
            "hint: read the code, then set model.trust_remote_code: true (lora merge: --trust-remote-code)",
        ],
        before=custom_code,
    ),
    "a label that the head has not": Mistake(
        {**CLASSES, "data.labels": ["yes", "no"]},
        [
            "error: classes.jsonl:3: label maybe: not one of the model's 2 labels",
            "hint: these are yes, no: fix the row, or add the label to data.labels",
        ],
        before=encoder,
    ),
    "a task that the architecture has no model for": Mistake(
        {"task": "seq2seq-lm"},
        [
            "error: task: transformers has no llama model for seq2seq-lm",
            "hint: write task: causal-lm or seq-cls or token-cls, or give another model",
        ],
    ),
    "an encoder as language model": Mistake(
        {"model.path": "bert", "data.train": "texts.txt"},
        [
            "error: model: the tokenizer has no EOS token, so the model cannot learn where a text ends",
            "hint: set eos_token in the model's tokenizer_config.json",
        ],
        before=lambda: (encoder(), Path("texts.txt").write_text("the fox\nthe dog\na\nb\nc\nd\n" * 4)),
    ),
    "a checkpoint that lacks a tensor": Mistake(
        {"model.path": "half"},
        [
            "error: model.path: the checkpoint has no weights for model.layers.1.mlp.down_proj.weight",
            "hint: not a complete LlamaForCausalLM checkpoint: give another model, or choose another task",
        ],
        before=half_a_checkpoint,
    ),
    "more of a row than the encoder has positions for": Mistake(
        {**CLASSES, "data.max_length": 4096},
        ["error: data.max_length: 4,096 tokens, but the model has positions for 2,048", "hint: at most 2048"],
        before=encoder,
    ),
    "virtual tokens beyond the encoder's positions": Mistake(
        {**CLASSES, "data.max_length": 2048, "adapter": {"method": "prompt", "virtual_tokens": 4}},
        [
            "error: data.max_length: 2,048 tokens and 4 virtual tokens, but the model has positions for 2,048",
            "hint: at most 2044",
        ],
        before=encoder,
    ),
    "labels listed for regression values": Mistake(
        {**CLASSES, "data.labels": ["no", "yes"]},
        [
            "error: data.labels: 2 labels are listed, but the rows have regression values such as 1.0",
            "hint: write labels as names or integers, several labels of a row as a list; or data: {labels: regression}",
        ],
        before=lambda: (
            encoder(),
            write("classes.jsonl", "".join(f'{{"text": "fox {i}", "label": 1.0}}\n' for i in range(9)))(),
        ),
    ),
    "classes as zeros and ones": Mistake(
        CLASSES,
        [
            "error: classes.jsonl: 9 of 9 rows are bad",
            "hint: fix them, or set data.on_bad_row: skip to drop and count them",
        ],
        before=lambda: (encoder(), write("classes.jsonl", '{"text": "the fox", "label": [0, 1, 0]}\n' * 9)()),
    ),
    "a value that is no number": Mistake(
        {**CLASSES, "data.labels": "regression"},
        [
            "error: classes.jsonl: 9 of 9 rows are bad",
            "hint: fix them, or set data.on_bad_row: skip to drop and count them",
        ],
        before=lambda: (encoder(), write("classes.jsonl", '{"text": "the fox", "label": "nan"}\n' * 9)()),
    ),
    "a decoder's class behind virtual tokens": Mistake(
        {"task": "seq-cls", "data.train": "classes.jsonl", "adapter": {"method": "prompt"}},
        [
            "error: adapter.method: with prompt this model reads the class of a shorter row at its padding",
            "hint: set training.batch_size: 1 and raise training.gradient_accumulation, or write method: prefix or lora",
        ],
        before=lambda: write(
            "classes.jsonl",
            "".join(json.dumps({"text": "the fox " * (1 + i % 5), "label": i % 2}) + "\n" for i in range(20)),
        )(),
    ),
    "a module within one that is trained whole": Mistake(
        {"adapter.modules_to_save": ["mlp", "down_proj"]},
        [
            "error: adapter.modules_to_save: model.layers.0.mlp.down_proj is inside model.layers.0.mlp, which is already fully trained",
            "hint: keep one of the two",
        ],
    ),
    "tokens of embeddings that are trained whole": Mistake(
        {"adapter.modules_to_save": ["embed_tokens"], "adapter.trainable_tokens": ["a"]},
        [
            "error: adapter.trainable_tokens: model.embed_tokens is already fully trained by adapter.modules_to_save",
            "hint: keep one of the two",
        ],
    ),
    "a pattern behind a wider one": Mistake(
        {"adapter.rank_pattern": {"q_proj": 8, "layers.0.self_attn.q_proj": 2}},
        [
            "error: adapter.rank_pattern: layers.0.self_attn.q_proj matches only layers that earlier entries match",
            "hint: put the narrower entry first",
        ],
    ),
    "adalora of two steps": Mistake(
        {"adapter": {"method": "adalora"}, "training.max_steps": 2},
        [
            "error: adapter.method: adalora drops ranks step by step, and this run has 2",
            "hint: raise training.max_steps or epochs to 3 steps or more, or choose another method",
        ],
    ),
    "a rotation that does not fit": Mistake(
        {"adapter": {"method": "oft", "rotation_size": 7}},
        [
            "error: adapter.rotation_size: 7 does not divide the 64 inputs of model.layers.0.self_attn.q_proj",
            "hint: write a divisor of all layers' inputs, such as 32",
        ],
    ),
    "a rank beyond the layer's": Mistake(
        {"adapter": {"method": "pissa", "rank": 100}},
        [
            "error: adapter.rank: 100 is more than the components that model.layers.0.self_attn.q_proj has",
            "hint: at most 64, or leave such layers out of adapter.target_modules",
        ],
    ),
    "what the adapter cannot go on": Mistake(
        {"adapter.target_modules": ["layers"]},
        [
            "error: adapter: PEFT rejects it: Target module ModuleList is not supported",
            "hint: choose other adapter.target_modules or another adapter.method",
        ],
    ),
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
        ["error: rows.jsonl: contains no rows", "hint: leave the file out, or add rows"],
        before=write("rows.jsonl", ""),
    ),
    "data of another shape": Mistake(
        {"data.format": "alpaca"},
        [
            "error: rows.jsonl: 24 of 24 rows are bad",
            "hint: the rows look like messages: set format: auto",
        ],
    ),
    "a folder without rows": Mistake(
        {"data.train": "empty"},
        ["error: data: the folder empty contains no data files", "hint: supported are .jsonl .json .csv .parquet .txt"],
        before=folder("empty"),
    ),
    "no model folder": Mistake(
        {"model.path": "./bse"},
        [
            "error: model.path: there is no folder ./bse",
            "hint: . contains base, recipe.yaml, rows.jsonl, runs; model.path takes a .gguf file, a folder or a hub id",
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
        ["error: x.gguf: not a GGUF file", "hint: set model.path to a .gguf file, a local folder or a hub id"],
        before=write("x.gguf", b"<html>not found</html>"),
    ),
    "a gguf that is cut": Mistake(
        {"model.path": "x.gguf"},
        [
            "error: x.gguf: transformers cannot read this GGUF: the file is truncated",
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
            "error: data: the rows are conversations, but the tokenizer has no chat template",
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
            "hint: raise data.max_length, or set data.overlong to drop or truncate",
        ],
    ),
    "output inside a file": Mistake(
        {"output": "rows.jsonl/run"},
        ["error: rows.jsonl/run is a file, or inside a file", "hint: set output to a folder"],
    ),
    "output where other files are": Mistake(
        {"output": "mine"},
        ["error: mine contains files but no run: thesis.tex", "hint: set output to a new or empty folder"],
        before=folder("mine", "thesis.tex"),
    ),
    "resume of nothing": Mistake(
        {},
        ["error: runs/a contains no run to resume", "hint: start it without --resume"],
        words="train recipe.yaml --resume",
    ),
    "resume and fresh": Mistake(
        {},
        ["error: --resume and --fresh are both set", "hint: keep one"],
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
        ["error: recpe.yaml does not exist", "hint: pass a recipe (a .yaml file)"],
        words="train recpe.yaml",
    ),
    "the data file as recipe": Mistake(
        {},
        [
            "rows.jsonl:2: not valid YAML: expected '<document start>', but found '{' — check it in an editor with YAML support",
            "error: 1 problem in rows.jsonl",
        ],
        words="train rows.jsonl",
    ),
    "the model as recipe": Mistake(
        {},
        ["error: base is a folder", "hint: pass a recipe (a .yaml file)"],
        words="train base",
    ),
    "a --set that is no key": Mistake(
        {},
        ["--set lr=1: lr: unknown key — use training.learning_rate", "error: 1 problem in recipe.yaml"],
        words="train recipe.yaml --set lr=1",
    ),
    "a --set without a value": Mistake(
        {},
        [
            "--set training.seed: missing `=` — write it like training.learning_rate=1e-4",
            "error: 1 problem in recipe.yaml",
        ],
        words="train recipe.yaml --set training.seed",
    ),
    "eval on rows that are all left out": Mistake(
        {"data.on_bad_row": "skip", "data.max_loss": 1.0},
        [
            "error: other.jsonl: no rows are left",
            "hint: check data.on_bad_row, data.overlong and the weights",
        ],
        words="eval recipe.yaml --data other.jsonl",
        before=write("other.jsonl", "nope\n"),
    ),
    "eval of a base model": Mistake(
        {},
        ["error: base is not a recipe, run or adapter folder", "hint: give a YAML file, or a folder of lora train"],
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


def test_gguf_without_its_package(recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lora_cli.model.gguf_base.find_spec", lambda package: None)
    write("x.gguf", b"GGUF")()
    recipe({"model.path": "x.gguf"})
    done = lora("train", "recipe.yaml")
    assert done.code == 2
    assert done.last_two == [
        "error: x.gguf: reading GGUF needs the package gguf",
        'hint: pip install "lora-cli[gguf]"',
    ]


def test_code_that_is_trusted_is_run(recipe: WriteRecipe, lora: Lora):
    custom_code()
    recipe({"model.path": "custom", "model.trust_remote_code": True})
    assert lora("check", "recipe.yaml").code == 0
    done = lora("train", "recipe.yaml")
    assert done.code == 0, done.err
    assert lora("eval", "runs/a").code == 0
    assert lora("merge", "runs/a/adapter", "--out", "merged").code == 2
    merged = lora("merge", "runs/a/adapter", "--out", "merged", "--trust-remote-code")
    assert merged.code == 0, merged.err
    assert Path("merged/modeling_gizmo.py").exists()


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
