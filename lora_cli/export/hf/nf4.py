"""A weight in 4 bits as bitsandbytes has it, and the tensors that a checkpoint of transformers keeps it in."""

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

NF4_SPEC = QuantizationSpec(bits=4)  # nf4, its scales quantised too, computed in bfloat16: QLoRA's
NESTED_BLOCK_SIZE = 256  # blocks whose scales share a scale
STATE_KEY = "quant_state.bitsandbytes__nf4"
LONGEST_FLOAT = "-2.2250738585072014e-308"  # that Python writes

TensorShapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def quantized_keys(subject: ExportSource, keys: list[str]) -> dict[str, bool]:
    """Names in the checkpoint of the weights that transformers would quantise, and whether each is turned (Conv1D).

    Args:
        subject: the model.
        keys: names of its tensors in the checkpoint.

    Raises:
        LoraError: one of them is spread over several tensors of the checkpoint.
    """
    mapping, found = CheckpointMapping(subject.base.skeleton(), keys), {}
    for name, turned in fake_quantize.quantized_weights(subject.base.skeleton(), NF4_SPEC).items():
        if mapping.is_joined(name):
            raise LoraError(
                f"--quantize nf4: the checkpoint keeps {name} in several tensors, and bitsandbytes knows it as one",
                hint="write bf16, and quantise when it is loaded: quantization_config=BitsAndBytesConfig(...)",
            )
        if name in mapping.parts:
            found[mapping.key(name)] = turned
    return found


def quantization_config() -> dict[str, Any]:
    """What config.json says of it."""
    found: dict[str, Any] = bnb_config(NF4_SPEC).to_dict()
    return found


def nf4_tensors(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> TensorShapes:
    """Dtypes and shapes of the tensors that hold the weight `key`, by their names; `shape` as bitsandbytes has it."""
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
    """As bitsandbytes writes it, but for the number."""
    said = {
        "quant_type": "nf4",
        "blocksize": BLOCK_SIZE,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
        "nested_blocksize": NESTED_BLOCK_SIZE,
        "nested_dtype": "float32",
    }
    return f'{json.dumps(said)[:-1]}, "nested_offset": {offset}}}'.encode()


def quantize_nf4(key: str, weight: Tensor, *, turned: bool) -> dict[str, Tensor]:
    """The tensors that hold `weight`, by their names.

    Args:
        key: its name.
        weight: (outputs, inputs), or the other way around where `turned`; in the dtype that the model computes in.
        turned: whether bitsandbytes has it transposed.
    """
    given = weight.T.contiguous() if turned else weight.contiguous()
    codes, state = bnbf.quantize_4bit(
        given, quant_type="nf4", compress_statistics=True, quant_storage=torch.uint8, blocksize=BLOCK_SIZE
    )
    held: dict[str, Tensor] = {f"{key}.{name}": value for name, value in state.as_dict(packed=True).items()}
    # A file's places are laid out before a weight is read, and this is as long as the digits of a mean. JSON may end
    # in blanks.
    longest = nf4_tensors(key, tuple(given.shape), given.dtype)[f"{key}.{STATE_KEY}"][1][0]
    words = held[f"{key}.{STATE_KEY}"]
    blanks = torch.full((longest - len(words),), ord(" "), dtype=torch.uint8)
    return {key: codes, **held, f"{key}.{STATE_KEY}": torch.cat([words, blanks])}


def nf4_error(key: str, held: dict[str, Tensor], weight: Tensor, *, turned: bool) -> float:
    """How far the tensors in `held` are off `weight`, as a share of what 4 bits may be: 1 or less if all is well.

    Between two neighbours of nf4's 16 values lies at most 0.304 of a block's largest weight, and 8 bits round that
    largest by less than 0.01 of the tensor's.
    """
    given = (weight.T if turned else weight).float().reshape(-1)
    spare = (0, -given.numel() % BLOCK_SIZE)
    largest = pad(given.abs(), spare).view(-1, BLOCK_SIZE).amax(dim=1)
    apart = pad((_dequantize(key, held)[: given.numel()] - given).abs(), spare).view(-1, BLOCK_SIZE).amax(dim=1)
    allowed = 0.304 / 2 * largest + 0.01 * largest.max()
    off = float((apart / allowed.clamp_min(torch.finfo(torch.float32).tiny)).max())
    return off if math.isfinite(off) else math.inf


def _dequantize(key: str, held: dict[str, Tensor]) -> Tensor:
    """The weights in a row, fp32; by the format, as bitsandbytes' own for the CPU mistakes rows of no whole blocks."""
    parts = {name.removeprefix(f"{key}."): value for name, value in held.items() if name != key}
    state = QuantState.from_dict(parts, device=torch.device("cpu"))
    scales = bnbf.dequantize_blockwise(state.absmax, state.state2) + state.offset
    packed = held[key].view(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)  # the first of two in the upper half
    restored: Tensor = state.code[codes.long()] * scales.float().repeat_interleave(BLOCK_SIZE)[: len(codes)]
    return restored
