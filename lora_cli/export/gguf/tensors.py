"""A checkpoint's tensors on their way into a GGUF file, one after the other, and back out of it.

Block formats round a value to a multiple of its block's step; how far that may take it is derived here from the
source, not from what was written.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from numpy.typing import NDArray
from transformers import PretrainedConfig

from lora_cli.errors import LoraError
from lora_cli.export.gguf import architectures
from lora_cli.export.gguf.architectures import Architecture
from lora_cli.model import base_model, safetensors_io
from lora_cli.model.safetensors_io import TensorInfo

Array = NDArray[np.float32]
BLOCK_SIZE = 32  # values that share a scale, in every block format below
F16_MAX = 65504.0


class GGUFQuantization(NamedTuple):
    """What `--quantize` names."""

    type: GGMLQuantizationType
    file_type: LlamaFileType
    bits: int
    kl: float  # nats that the next token's distribution may be off on average, against the source in fp32
    tie: float  # nats between two tokens below which rounding may choose either; 0 where text is not held equal


Q, L = GGMLQuantizationType, LlamaFileType
GGUF_QUANTIZATIONS: dict[str, GGUFQuantization] = {
    "f32": GGUFQuantization(Q.F32, L.ALL_F32, 32, kl=1e-5, tie=1e-3),
    "f16": GGUFQuantization(Q.F16, L.MOSTLY_F16, 16, kl=1e-3, tie=0.02),
    "bf16": GGUFQuantization(Q.BF16, L.MOSTLY_BF16, 16, kl=5e-3, tie=0.1),
    "q8_0": GGUFQuantization(Q.Q8_0, L.MOSTLY_Q8_0, 8, kl=0.02, tie=0),
    "q5_1": GGUFQuantization(Q.Q5_1, L.MOSTLY_Q5_1, 5, kl=0.2, tie=0),
    "q5_0": GGUFQuantization(Q.Q5_0, L.MOSTLY_Q5_0, 5, kl=0.2, tie=0),
    "q4_1": GGUFQuantization(Q.Q4_1, L.MOSTLY_Q4_1, 4, kl=0.5, tie=0),
    "q4_0": GGUFQuantization(Q.Q4_0, L.MOSTLY_Q4_0, 4, kl=0.5, tie=0),
}
# Steps from a block's end to the other (or to zero), steps that a value may be off, and the largest multiple.
BLOCK_STEPS = {
    Q.Q8_0: (127, 0.5, 127),
    Q.Q5_1: (31, 0.5, 31),
    Q.Q5_0: (16, 1.0, 16),
    Q.Q4_1: (15, 0.5, 15),
    Q.Q4_0: (8, 1.0, 8),
}
# The two ends of the model are felt most, and llama.cpp's own quantizer keeps them finer as well.
EMBEDDINGS_AND_HEAD = ("token_embd.weight", "output.weight")
SKIPPED_BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # buffers that old checkpoints hold


class GGUFTensor(NamedTuple):
    """One tensor of the file, and what it is made of."""

    name: str
    source: TensorInfo | Array
    type: GGMLQuantizationType
    shape: tuple[int, ...]  # as torch has it: rows first
    rows: NDArray[np.int64] | None = None
    turned: bool = False
    plus: float = 0.0

    def values(self, files: safetensors_io.ShardFiles) -> Array:
        """The source in fp32, laid out as llama.cpp has it."""
        found = self.source if isinstance(self.source, np.ndarray) else read_tensor(self.source, files)
        if self.turned:
            found = found.T
        if self.rows is not None:
            found = found[self.rows]
        return np.ascontiguousarray(found + np.float32(self.plus) if self.plus else found)


def read_tensor(stored: TensorInfo, files: safetensors_io.ShardFiles) -> Array:
    """A tensor of a safetensors file, in fp32."""
    held = torch.empty(stored.shape, dtype=stored.dtype)
    files.read(stored.file, safetensors_io.as_bytes(held), stored.begin)
    values: Array = held.float().numpy()
    return values


def plan_tensors(folder: Path, config: PretrainedConfig, form: GGUFQuantization) -> list[GGUFTensor]:
    """Every tensor of the model in `folder`, and where it goes.

    Raises:
        LoraError: a tensor that the architecture has no place for, or one that it needs and the folder lacks.
    """
    architecture = architectures.find_architecture(config)
    stored = safetensors_io.list_tensors(folder)
    names = tensor_names(config, architecture)
    found: list[GGUFTensor] = []
    for name, values in architectures.extra_tensors(config):
        found.append(GGUFTensor(name, values, Q.F32, values.shape))
    tied = bool(config.get_text_config().tie_word_embeddings)
    for key, tensor in stored.items():
        if key.endswith(SKIPPED_BUFFERS) or (tied and key == "lm_head.weight"):
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise LoraError(
                f"{folder}: llama.cpp's {gguf.MODEL_ARCH_NAMES[architecture.arch]} has no place for {key}",
                hint="llama.cpp's own converter may: python convert_hf_to_gguf.py MODEL --outfile OUT.gguf",
            )
        found.append(_plan_tensor(name, key, tensor, config, architecture, form))
    _refuse_lacking(found, folder, config, names)
    return found


def tensor_names(config: PretrainedConfig, architecture: Architecture) -> gguf.TensorNameMap:
    """From a checkpoint's names to GGUF's."""
    return gguf.get_tensor_name_map(architecture.arch, config.get_text_config().num_hidden_layers)


def layer_kind(key: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj.weight`."""
    return key.split(".")[-2]


