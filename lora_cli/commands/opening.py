"""What train, check and eval begin with: the device, the base model's place, its tokenizer and the encoded rows."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from lora_cli.data.batches import Plan
from lora_cli.data.prepare import Prepared, prepare
from lora_cli.data.rows import Rows
from lora_cli.data.templates import resolve
from lora_cli.errors import LoraError
from lora_cli.model import attention, base, isolation, quantize, targets
from lora_cli.recipe.schema import DataSpec, ModelSpec, Recipe

# Whether the package that an attention needs, or its kernel on the hub, works here.
FLASH: dict[str, Callable[[], bool]] = {
    "flash_attention_2": partial(is_flash_attn_2_available, kernels_fallback_ok=True),
    "flash_attention_3": partial(is_flash_attn_3_available, kernels_fallback_ok=True),
    "flash_attention_4": partial(is_flash_attn_4_available, kernels_fallback_ok=True),
}


class Opening(NamedTuple):
    """Everything but the weights."""

    device: torch.device
    dtype: torch.dtype
    source: base.Source
    tokenizer: PreTrainedTokenizerBase
    data: Prepared


def open_run_inputs(
    model: ModelSpec,
    data: DataSpec,
    *,
    seed: int,
    say: Callable[[str], None],
    weights: bool = True,
    train_key: str = "data.train",
) -> Opening:
    """Find the base model, load its tokenizer and encode the rows.

    Args:
        model: the base.
        data: the rows.
        seed: picks the held-out rows.
        say: takes progress lines.
        weights: whether the model will be loaded from what is found.
        train_key: what the user knows `data.train` by.

    Raises:
        LoraError: whatever is wrong with the model's path, its tokenizer or the rows.
    """
    device = base.pick_device()
    dtype = base.pick_dtype(model.dtype, device)
    source = base.locate(model, dtype=dtype, say=say, weights=weights)
    # All that can refuse the model in a second comes before the rows, which can take minutes.
    _refuse_longer_than_model(source, data)
    _refuse_unknown_attention(model.attention)
    tokenizer = base.load_tokenizer(source)
    prepared = prepare(data, tokenizer, seed=seed, cache=base.cache_folder(), say=say, train_key=train_key)
    if data.chat_template is not None:
        # What is saved beside the adapter must prompt it as it was trained.
        template = resolve(data.chat_template, tokenizer)
        tokenizer.chat_template = template.source if template else None
    return Opening(device, dtype, source, tokenizer, prepared)


def _refuse_longer_than_model(source: base.Source, data: DataSpec) -> None:
    limit = getattr(base.load_config(source).get_text_config(), "max_position_embeddings", None)
    if limit is not None and data.max_length > limit:
        raise LoraError(
            f"data.max_length: {data.max_length:,} tokens, but the model has positions for {limit:,}",
            hint=f"at most {limit}",
        )


def _refuse_unknown_attention(name: str) -> None:
    known = sorted(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in key and key != attention.NAME)
    # With a slash it is a kernel of the hub, which only the hub knows.
    if name not in ("auto", "eager", *known) and "/" not in name:
        raise LoraError(f"model.attention: {name} is not known", hint=f"known are auto, eager, {', '.join(known)}")
    if not FLASH.get(name, lambda: True)():
        raise LoraError(
            f"model.attention: {name} needs its package, which is not installed or does not work here",
            hint="write auto, or install the package that fits your GPU and torch",
        )


def load_base(recipe: Recipe, opening: Opening) -> tuple[PreTrainedModel, isolation.Proof | None]:
    """The base model, frozen, with the attention that suits it; and with packing, the proof that rows are apart."""
    model = base.load_base(
        opening.source,
        dtype=opening.dtype,
        device=opening.device,
        attention="sdpa" if recipe.model.attention == "auto" else recipe.model.attention,
        quantization=recipe.quantization,
    )
    if recipe.quantization is not None:
        model = quantize.prepare(model)
    return model, isolation.settle(model, recipe.model.attention, packing=recipe.data.packing)


def batch_plan(recipe: Recipe, opening: Opening, rows: Rows, *, per_step: int) -> Plan:
    """The batches of `rows` as the recipe wants them."""
    size = recipe.training.tokens_per_batch if recipe.data.packing else recipe.training.batch_size
    assert size is not None  # the schema fills the one that packing leaves in use
    return Plan(
        rows,
        packing=recipe.data.packing,
        size=size,
        per_step=per_step,
        seed=recipe.training.seed,
        pad_id=_pad_id(opening.tokenizer),
    )


def coverage_table(rows: list[targets.Coverage], trainable: int) -> list[str]:
    """Which kinds of layers carry the adapter, line by line."""
    width = max((len(row.kind) for row in rows), default=0)
    lines = [
        f"  {row.kind:{width}}  {row.matched:>4}/{row.layers} layers  {row.parameters:>13,} parameters" for row in rows
    ]
    return ["adapter on:", *lines, f"  {trainable:,} trainable parameters in all"]


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id will do to pad with, since padding is masked and carries no loss; the tokenizer's own where it has one."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0
