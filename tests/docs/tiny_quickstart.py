"""The quickstart's workspace with a tiny model: its recipe unchanged, its rows, SmolLM2's tokenizer, random weights."""

import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np

ROOT = Path(__file__).parents[2]
MODEL = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS = 8192  # the first ones of the vocabulary: the output head would take most of the time
HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 48, 2, 3, 1, 96
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
    """Write the recipes, the quickstart's rows and a tiny model, all under the names of the quickstart."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "models").mkdir()
    shrink_model(demo_gguf, folder / MODEL)
    script = ROOT / "scripts" / "make_demo_data.py"
    subprocess.run([sys.executable, script, "data/quickstart.jsonl"], cwd=folder, check=True, capture_output=True)


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
