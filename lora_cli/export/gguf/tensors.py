"""Quantize a safetensors checkpoint's tensors into a GGUF file, one at a time, and compare the file with its source.

Block quantization rounds each value to a multiple of its block's step. The allowed rounding error is derived here from
the source weights, not from the written file.
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
from lora_cli.model import safetensors_io
from lora_cli.model.base_model import BaseCheckpoint
from lora_cli.model.conversion import CheckpointMapping
from lora_cli.model.finite import is_finite, not_finite_error
from lora_cli.model.multimodal import is_multimodal, text_names
from lora_cli.model.safetensors_io import TensorInfo

Array = NDArray[np.float32]
BLOCK_SIZE = 32  # values that share a scale, in every block format below
F16_MAX = 65504.0


class GGUFQuantization(NamedTuple):
    """A choice of `--quantize`, and how much its rounding may change the model's outputs."""

    type: GGMLQuantizationType
    file_type: LlamaFileType
    bits: int
    max_kl: float  # nats: largest mean KL divergence of the next token's distribution from the source in fp32
    tie_nats: float  # log-probability difference of two tokens that counts as a tie; 0: generated text is not judged


Q, L = GGMLQuantizationType, LlamaFileType
GGUF_QUANTIZATIONS: dict[str, GGUFQuantization] = {
    "f32": GGUFQuantization(Q.F32, L.ALL_F32, 32, max_kl=1e-5, tie_nats=1e-3),
    "f16": GGUFQuantization(Q.F16, L.MOSTLY_F16, 16, max_kl=1e-3, tie_nats=0.02),
    "bf16": GGUFQuantization(Q.BF16, L.MOSTLY_BF16, 16, max_kl=5e-3, tie_nats=0.1),
    "q8_0": GGUFQuantization(Q.Q8_0, L.MOSTLY_Q8_0, 8, max_kl=0.02, tie_nats=0),
    "q5_1": GGUFQuantization(Q.Q5_1, L.MOSTLY_Q5_1, 5, max_kl=0.2, tie_nats=0),
    "q5_0": GGUFQuantization(Q.Q5_0, L.MOSTLY_Q5_0, 5, max_kl=0.2, tie_nats=0),
    "q4_1": GGUFQuantization(Q.Q4_1, L.MOSTLY_Q4_1, 4, max_kl=0.5, tie_nats=0),
    "q4_0": GGUFQuantization(Q.Q4_0, L.MOSTLY_Q4_0, 4, max_kl=0.5, tie_nats=0),
}
# Steps in a block's range (or from zero to its largest value), largest error in steps, largest multiple of the step.
BLOCK_STEPS = {
    Q.Q8_0: (127, 0.5, 127),
    Q.Q5_1: (31, 0.5, 31),
    Q.Q5_0: (16, 1.0, 16),
    Q.Q4_1: (15, 0.5, 15),
    Q.Q4_0: (8, 1.0, 8),
}
# Rounding these two changes the outputs most; llama.cpp's own quantizer keeps them at higher precision too.
EMBEDDINGS_AND_HEAD = ("token_embd.weight", "output.weight")
SKIPPED_BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # in old checkpoints


class GGUFTensor(NamedTuple):
    """One tensor of the GGUF file, and how it is computed from its source."""

    name: str
    source: TensorInfo | Array
    type: GGMLQuantizationType
    shape: tuple[int, ...]  # in torch's order: rows first
    rows: NDArray[np.int64] | None = None  # `[rows]`, for each row in GGUF its row in the source; None: same order
    transposed: bool = False
    offset: float = 0.0  # added to each value

    def values(self, files: safetensors_io.ShardFiles) -> Array:
        """Return the source as `shape` fp32, in llama.cpp's layout."""
        values = self.source if isinstance(self.source, np.ndarray) else read_tensor(self.source, files)
        if self.transposed:
            values = values.T
        if self.rows is not None:
            values = values[self.rows]
        return np.ascontiguousarray(values + np.float32(self.offset) if self.offset else values)


def read_tensor(info: TensorInfo, files: safetensors_io.ShardFiles) -> Array:
    """Return a tensor of a safetensors file as `info.shape` fp32."""
    stored = torch.empty(info.shape, dtype=info.dtype)
    files.read(info.file, safetensors_io.as_bytes(stored), info.begin)
    values: Array = stored.float().numpy()
    return values


