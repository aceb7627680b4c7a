"""The quickstart's workspace with a tiny model: its recipe, a part of its rows and tokens, random weights."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np

ROOT = Path(__file__).parents[2]
MODEL = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS = 16_384  # the first ones of the vocabulary: the output head would take most of the time
HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 64, 2, 4, 2, 128
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128_256,
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
}
SHAPES = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "attn_v": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (INTERMEDIATE, HIDDEN),
    "ffn_up": (INTERMEDIATE, HIDDEN),
    "ffn_down": (HIDDEN, INTERMEDIATE),
}
SIZES = {
    "vocab_size": TOKENS,
    "embedding_length": HIDDEN,
    "block_count": LAYERS,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "feed_forward_length": INTERMEDIATE,
    "rope.dimension_count": HIDDEN // HEADS,
}


def write_workspace(folder: Path, demo_gguf: Path) -> None:
    """Write the recipes, every 4th of the quickstart's rows and a tiny model, under the names of the quickstart."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "models").mkdir()
    shrink_model(demo_gguf, folder / MODEL)
    script = ROOT / "scripts" / "make_demo_data.py"
    data = folder / "data" / "quickstart.jsonl"
    subprocess.run([sys.executable, script, data], check=True, capture_output=True)
    data.write_text("".join(data.read_text(encoding="utf-8").splitlines(keepends=True)[::4]), encoding="utf-8")


def write_large_model(folder: Path, tokenizer: Path) -> None:
    """Write what `lora check` plans the memory of a large model from: its configuration, and a tokenizer."""
    folder.mkdir()
    for file in tokenizer.glob("*"):
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(LLAMA_70B))


def shrink_model(source: Path, target: Path) -> None:
    """Write a model with the tokenizer and the chat template of a GGUF file of a llama, and few random weights."""
    reader = gguf.GGUFReader(source)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents(slice(TOKENS))
    merges = reader.fields["tokenizer.ggml.merges"].contents(slice(TOKENS))
    known = set(tokens)
    kept = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": reader.fields["tokenizer.ggml.token_type"].contents(slice(TOKENS)),
        "tokenizer.ggml.merges": [merge for merge in merges if merge.replace(" ", "", 1) in known],
    }
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind, *inner = field.types
        value = SIZES.get(field.name.removeprefix("llama."), kept.get(field.name)) or field.contents()
        writer.add_key_value(field.name, value, kind, inner[-1] if inner else None)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (TOKENS, HIDDEN),
        "output_norm": (HIDDEN,),
        **{f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in SHAPES.items()},
    }
    for name, shape in shapes.items():
        values = np.ones(shape) if len(shape) == 1 else rng.normal(0, 0.1, shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32 if len(shape) == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