def _plan_tensor(
    name: str,
    key: str,
    tensor: TensorInfo,
    config: PretrainedConfig,
    architecture: Architecture,
    form: GGUFQuantization,
) -> GGUFTensor:
    kind = layer_kind(key)
    turned = kind in architecture.turned and len(tensor.shape) == 2
    rows = architecture.reordered.get(kind)
    shape = tensor.shape[::-1] if turned else tensor.shape
    return GGUFTensor(
        name,
        tensor,
        _storage_type(name, shape, form),
        shape,
        None if rows is None else rows(config.get_text_config()),
        turned,
        1.0 if architecture.norms_less_one and key.endswith("norm.weight") else 0.0,
    )


def _storage_type(name: str, shape: tuple[int, ...], form: GGUFQuantization) -> GGMLQuantizationType:
    if len(shape) == 1 or name.startswith("position_embd"):
        return Q.F32
    if form.bits < 16 and shape[-1] % BLOCK_SIZE:
        return Q.F16
    return Q.Q8_0 if form.bits < 8 and name in EMBEDDINGS_AND_HEAD else form.type


def _refuse_lacking(
    found: Iterable[GGUFTensor], folder: Path, config: PretrainedConfig, names: gguf.TensorNameMap
) -> None:
    """Hold the names against the model's own parameters: llama.cpp takes some of those that lack for meant."""
    here = {placed.name for placed in found}
    model = base_model.skeleton(config)
    for key, _ in model.named_parameters():  # tied ones once
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name not in here:
            raise LoraError(f"{folder}: its files have no {key}", hint="fetch the model again, or merge it again")