def plan_tensors(base: BaseCheckpoint, quantization: GGUFQuantization) -> list[GGUFTensor]:
    """Return every tensor of the model in the folder of `base` with its GGUF name, type and layout.

    Raises:
        LoraError: llama.cpp has no name for a tensor of the folder, or the folder lacks one that the model needs.
    """
    folder, config = Path(base.source.path), base.config
    architecture = architectures.find_architecture(config)
    stored = safetensors_io.list_tensors(folder)
    names = tensor_names(config, architecture)
    tensors: list[GGUFTensor] = []
    for name, values in architectures.extra_tensors(config):
        tensors.append(GGUFTensor(name, values, Q.F32, values.shape))
    text_keys = _text_keys(base, stored)
    # A multimodal model is tied only if its checkpoint has one of the two tensors, whatever its config says.
    tied = text_keys is None and bool(config.get_text_config().tie_word_embeddings)
    for stored_key, info in stored.items():
        key = text_keys.get(stored_key) if text_keys is not None else stored_key
        if key is None or key.endswith(SKIPPED_BUFFERS) or (tied and key == "lm_head.weight"):
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise LoraError(
                f"{folder}: llama.cpp's {gguf.MODEL_ARCH_NAMES[architecture.arch]} has no tensor for {key}",
                hint="llama.cpp's own converter may support it: python convert_hf_to_gguf.py MODEL --outfile OUT.gguf",
            )
        tensors.append(_plan_tensor(name, key, info, config, architecture, quantization))
    _check_complete(tensors, base, names)
    return tensors


def _text_keys(base: BaseCheckpoint, stored: Mapping[str, TensorInfo]) -> dict[str, str] | None:
    """Return the names in the text model of the checkpoint's keys, without its towers; None for a text model."""
    if not is_multimodal(base.config):
        return None
    model = base.skeleton()
    parts = CheckpointMapping(model, stored).parts
    return {parts[name][0].key: text_name for name, text_name in text_names(model).items() if name in parts}


def tensor_names(config: PretrainedConfig, architecture: Architecture) -> gguf.TensorNameMap:
    """Return the map from the checkpoint's tensor names to GGUF's."""
    return gguf.get_tensor_name_map(architecture.arch, config.get_text_config().num_hidden_layers)


def layer_kind(key: str) -> str:
    """Return the layer's own name: `q_proj` for `model.layers.0.self_attn.q_proj.weight`."""
    return key.split(".")[-2]


def _plan_tensor(
    name: str,
    key: str,
    info: TensorInfo,
    config: PretrainedConfig,
    architecture: Architecture,
    quantization: GGUFQuantization,
) -> GGUFTensor:
    kind = layer_kind(key)
    transposed = kind in architecture.transposed and len(info.shape) == 2
    row_order = architecture.row_orders.get(kind)
    shape = info.shape[::-1] if transposed else info.shape
    return GGUFTensor(
        name,
        info,
        _storage_type(name, shape, quantization),
        shape,
        None if row_order is None else row_order(config.get_text_config()),
        transposed,
        architecture.norm_offset if key.endswith("norm.weight") else 0.0,
    )


def _storage_type(name: str, shape: tuple[int, ...], quantization: GGUFQuantization) -> GGMLQuantizationType:
    if len(shape) == 1 or name.startswith("position_embd"):
        return Q.F32
    if quantization.bits < 16 and shape[-1] % BLOCK_SIZE:
        return Q.F16
    return Q.Q8_0 if quantization.bits < 8 and name in EMBEDDINGS_AND_HEAD else quantization.type


def _check_complete(tensors: Iterable[GGUFTensor], base: BaseCheckpoint, names: gguf.TensorNameMap) -> None:
    """Raise if a parameter of the model has no tensor: llama.cpp treats some missing tensors as optional."""
    planned = {tensor.name for tensor in tensors}
    model = base.skeleton()
    text = text_names(model)
    for parameter, _ in model.named_parameters():  # lists tied parameters once
        if (key := text.get(parameter)) is None:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name not in planned:
            raise LoraError(
                f"{base.source.path}: its files have no {key}", hint="fetch the model again, or merge it again"
            )


class _WrittenByPython(np.ndarray[Any, Any]):
    """An array that GGUFWriter writes through Python's file.

    numpy's own `tofile` writes through a C stream: on a full disk it does not tell why it failed, or loses the last
    bytes of a small array without an error.
    """

    def tofile(self, fid: Any, sep: str = "", format: str = "%s") -> None:
        fid.write(self.data)


