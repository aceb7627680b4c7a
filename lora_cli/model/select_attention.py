"""Choose the attention implementation, and check on the model itself that packed rows do not leak into each other."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from lora_cli.data.collate import Batch
from lora_cli.errors import LoraError, first_line
from lora_cli.model import packed_attention, varlen_attention
from lora_cli.model.experts import expert_weights
from lora_cli.model.falcon_attention import use_attention_interface
from lora_cli.model.loss import logits_at, model_inputs
from lora_cli.model.padded_attention import PADDED_ATTENTION

# Largest difference between the logits of packed rows and of each row alone with eager attention, relative to the
# largest logit, that rounding can explain for a matmul in this dtype. SmolLM2 135M shows 1.4e-6 in fp32 and 2 to 6 % in
# bf16; deeper models may show more. An attention that computes something else differs by more. Leaks between rows are
# found by MAX_LEAK instead.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.2}
# Largest change of one row's logits when another row's tokens change. Both passes multiply the same shapes, so without
# a leak the logits are equal to the bit. MoE experts are an exception: the number of tokens routed to an expert changes
# the shape of its product (1.4e-6 in fp32 for models of two layers).
MAX_LEAK = 1e-5
# Largest change of logits when a later token changes; not zero because of MoE experts, as above.
MAX_LOOKAHEAD = 1e-3
# Values of `layer_types` in the model's config that our attention for packed rows supports.
SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Of this project; none of them supports rows that are padded on the left, as prompts are.
OWN_ATTENTION = (packed_attention.PACKED_ATTENTION, varlen_attention.VARLEN_ATTENTION, PADDED_ATTENTION)
COMPARED_TOKENS = 16  # last tokens of each row whose logits are compared


class LeakCheck(NamedTuple):
    """The chosen attention, and measurements with it on a few packed rows."""

    attention: str
    leak: float  # largest change of one row's logits when another row's tokens change, relative to the largest logit
    # Largest difference between packed rows and each row alone with eager attention, also relative; with experts, the
    # median of the tokens' largest differences.
    difference: float


def candidates(requested: str, *, packing: bool, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the attention implementations to try, best first, by their names in transformers.

    `requested` is the recipe's `model.attention`, `dtype` the dtype of matrix products.
    """
    if requested != "auto":
        return [requested]
    if device.type == "cuda":
        # This project was developed without a GPU, and has never run any of them there with packed rows.
        flash = ["flash_attention_2"] if is_flash_attn_2_available() and dtype != torch.float32 else []
        if not packing:
            # Flash attention takes the padding out in every layer, and waits for the device to know what is left.
            return [PADDED_ATTENTION, *flash, "sdpa", "eager"]
        varlen = varlen_attention.runs_on(device, dtype)
        # With sdpa, every layer has a mask of tokens x tokens between the rows. A cap on the scores (Gemma 2) is
        # computed by flash and flex attention.
        own = [varlen_attention.VARLEN_ATTENTION] if varlen else []
        return [*own, *flash, packed_attention.PACKED_ATTENTION, "flex_attention", "sdpa", "eager"]
    return [packed_attention.PACKED_ATTENTION, "sdpa", "eager"] if packing else ["sdpa", "eager"]


def choose_attention(model: PreTrainedModel, requested: str, *, packing: bool, causal: bool = True) -> LeakCheck | None:
    """Set the first attention implementation that works on `model` and, with packing, isolates packed rows.

    Args:
        model: the base; its attention is set in place.
        requested: the recipe's `model.attention`: auto, or the name of one implementation.
        packing: whether rows are packed.
        causal: whether to check also that no token's prediction depends on later tokens.

    Returns:
        The measurements; None without packing.

    Raises:
        LoraError: no attention works or isolates packed rows in this model, or the model is not causal.
    """
    use_attention_interface(model)
    try:
        check = _choose(model, requested, packing=packing)
    except LoraError:
        # In an encoder, rows mix because each token attends to all others: that is the reason to give.
        if causal:
            _check_causal(model)
        raise
    if causal:
        _check_causal(model)
    return check


@torch.no_grad()
def _check_causal(model: PreTrainedModel) -> None:
    """Raise a LoraError if the prediction at a token depends on later tokens.

    Encoders have a class for causal-lm too. They would learn to copy the token that they should predict.
    """
    if getattr(model, "is_loaded_in_8bit", False):
        return  # LLM.int8 chooses outlier columns over all tokens: changing one token changes the rounding of all
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.get_input_embeddings().weight.shape[0], (12,), generator=generator)
    changed = ids.clone()
    changed[-1] = (changed[-1] + 1) % model.get_input_embeddings().weight.shape[0]
    training = model.training
    model.eval()
    before, after = (_logits(model, [row])[:-1] for row in (ids, changed))
    model.train(training)
    lookahead = float((before - after).abs().max() / before.abs().max().clamp_min(1e-12))
    if lookahead > MAX_LOOKAHEAD:
        raise LoraError(
            f"task: {type(model).__name__} is not causal: "
            f"changing a token changes the predictions before it (by {lookahead:.1%})",
            hint="set task: seq-cls or token-cls, or choose a causal model",
        )