def write_gguf(file: Path, tensors: list[GGUFTensor], *, arch: str, describe: Callable[[GGUFWriter], None]) -> None:
    """Write the GGUF file, holding one tensor at a time.

    Args:
        file: not there yet.
        tensors: in the order they are to have.
        arch: llama.cpp's name of the architecture.
        describe: adds the metadata.

    Raises:
        LoraError: a value that the format cannot hold.
    """
    writer = GGUFWriter(str(file), arch)
    try:
        describe(writer)
        for placed in tensors:
            size = gguf.quant_shape_to_byte_shape(placed.shape, placed.type)
            plain = {Q.F32: np.float32, Q.F16: np.float16}.get(placed.type)
            writer.add_tensor_info(
                placed.name,
                placed.shape if plain else size,
                np.dtype(plain or np.uint8),
                int(np.prod(size)) if not plain else int(np.prod(placed.shape)) * np.dtype(plain).itemsize,
                raw_dtype=placed.type,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with safetensors_io.ShardFiles(writable=False) as files:
            for placed in tensors:
                writer.write_tensor_data(_encoded(placed, placed.values(files)))
        writer.flush()
    finally:
        writer.close()


def _encoded(placed: GGUFTensor, values: Array) -> NDArray[Any]:
    if not np.isfinite(values).all():
        raise LoraError(f"{placed.name} has values that are not finite", hint="the model is broken: merge it again")
    if placed.type == Q.F16 and np.abs(values).max(initial=0) > F16_MAX:
        raise LoraError(
            f"{placed.name} has values up to {np.abs(values).max():.3g}, and fp16 ends at {F16_MAX:,.0f}",
            hint="write --quantize bf16, f32 or q8_0",
        )
    encoded: NDArray[Any] = gguf.quantize(values, placed.type)
    return encoded


def mismatched_tensors(file: gguf.GGUFReader, tensors: list[GGUFTensor]) -> Iterator[tuple[str, str]]:
    """Tensors of the file that are not what they were made of, within their format's rounding, and how so."""
    held: Mapping[str, gguf.ReaderTensor] = {tensor.name: tensor for tensor in file.tensors}
    for name in held.keys() ^ {placed.name for placed in tensors}:
        yield name, "is in one of the two alone"
    with safetensors_io.ShardFiles(writable=False) as files:
        for placed in tensors:
            tensor = held.get(placed.name)
            if tensor is None:
                continue
            if tensor.tensor_type != placed.type or tuple(tensor.shape.tolist()[::-1]) != placed.shape:
                yield placed.name, f"has shape {tuple(tensor.shape.tolist()[::-1])} of {tensor.tensor_type.name}"
                continue
            values = placed.values(files)
            back = gguf.dequantize(tensor.data, placed.type).reshape(placed.shape)
            beyond = np.abs(back - values) / max_rounding_error(values, placed.type)
            if not (worst := float(beyond.max(initial=0))) <= 1:
                yield placed.name, f"is {worst:.3g} times further off than {placed.type.name} rounds"


def max_rounding_error(values: Array, kind: GGMLQuantizationType) -> Array:
    """How far from each of `values` the format may be.

    A block format has a step d and stores it in fp16: half a step, and what rounding the step does to the largest
    multiple. Q4_0 and Q5_0 have one multiple less on the far side: a whole step there. Formats with a least value m
    round that to fp16 too.
    """
    tiny = np.float32(1e-30)
    if kind == Q.F32:
        return np.full_like(values, tiny)
    if kind in (Q.F16, Q.BF16):
        bits, smallest = (11, 2.0**-25) if kind == Q.F16 else (8, 2.0**-134)
        return np.maximum(np.abs(values) * np.float32(2.0**-bits), np.float32(smallest))
    blocks = values.reshape(-1, BLOCK_SIZE)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    half = np.float32(2.0**-11)  # relative rounding of fp16
    steps, off, multiple = BLOCK_STEPS[kind]
    least, span = np.zeros_like(largest), largest
    if kind in (Q.Q5_1, Q.Q4_1):
        span = blocks.max(axis=1, keepdims=True) - blocks.min(axis=1, keepdims=True)
        least = largest * half
    step = span / np.float32(steps)
    allowed = step * np.float32(off * 1.001) + step * np.float32(multiple) * half + least
    # Below fp16's smallest numbers a step is rounded by as much as itself.
    allowed = np.maximum(allowed, np.float32(multiple * 2.0**-24)) + tiny
    return np.broadcast_to(allowed, blocks.shape).reshape(values.shape)