def write_gguf(file: Path, tensors: list[GGUFTensor], *, arch: str, describe: Callable[[GGUFWriter], None]) -> None:
    """Write the GGUF file, with one tensor in memory at a time.

    Args:
        file: path of the new file.
        tensors: in the order of the file.
        arch: llama.cpp's name of the architecture.
        describe: adds the metadata.

    Raises:
        LoraError: a value is not finite, or too large for its type.
    """
    writer = GGUFWriter(str(file), arch)
    try:
        describe(writer)
        for tensor in tensors:
            byte_shape = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type)
            plain_dtype = {Q.F32: np.float32, Q.F16: np.float16}.get(tensor.type)
            writer.add_tensor_info(
                tensor.name,
                tensor.shape if plain_dtype else byte_shape,
                np.dtype(plain_dtype or np.uint8),
                int(np.prod(byte_shape))
                if not plain_dtype
                else int(np.prod(tensor.shape)) * np.dtype(plain_dtype).itemsize,
                raw_dtype=tensor.type,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with safetensors_io.ShardFiles(writable=False) as files:
            for tensor in tensors:
                values = np.ascontiguousarray(_quantize(tensor, tensor.values(files)))
                writer.write_tensor_data(values.view(_WrittenByPython))
        writer.flush()
    finally:
        writer.close()


def _quantize(tensor: GGUFTensor, values: Array) -> NDArray[Any]:
    if not is_finite(torch.from_numpy(values)):
        where = tensor.source.file if isinstance(tensor.source, TensorInfo) else "the adapter"
        raise not_finite_error(tensor.name, where)
    if tensor.type == Q.F16 and np.abs(values).max(initial=0) > F16_MAX:
        raise LoraError(
            f"{tensor.name} has values up to {np.abs(values).max():.3g}, but fp16 has at most {F16_MAX:,.0f}",
            hint="use --quantize bf16, f32 or q8_0",
        )
    quantized: NDArray[Any] = gguf.quantize(values, tensor.type)
    return quantized


def mismatched_tensors(file: gguf.GGUFReader, tensors: list[GGUFTensor]) -> Iterator[tuple[str, str]]:
    """Yield (name, difference) of each tensor that differs from its source by more than its type's rounding error."""
    stored: Mapping[str, gguf.ReaderTensor] = {tensor.name: tensor for tensor in file.tensors}
    for name in stored.keys() ^ {tensor.name for tensor in tensors}:
        yield name, "is in only one of the file and the model"
    with safetensors_io.ShardFiles(writable=False) as files:
        for tensor in tensors:
            written = stored.get(tensor.name)
            if written is None:
                continue
            if written.tensor_type != tensor.type or tuple(written.shape.tolist()[::-1]) != tensor.shape:
                yield tensor.name, f"has shape {tuple(written.shape.tolist()[::-1])} of {written.tensor_type.name}"
                continue
            values = tensor.values(files)
            dequantized = gguf.dequantize(written.data, tensor.type).reshape(tensor.shape)
            ratio = np.abs(dequantized - values) / max_rounding_error(values, tensor.type)
            if not (worst := float(ratio.max(initial=0))) <= 1:
                yield tensor.name, f"has an error of {worst:.3g} times the largest rounding error of {tensor.type.name}"


def max_rounding_error(values: Array, quant_type: GGMLQuantizationType) -> Array:
    """Return the largest allowed rounding error of each of `values`, in the same shape, fp32.

    A block format stores its step d in fp16. The error of a value is at most half a step, plus the rounding of the
    step times the largest multiple. Q4_0 and Q5_0 have one multiple less on one side: there it is a full step. Formats
    with a minimum m store that in fp16 too.
    """
    tiny = np.float32(1e-30)
    if quant_type == Q.F32:
        return np.full_like(values, tiny)
    if quant_type in (Q.F16, Q.BF16):
        bits, smallest = (11, 2.0**-25) if quant_type == Q.F16 else (8, 2.0**-134)
        return np.maximum(np.abs(values) * np.float32(2.0**-bits), np.float32(smallest))
    blocks = values.reshape(-1, BLOCK_SIZE)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    fp16_error = np.float32(2.0**-11)  # relative
    steps, error_steps, multiple = BLOCK_STEPS[quant_type]
    minimum_error, span = np.zeros_like(largest), largest
    if quant_type in (Q.Q5_1, Q.Q4_1):
        span = blocks.max(axis=1, keepdims=True) - blocks.min(axis=1, keepdims=True)
        minimum_error = largest * fp16_error
    step = span / np.float32(steps)
    allowed = step * np.float32(error_steps * 1.001) + step * np.float32(multiple) * fp16_error + minimum_error
    # fp16's subnormal numbers round a step by up to its own size.
    allowed = np.maximum(allowed, np.float32(multiple * 2.0**-24)) + tiny
    return np.broadcast_to(allowed, blocks.shape).reshape(values.shape)
