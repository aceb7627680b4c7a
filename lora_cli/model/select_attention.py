"""Choose the attention for packed rows, and prove on the model itself that rows do not see each other."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from lora_cli.data.collate import Batch
from lora_cli.errors import LoraError
from lora_cli.model import packed_attention
from lora_cli.model.loss import logits_at, model_inputs

# Largest difference of logits, packed against apart under eager attention and relative to their size, that rounding
# explains in this dtype of the products. SmolLM2 135M shows 1.4e-6 in fp32, 2 to 6 % in bf16; deeper
# models may show more. That rows are kept apart is for LEAK to tell, and what computes something else is off by more.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.2}
# Largest change of one row's logits when another row's tokens change. Both passes multiply the same shapes, so that
# rows apart are equal to the bit, but for experts, whose products have as many rows as they get (3e-7 in fp32).
MAX_LEAK = 1e-6
# Largest change of logits when a later token changes: experts' products have as many rows as they get.
MAX_LOOKAHEAD = 1e-3
# Kinds of layers, as the model's config names them, that the packed attention of the CPU computes.
LAYER_TYPES = {"full_attention", "sliding_attention"}
COMPARED_TOKENS = 16  # last tokens of the long row whose logits are compared


class LeakCheck(NamedTuple):
    """What was chosen and what was measured, on a few rows packed, changed and apart."""

    attention: str
    leak: float  # change of one row's logits when the other row is changed, relative to the largest logit
    difference: float  # packed against each row alone under eager attention, likewise


def candidates(wanted: str, *, packing: bool, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Attention implementations to try, best first, by their names in transformers; `dtype` is the products'."""
    if wanted != "auto":
        return [wanted]
    if device.type == "cuda":
        # flash-attention takes row boundaries and half precision; without it, sdpa masks rows from each other.
        # Neither was ever run here: there is no GPU on the machines this is developed on.
        flash = ["flash_attention_2"] if is_flash_attn_2_available() and dtype != torch.float32 else []
        return [*flash, "sdpa", "eager"]
    return [packed_attention.PACKED_ATTENTION, "sdpa", "eager"] if packing else ["sdpa", "eager"]


def choose_attention(model: PreTrainedModel, wanted: str, *, packing: bool, causal: bool = True) -> LeakCheck | None:
    """Set the first attention that works on `model`, and with packing, that keeps rows apart; None without packing.

    With `causal` the model has to predict each token from those before it alone, which is tried as well.

    Raises:
        LoraError: packing was asked for, and no attention keeps rows apart in this model; or it looks ahead.
    """
    proof = _choose(model, wanted, packing=packing)
    if causal:
        _check_causal(model)
    return proof


@torch.no_grad()
def _check_causal(model: PreTrainedModel) -> None:
    """An encoder has a class for causal-lm too, and would learn to copy the token that it is to predict."""
    if getattr(model, "is_loaded_in_8bit", False):
        return  # its outlier columns are chosen over all tokens: a change of one moves the rounding of all
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.get_input_embeddings().weight.shape[0], (12,), generator=generator)
    other = ids.clone()
    other[-1] = (other[-1] + 1) % model.get_input_embeddings().weight.shape[0]
    training = model.training
    model.eval()
    first, second = (_logits(model, [row])[:-1] for row in (ids, other))
    model.train(training)
    seen = float((first - second).abs().max() / first.abs().max().clamp_min(1e-12))
    if seen > MAX_LOOKAHEAD:
        raise LoraError(
            f"task: {type(model).__name__} looks ahead: a token changes what is predicted before it, by {seen:.1%}",
            hint="it is no causal model: write task: seq-cls or token-cls, or give another model",
        )