def _choose(model: PreTrainedModel, requested: str, *, packing: bool) -> LeakCheck | None:
    dtype = matmul_dtype(model)
    tried = []
    for name in candidates(requested, packing=packing, device=model.device, dtype=dtype):
        try:
            set_attention(model, name)
            if not packing:
                return None
            check = _measure_leak(model, name)
        except (RuntimeError, ValueError, ImportError, TypeError, AttributeError) as reason:
            # Builds of flash attention that do not fit raise errors of any kind; in our own code, these are bugs.
            is_bug = isinstance(reason, (TypeError, AttributeError)) and not name.startswith(("flash", "flex"))
            if isinstance(reason, torch.OutOfMemoryError) or is_bug:
                raise
            tried.append(f"{name} ({first_line(reason)})")
            continue
        if check.leak <= MAX_LEAK and check.difference <= TOLERANCE[dtype]:
            return check
        tried.append(
            f"{name} (rows change each other's logits by {check.leak:.1%}, "
            f"packing changes logits by {check.difference:.1%})"
        )
    if packing and getattr(model, "is_loaded_in_8bit", False):
        raise LoraError(
            "data.packing: 8-bit layers (LLM.int8) choose their outlier columns over the full batch, so packed "
            f"rows change each other's results; tried {'; '.join(tried)}",
            hint="with quantization.bits: 8 set data.packing: false, or set quantization.bits: 4",
        )
    if packing:
        raise LoraError(
            f"data.packing: {type(model).__name__} does not isolate packed rows; tried {'; '.join(tried)}",
            hint="set data.packing: false",
        )
    raise LoraError(
        f"model.attention: no implementation works for {type(model).__name__}; tried {'; '.join(tried)}",
        hint="set model.attention: eager",
    )


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Set the attention implementation of `model`.

    Raises:
        NotImplementedError: the model's code has its own attention, so that transformers keeps that one, or may make
            its masks itself.
        ValueError: transformers does not support the attention in this model.
    """
    found = model.config._attn_implementation
    if found != name and not model._can_set_attn_implementation():  # transformers would warn, and keep it
        raise NotImplementedError(f"{type(model).__name__} keeps {found}, which was set when it was built")
    if name == PADDED_ATTENTION:
        if not type(model).__module__.startswith("transformers."):
            raise NotImplementedError(f"{type(model).__name__} is not a class of transformers")
        model.set_attn_implementation("sdpa")  # of which it is a form
    model.set_attn_implementation(name)
    found = model.config._attn_implementation
    # For flash attention without its package, transformers takes a kernel of the hub, with another name.
    if found != name and not (varlen_attention.is_flash(name) and varlen_attention.is_flash(found)):
        raise NotImplementedError(f"{type(model).__name__} keeps {found}, which was set when it was built")


def matmul_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the least precise dtype that `model` multiplies in.

    Quantized layers multiply in a compute dtype that may differ from the parameters' dtype.
    """
    dtypes: set[torch.dtype] = {model.dtype}
    for module in model.modules():
        layer: Any = module
        if type(module).__name__ == "Linear8bitLt":
            dtypes.add(torch.float16)  # LLM.int8 multiplies outlier columns and scales in fp16
        elif isinstance(getattr(layer, "compute_dtype", None), torch.dtype):  # Linear4bit
            dtypes.add(layer.compute_dtype)
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def unsupported_layers(model: PreTrainedModel) -> list[str]:
    """Return the kinds of layers of `model` that our attention for packed rows does not support."""
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return sorted(set(layer_types) - SUPPORTED_LAYER_TYPES)


@torch.no_grad()
def _measure_leak(model: PreTrainedModel, name: str) -> LeakCheck:
    """Measure the attention `name`, which is set on `model` already; leaves mode and attention unchanged."""
    unsupported = unsupported_layers(model)
    if name in OWN_ATTENTION and unsupported:
        raise NotImplementedError(f"not supported: {', '.join(unsupported)}")
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or packed_attention.LONG_ROW
    first, other, second = (torch.randint(0, vocabulary, (n,), generator=generator) for n in (7, 7, 11))
    # The long row repeats the tokens of the short ones: more different tokens could be ones that were never trained.
    tokens = torch.cat([first, other, second])
    long = tokens[torch.randint(0, len(tokens), (min(packed_attention.LONG_ROW + 13, limit),), generator=generator)]
    training = model.training
    try:
        with torch.random.fork_rng(devices=[]):
            # A forward pass in training mode, because only that passes dropout to the attention.
            model.train()
            model(**_inputs(model, [first, second]))
        model.eval()
        before, after = _logits(model, [first, second]), _logits(model, [other, second])
        packed = _logits(model, [first, second, long])
        model.set_attn_implementation("eager")
        separate = torch.cat([_logits(model, [row]) for row in (second, long)])
    finally:
        model.set_attn_implementation(name)
        model.train(training)
    largest = separate.abs().max().clamp_min(1e-12)
    leak = (before[len(first) :] - after[len(first) :]).abs().max() / largest
    differences = (packed[len(first) :] - separate).abs().amax(dim=-1) / largest
    # In half precision, rounding sends single tokens to other experts: their logits may differ by any amount.
    difference = differences.median() if expert_weights(model) else differences.max()
    return LeakCheck(name, float(leak), float(difference))


def _inputs(model: PreTrainedModel, rows: Sequence[Tensor]) -> dict[str, Any]:
    """Pack `rows` ([tokens] int64 each) and return the keyword arguments of the model's forward."""
    lengths = tuple(len(row) for row in rows)
    positions = torch.cat([torch.arange(n) for n in lengths])
    empty = torch.empty(0, dtype=torch.int64)
    batch = Batch(torch.cat(list(rows))[None], positions[None], None, lengths, empty, empty, ())
    return model_inputs(model, batch)


def _logits(model: PreTrainedModel, rows: Sequence[Tensor]) -> Tensor:
    """Return the logits [tokens, vocabulary] fp64 of the last COMPARED_TOKENS tokens of each packed row."""
    is_compared = torch.cat([torch.arange(len(row)) >= (len(row) - COMPARED_TOKENS) for row in rows])
    positions = is_compared.nonzero().flatten()
    return logits_at(model, _inputs(model, rows), positions).double()
