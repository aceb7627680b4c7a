"""What scripts/gpu measures: shapes of models and rows, and ways to train. Pure: no torch."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Base = Literal["16-bit", "nf4"]


class Shape(NamedTuple):
    """A model's dimensions, and the rows that it is trained on."""

    model_type: str
    config: Mapping[str, Any]
    bases: tuple[Base, ...]
    tokens: int  # of a packed batch, and the longest row
    median: int  # tokens of a row; `tokens`: every row is that long
    packing: bool = True  # false: the architecture's own attention keeps no packed rows apart


LLAMA_8B = {  # Llama 3.1 8B
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
FALCON_7B = {
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "vocab_size": 65024,
    "multi_query": True,
    "parallel_attn": True,
    "bias": False,
    "alibi": False,
    "new_decoder_architecture": False,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "tie_word_embeddings": False,
}
SHAPES = {
    "llama-8b": Shape("llama", LLAMA_8B, ("16-bit", "nf4"), tokens=4096, median=250),
    "falcon-7b": Shape("falcon", FALCON_7B, ("nf4",), tokens=4096, median=250),
    "long": Shape("llama", LLAMA_8B, ("16-bit", "nf4"), tokens=16384, median=16384),
    "tiny": Shape("llama", TINY, ("16-bit", "nf4"), tokens=128, median=20),
}


class Way(NamedTuple):
    """A way to train; `measure.py: PREPARE` has its function."""

    title: str
    on_cpu: bool = False  # whether it says anything without a GPU


WAYS = {
    "lora": Way("lora", on_cpu=True),
    "lora-sdpa": Way("lora, attention by sdpa"),
    "lora-peft-layers": Way("lora, PEFT's LoRA layers", on_cpu=True),
    "lora-no-prefetch": Way("lora, no prefetch"),
    "lora-no-kernels": Way("lora, no kernels of liger"),
    "lora-compiled": Way("lora, compiled layers"),
    "peft": Way("PEFT", on_cpu=True),
    "peft-recompute": Way("PEFT, every layer recomputed"),
    "trl": Way("TRL", on_cpu=True),
    "trl-packed": Way("TRL, packed", on_cpu=True),
}