def _choose(model: PreTrainedModel, wanted: str, *, packing: bool) -> LeakCheck | None:
    dtype = matmul_dtype(model)
    tried = []
    for name in candidates(wanted, packing=packing, device=model.device, dtype=dtype):
        try:
            model.set_attn_implementation(name)
            if not packing:
                return None
            proof = _measure_leak(model, name)
        except (RuntimeError, ValueError, ImportError) as reason:
            if isinstance(reason, torch.OutOfMemoryError):
                raise
            tried.append(f"{name} ({str(reason).splitlines()[0]})")
            continue
        if proof.leak <= MAX_LEAK and proof.difference <= TOLERANCE[dtype]:
            return proof
        tried.append(
            f"{name} (rows change each other's logits by {proof.leak:.1%}, packed is off by {proof.difference:.1%})"
        )
    if packing and getattr(model, "is_loaded_in_8bit", False):
        raise LoraError(
            "data.packing: 8-bit layers (LLM.int8) choose their outlier columns over the whole batch, so that packed "
            f"rows change each other's results; tried {'; '.join(tried)}",
            hint="with quantization.bits: 8 set data.packing: false, or set quantization.bits: 4",
        )
    if packing:
        raise LoraError(
            f"data.packing: {type(model).__name__} does not keep packed rows apart; tried {'; '.join(tried)}",
            hint="set data.packing: false",
        )
    raise LoraError(f"model.attention: none works here; tried {'; '.join(tried)}", hint="set model.attention: eager")


def matmul_dtype(model: PreTrainedModel) -> torch.dtype:
    """The coarsest dtype that `model` multiplies in: of a quantised one not its parameters', which are fp32."""
    found: set[torch.dtype] = {model.dtype}
    for module in model.modules():
        layer: Any = module
        if type(module).__name__ == "Linear8bitLt":
            found.add(torch.float16)  # LLM.int8 multiplies its outlier columns and scales in it
        elif isinstance(getattr(layer, "compute_dtype", None), torch.dtype):  # Linear4bit
            found.add(layer.compute_dtype)
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)


@torch.no_grad()
def _measure_leak(model: PreTrainedModel, name: str) -> LeakCheck:
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or LAYER_TYPES)
    if name == packed_attention.PACKED_ATTENTION and not kinds <= LAYER_TYPES:
        raise NotImplementedError(f"layers of {', '.join(sorted(kinds - LAYER_TYPES))}")
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or packed_attention.LONG_ROW
    first, other, second = (torch.randint(0, vocabulary, (n,), generator=generator) for n in (7, 7, 11))
    # Few different tokens will do, and vocabularies have rows that were never trained.
    drawn = torch.cat([first, other, second])
    long = drawn[torch.randint(0, len(drawn), (min(packed_attention.LONG_ROW + 13, limit),), generator=generator)]
    training = model.training
    try:
        with torch.random.fork_rng(devices=[]):
            # As in training, for what only that asks of the attention: dropout.
            model.train()
            model(**_inputs(model, [first, second]))
        model.eval()
        kept, changed = _logits(model, [first, second]), _logits(model, [other, second])
        packed = _logits(model, [first, second, long])
        model.set_attn_implementation("eager")
        apart = torch.cat([_logits(model, [row]) for row in (second, long)])
    finally:
        model.set_attn_implementation(name)
        model.train(training)
    size = apart.abs().max().clamp_min(1e-12)
    leak = (kept[len(first) :] - changed[len(first) :]).abs().max() / size
    difference = (packed[len(first) :] - apart).abs().max() / size
    return LeakCheck(name, float(leak), float(difference))


def _inputs(model: PreTrainedModel, rows: Sequence[Tensor]) -> dict[str, Any]:
    lengths = tuple(len(row) for row in rows)
    positions = torch.cat([torch.arange(n) for n in lengths])
    nothing = torch.empty(0, dtype=torch.int64)
    batch = Batch(torch.cat(list(rows))[None], positions[None], None, lengths, nothing, nothing, ())
    return model_inputs(model, batch)


def _logits(model: PreTrainedModel, rows: Sequence[Tensor]) -> Tensor:
    """Logits [tokens, vocabulary] of all tokens of short rows and of the last SHOWN of long ones."""
    ends = torch.cat([torch.arange(len(row)) >= (len(row) - COMPARED_TOKENS) for row in rows])
    shown = ends.nonzero().flatten().to(model.device)
    return logits_at(model, _inputs(model, rows), shown).double()
