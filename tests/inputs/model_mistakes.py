"""Mistakes in the model, quantization, task, adapter and attention, with the exact lines of each error."""

# ruff: noqa: E501 - messages are in one line, as in the terminal
import json
from pathlib import Path

from tests.inputs.mistakes import (
    Mistake,
    file_writer,
    folder_writer,
    write_encoder_and_classes,
    write_gptq_config,
    write_incomplete_checkpoint,
    write_model_with_code,
)

LAYERS = "its linear layers are: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"

MODEL_MISTAKES = {
    "a base that is already quantized": Mistake(
        {"model.path": "small", "quantization": {"bits": 4}},
        [
            "error: quantization: small is already quantized (gptq, 4 bits) and cannot be quantized again",
            "hint: remove the quantization section, or set model.path to the 16-bit model",
        ],
        setup=write_gptq_config,
    ),
    "a GPTQ base without its packages": Mistake(
        {"model.path": "small"},
        [
            "error: model.path: small is already quantized (gptq, 4 bits), which needs optimum and gptqmodel",
            "hint: pip install optimum gptqmodel; or set model.path to the 16-bit model; to save memory, add quantization: {bits: 4}",
        ],
        setup=write_gptq_config,
    ),
    "a 4-bit type with 8 bits": Mistake(
        {"quantization": {"bits": 8, "type": "fp4"}, "data.packing": False},
        [
            "recipe.yaml:21: quantization.type: has no effect with 8 bits — remove it, or write bits: 4",
            "error: 1 problem in recipe.yaml",
        ],
    ),
    "DoRA with 8 bits": Mistake(
        {"quantization": {"bits": 8}, "adapter.method": "dora"},
        [
            "recipe.yaml:8: adapter.method: dora does not support 8-bit quantization: PEFT supports it with 4 bits only — write bits: 4, or method lora",
            "error: 1 problem in recipe.yaml",
        ],
    ),
    "use_dora with another method": Mistake(
        {"adapter": {"method": "loha", "use_dora": True}},
        [
            "recipe.yaml:6: adapter.use_dora: unknown key — write `adapter: {method: dora}`",
            "error: 1 problem in recipe.yaml",
        ],
    ),
    "prefix tuning with packing": Mistake(
        {"adapter": {"method": "prefix"}, "data.packing": True},
        [
            "recipe.yaml:10: data.packing: method prefix puts virtual tokens before each row, so rows cannot be packed — write packing: false, or remove it",
            "error: 1 problem in recipe.yaml",
        ],
    ),
    "remote code that is not trusted": Mistake(
        {"model.path": "custom"},
        [
            "error: model.path: custom cannot be loaded: it needs Python code from its repository, which runs only if you trust it",
            "hint: read the code, then set model.trust_remote_code: true (lora merge: --trust-remote-code)",
        ],
        setup=write_model_with_code,
    ),
    "a task that the architecture does not support": Mistake(
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
        setup=lambda: (write_encoder_and_classes(), Path("texts.txt").write_text("the fox\nthe dog\na\nb\nc\nd\n" * 4)),
    ),
    "a checkpoint without one of its tensors": Mistake(
        {"model.path": "half"},
        [
            "error: model.path: the checkpoint has no weights for model.layers.1.mlp.down_proj.weight",
            "hint: not a complete LlamaForCausalLM checkpoint: give another model, or choose another task",
        ],
        setup=write_incomplete_checkpoint,
    ),
    "prompt tuning of a decoder classifier with padding": Mistake(
        {"task": "seq-cls", "data.train": "classes.jsonl", "adapter": {"method": "prompt"}},
        [
            "error: adapter.method: with prompt this model reads the class of a shorter row at its padding",
            "hint: set training.batch_size: 1 and raise training.gradient_accumulation, or write method: prefix or lora",
        ],
        setup=lambda: file_writer(
            "classes.jsonl",
            "".join(json.dumps({"text": "the fox " * (1 + i % 5), "label": i % 2}) + "\n" for i in range(20)),
        )(),
    ),
    "a module of modules_to_save inside another one": Mistake(
        {"adapter.modules_to_save": ["mlp", "down_proj"]},
        [
            "error: adapter.modules_to_save: model.layers.0.mlp.down_proj is inside model.layers.0.mlp, which is already fully trained",
            "hint: keep one of the two",
        ],
    ),
    "trainable_tokens of fully trained embeddings": Mistake(
        {"adapter.modules_to_save": ["embed_tokens"], "adapter.trainable_tokens": ["a"]},
        [
            "error: adapter.trainable_tokens: model.embed_tokens is already fully trained by adapter.modules_to_save",
            "hint: keep one of the two",
        ],
    ),
    "a rank_pattern entry after a wider one": Mistake(
        {"adapter.rank_pattern": {"q_proj": 8, "layers.0.self_attn.q_proj": 2}},
        [
            "error: adapter.rank_pattern: layers.0.self_attn.q_proj matches only layers that earlier entries match",
            "hint: put the narrower entry first",
        ],
    ),
    "adalora with two steps": Mistake(
        {"adapter": {"method": "adalora"}, "training.max_steps": 2},
        [
            "error: adapter.method: adalora drops ranks step by step, and this run has 2",
            "hint: raise training.max_steps or epochs to 3 steps or more, or choose another method",
        ],
    ),
    "a rotation_size that does not divide the inputs": Mistake(
        {"adapter": {"method": "oft", "rotation_size": 7}},
        [
            "error: adapter.rotation_size: 7 does not divide the 64 inputs of model.layers.0.self_attn.q_proj",
            "hint: write a divisor of all layers' inputs, such as 32",
        ],
    ),
    "a rank above the layer's dimensions": Mistake(
        {"adapter": {"method": "pissa", "rank": 100}},
        [
            "error: adapter.rank: 100 is more than the components that model.layers.0.self_attn.q_proj has",
            "hint: at most 64, or leave such layers out of adapter.target_modules",
        ],
    ),
    "a target module that PEFT does not support": Mistake(
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
    "no model folder": Mistake(
        {"model.path": "./bse"},
        [
            "error: model.path: there is no folder ./bse",
            "hint: . contains base, recipe.yaml, rows.jsonl; model.path accepts a .gguf file, a folder or a hub id",
        ],
    ),
    "no gguf file": Mistake(
        {"model.path": "models/x.gguf"},
        [
            "error: model.path: there is no file models/x.gguf",
            "hint: there is no folder models either; model.path accepts a .gguf file, a folder or a hub id",
        ],
    ),
    "a gguf file with other content": Mistake(
        {"model.path": "x.gguf"},
        ["error: x.gguf: not a GGUF file", "hint: set model.path to a .gguf file, a local folder or a hub id"],
        setup=file_writer("x.gguf", b"<html>not found</html>"),
    ),
    "a truncated gguf file": Mistake(
        {"model.path": "x.gguf"},
        [
            "error: x.gguf is not a GGUF file that can be read: the file is truncated",
            "hint: fetch the file again, or use the model's original (safetensors) folder or hub id as model.path",
        ],
        setup=file_writer("x.gguf", b"GGUF\x03\0\0\0"),
    ),
    "an adapter as model": Mistake(
        {"model.path": "lora"},
        [
            "error: model.path: lora has no config.json",
            "hint: this is an adapter: give the base model it was trained on",
        ],
        setup=folder_writer("lora", "adapter_config.json"),
    ),
    "a folder of other files as model": Mistake(
        {"model.path": "x"},
        [
            "error: model.path: x has no config.json",
            "hint: model.path accepts a folder that save_pretrained wrote, a .gguf file or a hub id",
        ],
        setup=folder_writer("x", "notes.txt"),
    ),
    "a model of an unknown architecture": Mistake(
        {"model.path": "x"},
        [
            "error: model.path: x cannot be loaded: The checkpoint you are trying to load has model type `gizmo` but Transformers does not recognize this architecture. This could be because of an issue with the checkpoint, or because your version of Transformers is out of date.",
            "hint: give a model that the installed transformers knows, or upgrade it: pip install -U transformers",
        ],
        setup=folder_writer("x", "config.json", '{"model_type": "gizmo"}'),
    ),
    "a name that is no folder and no hub id": Mistake(
        {"model.path": "org/name:main"},
        [
            "error: model.path: org/name:main is not a folder, and cannot be a hub id",
            "hint: correct the path; a hub id is NAME or ORG/NAME, of at most 96 letters, digits and single - . _",
        ],
    ),
    "a hub id that is not in the cache": Mistake(
        {"model.path": "nobody/nothing"},
        [
            "error: model.path: nobody/nothing cannot be loaded: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files.",
            "hint: offline, and not all of its files are in the cache: unset HF_HUB_OFFLINE, or give a local path",
        ],
    ),
    "an unknown attention": Mistake(
        {"model.attention": "flsh"},
        [
            "error: model.attention: flsh is not known",
            "hint: use one of auto, eager, flash_attention_2, flash_attention_3, flash_attention_4, flex_attention, sdpa",
        ],
    ),
    "an attention without its package": Mistake(
        {"model.attention": "flash_attention_2"},
        [
            "error: model.attention: flash_attention_2 needs its package, which is not installed or does not work here",
            "hint: write auto, or install the package that fits your GPU and torch",
        ],
    ),
}
