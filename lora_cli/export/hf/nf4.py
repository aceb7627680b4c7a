"""NF4 quantization by bitsandbytes, and the tensors that store an NF4 weight in a transformers checkpoint."""

import json
import math
from typing import Any

import bitsandbytes.functional as bnbf
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor
from torch.nn.functional import pad

from lora_cli.errors import LoraError
from lora_cli.export.source import ExportSource
from lora_cli.model import fake_quantize
from lora_cli.model.conversion import CheckpointMapping
from lora_cli.model.quantize import BLOCK_SIZE, bnb_config
from lora_cli.recipe.schema import QuantizationSpec

NF4_SPEC = QuantizationSpec(bits=4, compute_dtype="bfloat16")  # QLoRA's: nf4, double quantization
NESTED_BLOCK_SIZE = 256  # blocks of weights whose scales (absmax) share a scale
STATE_KEY = "quant_state.bitsandbytes__nf4"
LONGEST_FLOAT = "-2.2250738585072014e-308"  # no float has a longer repr in Python

TensorShapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape by name


def quantized_keys(source: ExportSource, keys: list[str]) -> dict[str, bool]:
    """Return the checkpoint names of the weights that transformers would quantize, and whether each is transposed.

    A transposed weight is stored as [in, out] (Conv1D), and bitsandbytes stores it as [out, in].

    Args:
        source: the model.
        keys: names of its tensors in the checkpoint.

    Raises:
        LoraError: the checkpoint stores one of these weights in several tensors.
    """
    mapping, result = CheckpointMapping(source.base.skeleton(), keys), {}
    for name, transposed in weights_in_nf4(source).items():
        if mapping.is_joined(name):
            raise LoraError(
                f"--quantize nf4: the checkpoint stores {name} in several tensors, but bitsandbytes needs it in one",
                hint="write bf16, and quantize while loading: quantization_config=BitsAndBytesConfig(...)",
            )
        if name in mapping.parts:
            result[mapping.key(name)] = transposed
    return result


def weights_in_nf4(source: ExportSource) -> dict[str, bool]:
    """Return the parameters that transformers reads as NF4, and whether each is stored transposed; no experts."""
    return fake_quantize.quantized_weights(source.base.skeleton(), NF4_SPEC, in_training=False)


def quantization_config() -> dict[str, Any]:
    """Return the `quantization_config` section of config.json."""
    section: dict[str, Any] = bnb_config(NF4_SPEC, torch.bfloat16).to_dict()
    return section


def nf4_tensors(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> TensorShapes:
    """Return dtypes and shapes of the tensors that store the weight `key`, by name.

    Args:
        key: name of the weight.
        shape: [out, in], as bitsandbytes stores it.
        dtype: of the weight before quantization.
    """
    count = math.prod(shape)
    blocks = -(-count // BLOCK_SIZE)
    return {
        key: (torch.uint8, (-(-count // 2), 1)),
        f"{key}.absmax": (torch.uint8, (blocks,)),
        f"{key}.nested_absmax": (torch.float32, (-(-blocks // NESTED_BLOCK_SIZE),)),
        f"{key}.nested_quant_map": (torch.float32, (256,)),
        f"{key}.quant_map": (torch.float32, (16,)),
        f"{key}.{STATE_KEY}": (torch.uint8, (len(_state_json(shape, dtype, LONGEST_FLOAT)),)),
    }


def _state_json(shape: tuple[int, ...], dtype: torch.dtype, offset: str) -> bytes:
    """Return the quantization state in bitsandbytes' JSON; `offset`, the mean of the scales, is passed as text."""
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK_SIZE,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
        "nested_blocksize": NESTED_BLOCK_SIZE,
        "nested_dtype": "float32",
    }
    return f'{json.dumps(state)[:-1]}, "nested_offset": {offset}}}'.encode()


def quantize_nf4(key: str, weight: Tensor, *, transposed: bool) -> dict[str, Tensor]:
    """Quantize `weight` to NF4, and return the tensors that store it, by name; `nf4_tensors` gives their shapes.

    Args:
        key: name of the weight.
        weight: [out, in], or [in, out] if `transposed`; in the dtype that the model computes in.
        transposed: whether bitsandbytes stores its transpose.
    """
    matrix = weight.T.contiguous() if transposed else weight.contiguous()
    codes, state = bnbf.quantize_4bit(
        matrix, quant_type="nf4", compress_statistics=True, quant_storage=torch.uint8, blocksize=BLOCK_SIZE
    )
    tensors: dict[str, Tensor] = {f"{key}.{name}": value for name, value in state.as_dict(packed=True).items()}
    # The shards are planned before a weight is read, but the length of the state's JSON depends on the digits of a
    # mean. The JSON is padded to its maximum length with spaces, which JSON allows at its end.
    max_length = nf4_tensors(key, tuple(matrix.shape), matrix.dtype)[f"{key}.{STATE_KEY}"][1][0]
    state_json = tensors[f"{key}.{STATE_KEY}"]
    spaces = torch.full((max_length - len(state_json),), ord(" "), dtype=torch.uint8)
    return {key: codes, **tensors, f"{key}.{STATE_KEY}": torch.cat([state_json, spaces])}


def nf4_error(key: str, tensors: dict[str, Tensor], weight: Tensor, *, transposed: bool) -> float:
    """Return the largest error of an NF4 weight, as a fraction of the largest error that is allowed; inf for a NaN.

    Neighboring values of nf4's 16 differ by at most 0.304 of the block's largest weight, so rounding costs at most half
    of that. The 8-bit scales add less than 0.01 of the tensor's largest weight.

    Args:
        key: name of the weight.
        tensors: as returned by `quantize_nf4`, or read back from the file.
        weight: the original, [out, in], or [in, out] if `transposed`; floating-point.
        transposed: whether bitsandbytes stores its transpose.
    """
    original = (weight.T if transposed else weight).float().reshape(-1)
    padding = (0, -original.numel() % BLOCK_SIZE)
    largest = pad(original.abs(), padding).view(-1, BLOCK_SIZE).amax(dim=1)
    difference = (_dequantize(key, tensors)[: original.numel()] - original).abs()
    difference = pad(difference, padding).view(-1, BLOCK_SIZE).amax(dim=1)
    allowed = 0.304 / 2 * largest + 0.01 * largest.max()
    error = float((difference / allowed.clamp_min(torch.finfo(torch.float32).tiny)).max())
    return error if math.isfinite(error) else math.inf


def _dequantize(key: str, tensors: dict[str, Tensor]) -> Tensor:
    """Return the weight, flattened, fp32.

    bitsandbytes' own CPU function is wrong for rows that are not a multiple of the block size.
    """
    parts = {name.removeprefix(f"{key}."): value for name, value in tensors.items() if name != key}
    state = QuantState.from_dict(parts, device=torch.device("cpu"))
    scales = bnbf.dequantize_blockwise(state.absmax, state.state2) + state.offset
    packed = tensors[key].view(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)  # the first of two is in the upper half
    weight: Tensor = state.code[codes.long()] * scales.float().repeat_interleave(BLOCK_SIZE)[: len(codes)]
    return weight
