"""What train, check and eval begin with: the device, the base model's place, its tokenizer and the encoded rows."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.data.prepare import Prepared, prepare
from lora_cli.data.templates import resolve
from lora_cli.errors import LoraError
from lora_cli.model import attention, base
from lora_cli.recipe.schema import DataSpec, ModelSpec


class Opening(NamedTuple):
    """Everything but the weights."""

    device: torch.device
    dtype: torch.dtype
    source: base.Source
    tokenizer: PreTrainedTokenizerBase
    data: Prepared


def open_run_inputs(model: ModelSpec, data: DataSpec, *, seed: int, say: Callable[[str], None]) -> Opening:
    """Find the base model, load its tokenizer and encode the rows.

    Raises:
        LoraError: whatever is wrong with the model's path, its tokenizer or the rows.
    """
    device = base.pick_device()
    dtype = base.pick_dtype(model.dtype, device)
    source = base.locate(model, dtype=dtype, say=say)
    # All that can refuse the model in a second comes before the rows, which can take minutes.
    _refuse_longer_than_model(source, data)
    _refuse_unknown_attention(model.attention)
    tokenizer = base.load_tokenizer(source)
    prepared = prepare(data, tokenizer, seed=seed, cache=base.cache_folder(), say=say)
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


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id will do to pad with, since padding is masked and carries no loss; the tokenizer's own where it has one."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0
