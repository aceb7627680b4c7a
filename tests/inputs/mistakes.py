"""The record of a user's mistake, and the files that some mistakes need. For tests/commands/test_mistakes.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file

from tests.inputs.tiny_tokenizers import build_encoder
from tests.model import families


class Mistake(NamedTuple):
    """A changed recipe, files and a command, with the last two lines that the command must print."""

    changes: dict[str, Any]  # of the tiny recipe, by dotted key
    lines: list[str]  # the last two lines of stderr
    command: str = "train recipe.yaml"
    setup: Callable[[], object] = lambda: None  # writes the files, into the working folder


def file_writer(name: str, content: str | bytes) -> Callable[[], object]:
    """Return a function that writes a file."""
    return lambda: Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def folder_writer(name: str, file: str = "", text: str = "{}") -> Callable[[], object]:
    """Return a function that makes a folder, with one file if `file` is set."""

    def write() -> None:
        Path(name).mkdir()
        if file:
            (Path(name) / file).write_text(text)

    return write


def write_model_without_template() -> None:
    """Write the base without its chat template to `plain`."""
    Path("plain").mkdir()
    for file in Path("base").iterdir():
        if file.name != "chat_template.jinja":
            (Path("plain") / file.name).write_bytes(file.read_bytes())
    config = json.loads(Path("plain/tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    Path("plain/tokenizer_config.json").write_text(json.dumps(config))


def write_model_with_code() -> None:
    """Write a model whose folder contains its Python code to `custom`."""
    Path("custom").mkdir()
    for file in Path("base").iterdir():
        (Path("custom") / file.name).write_bytes(file.read_bytes())
    config = json.loads(Path("custom/config.json").read_text())
    auto_map = {"AutoConfig": "configuration_gizmo.Gizmo", "AutoModelForCausalLM": "modeling_gizmo.GizmoForCausalLM"}
    Path("custom/config.json").write_text(json.dumps({**config, "model_type": "gizmo", "auto_map": auto_map}))
    Path("custom/configuration_gizmo.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass Gizmo(LlamaConfig):\n    model_type = 'gizmo'\n"
    )
    Path("custom/modeling_gizmo.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_gizmo import Gizmo\n\n\n"
        "class GizmoForCausalLM(LlamaForCausalLM):\n    config_class = Gizmo\n"
    )


def write_gptq_config() -> None:
    """Write the config of a model quantized with GPTQ to `small`, without weights."""
    config = json.loads(Path("base/config.json").read_text())
    section = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    folder_writer("small", "config.json", json.dumps({**config, "quantization_config": section}))()


def write_encoder_and_classes() -> None:
    """Write a tiny BERT to `bert`, and rows of three classes to classes.jsonl."""
    tokenizer, family = build_encoder("bert"), families.FAMILIES["bert"]
    families.write(family._replace(options={"vocab_size": len(tokenizer)}), Path("bert"))
    tokenizer.save_pretrained("bert")
    labels = ["yes", "no", "maybe"]
    rows = [{"text": f"the fox {i}", "label": labels[i % 3]} for i in range(30)]
    Path("classes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_incomplete_checkpoint() -> None:
    """Write the base without one of its tensors to `half`."""
    Path("half").mkdir()
    for file in Path("base").iterdir():
        (Path("half") / file.name).write_bytes(file.read_bytes())
    tensors = load_file("half/model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, "half/model.safetensors", {"format": "pt"})
