"""What train, check and eval begin with: the device, the base model's place, its tokenizer and the encoded rows."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from lora_cli.data.batches import BatchPlan
from lora_cli.data.chat_templates import resolve_template
from lora_cli.data.collate import (
    Collate,
    collate_classified,
    collate_packed,
    collate_padded,
    collate_tagged,
    collate_translated,
)
from lora_cli.data.dataset import EncodedDataset
from lora_cli.data.prepare import PreparedData, prepare_data
from lora_cli.errors import LoraError
from lora_cli.model import base_model, packed_attention, prequantized
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.schema import DataSpec, Recipe

# Whether the package that an attention needs, or its kernel on the hub, works here.
FLASH_AVAILABLE: dict[str, Callable[[], bool]] = {
    "flash_attention_2": partial(is_flash_attn_2_available, kernels_fallback_ok=True),
    "flash_attention_3": partial(is_flash_attn_3_available, kernels_fallback_ok=True),
    "flash_attention_4": partial(is_flash_attn_4_available, kernels_fallback_ok=True),
}
# Models that number positions from behind the padding id on, so that the last ones of their table are never reached.
MODELS_WITH_POSITION_OFFSET = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "roberta-prelayernorm",
    "xmod",
    "data2vec-text",
)


class RunInputs(NamedTuple):
    """Everything but the weights."""

    device: torch.device
    dtype: torch.dtype
    source: base_model.ModelSource
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    prequantized: prequantized.Prequantized | None  # what the base was quantised with before it came here

    @property
    def pad_id(self) -> int:
        """An id to pad with. Any will do, since padding is masked and carries no loss; the tokenizer's own where it has
        one.
        """
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if isinstance(candidate, int):
                return candidate
        return 0


def load_inputs(
    recipe: Recipe,
    *,
    info: Callable[[str], None],
    weights: bool = True,
    data: DataSpec | None = None,
    train_key: str = "data.train",
) -> RunInputs:
    """Find the base model, load its tokenizer and encode the rows.

    Args:
        recipe: of the run.
        say: takes progress lines.
        weights: whether the model will be loaded from what is found.
        data: rows in place of the recipe's.
        train_key: what the user knows `data.train` by.

    Raises:
        LoraError: whatever is wrong with the model's path, its tokenizer or the rows.
    """
    model, data, task = recipe.model, data or recipe.data, recipe.task
    device = base_model.pick_device()
    dtype = base_model.pick_dtype(model.dtype, device, recipe.quantization)
    source = base_model.find_model(model, dtype=dtype, device=device, info=info, weights=weights)
    # All that can refuse the model in a second comes before the rows, which can take minutes.
    config = base_model.load_config(source)
    _refuse_other_task(config, recipe)
    already = prequantized.detect_prequantized(config)
    if source.packed:
        already = prequantized.Prequantized("gguf", None)
    if already is not None:
        prequantized.check_prequantized(already, recipe.adapter, recipe.quantization, path=model.path)
    _refuse_unknown_attention(model.attention)
    tokenizer = base_model.load_tokenizer(source, model.new_tokens)
    _refuse_longer_than_model(config, data, virtual=recipe.adapter.virtual_tokens or 0)
    prepared = prepare_data(
        data,
        tokenizer,
        seed=recipe.training.seed,
        cache=base_model.cache_folder(),
        info=info,
        task=task,
        own_labels=base_model.head_labels(config, task),
        train_key=train_key,
    )
    if task == "seq-cls" and config.is_encoder_decoder:
        _refuse_mixed_pairs(prepared, config)
    if data.chat_template is not None:
        # What is saved beside the adapter must prompt it as it was trained.
        template = resolve_template(data.chat_template, tokenizer)
        tokenizer.chat_template = template.source if template else None
    return RunInputs(device, dtype, source, config, tokenizer, prepared, already)


def _refuse_other_task(config: PretrainedConfig, recipe: Recipe) -> None:
    """The architecture has to have a class for the task: known by its config, before anything is loaded."""
    known = {name: type(config) in task.loader._model_mapping for name, task in TASKS.items()}
    if known[recipe.task] or hasattr(config, "auto_map"):
        return
    others = [name for name, knows in known.items() if knows]
    raise LoraError(
        f"task: transformers has no {config.model_type} model for {recipe.task}",
        hint=f"write task: {' or '.join(others)}, or give another model" if others else "give another model",
    )


def _refuse_longer_than_model(config: PretrainedConfig, data: DataSpec, *, virtual: int) -> None:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and config.model_type in MODELS_WITH_POSITION_OFFSET:
        limit -= config.pad_token_id + 1
    if limit is not None and data.max_length + virtual > limit:
        before = f" and {virtual} virtual ones before them" if virtual else ""
        raise LoraError(
            f"data.max_length: {data.max_length:,} tokens{before}, but the model has positions for {limit:,}",
            hint=f"at most {limit - virtual}",
        )


def _refuse_mixed_pairs(data: PreparedData, config: PretrainedConfig) -> None:
    """Such a model reads the class at the last end token, and wants as many of them in each row of a batch."""
    counts: dict[int, str] = {}
    for rows in (data.train, data.eval):
        for row in rows or ():
            counts.setdefault(int((row.input_ids == config.eos_token_id).sum()), row.where)
            if len(counts) > 1:
                first, second = counts.values()
                raise LoraError(
                    f"{first} and {second}: one of them has a text_pair, and a {config.model_type} model cannot read "
                    "both in one batch",
                    hint="give all rows a text_pair, or none",
                )


def _refuse_unknown_attention(name: str) -> None:
    known = sorted(
        key
        for key in ALL_ATTENTION_FUNCTIONS.valid_keys()
        if "|" not in key and key != packed_attention.PACKED_ATTENTION
    )
    # With a slash it is a kernel of the hub, which only the hub knows.
    if name not in ("auto", "eager", *known) and "/" not in name:
        raise LoraError(f"model.attention: {name} is not known", hint=f"known are auto, eager, {', '.join(known)}")
    if not FLASH_AVAILABLE.get(name, lambda: True)():
        raise LoraError(
            f"model.attention: {name} needs its package, which is not installed or does not work here",
            hint="write auto, or install the package that fits your GPU and torch",
        )


def batch_plan(recipe: Recipe, opening: RunInputs, rows: EncodedDataset, *, batches_per_step: int) -> BatchPlan:
    """The batches of `rows` as the recipe wants them."""
    packing = bool(recipe.data.packing)
    size = recipe.training.tokens_per_batch if packing else recipe.training.batch_size
    assert size is not None  # the schema fills the one that packing leaves in use
    return BatchPlan(
        rows,
        packing=packing,
        size=size,
        batches_per_step=batches_per_step,
        seed=recipe.training.seed,
        pad_id=opening.pad_id,
        collate=_collate_for(recipe, opening, packing=packing),
    )


def _collate_for(recipe: Recipe, opening: RunInputs, *, packing: bool) -> Collate:
    match recipe.task:
        case "seq-cls":
            return collate_classified
        case "token-cls":
            return collate_tagged
        case "seq2seq-lm":
            start = opening.config.decoder_start_token_id
            if start is None:
                raise LoraError(
                    "model.path: its config does not say which token a decoder starts with (decoder_start_token_id)",
                    hint="add it to the model's config.json",
                )
            return partial(collate_translated, start_id=start)
        case _:
            return collate_packed if packing else collate_padded
