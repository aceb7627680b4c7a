"""Load the inputs of a run for train, check and eval: device, base checkpoint with tokenizer, encoded rows."""

from collections.abc import Callable
from contextlib import suppress
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from lora_cli.data.batches import BatchPlan
from lora_cli.data.chat_templates import saved_template, writes_date
from lora_cli.data.collate import (
    Collate,
    collate_packed,
    collate_padded,
    collate_seq2seq,
    collate_sequence_classification,
    collate_token_classification,
)
from lora_cli.data.dataset import EncodedDataset
from lora_cli.data.prepare import PreparedData, prepare_data
from lora_cli.data.rendering import template_process
from lora_cli.errors import LoraError
from lora_cli.model import multimodal, prequantized
from lora_cli.model.base_model import BaseCheckpoint, head_labels
from lora_cli.model.device import describe_emulation, pick_device, pick_dtype, resolve_compute_dtype
from lora_cli.model.library_errors import panics_as_errors
from lora_cli.model.model_source import find_model, load_config, load_tokenizer, restore_hint
from lora_cli.model.packing_support import packing_obstacle
from lora_cli.model.select_attention import OWN_ATTENTION
from lora_cli.model.tasks import PREFIX_MODELS, TASKS, is_supported
from lora_cli.model.trained_on import TRAINED_ON_FILE
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import DataSpec, Recipe
from lora_cli.run.cache_folder import cache_folder
from lora_cli.run.read_file import read_json_object
from lora_cli.training.checkpoint_folders import list_checkpoints

# Whether the package of an attention implementation, or its kernel from the hub, works here.
FLASH_AVAILABLE: dict[str, Callable[[], bool]] = {
    "flash_attention_2": partial(is_flash_attn_2_available, kernels_fallback_ok=True),
    "flash_attention_3": partial(is_flash_attn_3_available, kernels_fallback_ok=True),
    "flash_attention_4": partial(is_flash_attn_4_available, kernels_fallback_ok=True),
}
# These models start counting positions after the padding id, so that the first pad_id + 1 positions are not available.
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
    """Everything that a run needs except the weights."""

    recipe: Recipe  # with the packing that the base supports
    device: torch.device
    base: BaseCheckpoint
    data: PreparedData
    prequantized: prequantized.Prequantized | None  # how the base was quantized before this run
    template_date: str | None = None  # that the chat template writes, as 2026-01-31; None if it writes none

    @property
    def compute_dtypes(self) -> set[torch.dtype]:
        """The dtypes that the base multiplies in: its own, and that of its 4-bit layers."""
        spec, dtype = self.recipe.quantization, self.base.dtype
        return {dtype, resolve_compute_dtype(spec, dtype)} if spec is not None and spec.bits == 4 else {dtype}


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
        info: prints progress lines.
        weights: whether the model's weights will be loaded later.
        data: rows in place of the recipe's.
        train_key: name of `data.train` in messages.

    Raises:
        LoraError: the model, its tokenizer or the rows cannot be used, or do not fit the recipe.
    """
    model, data, task = recipe.model, data or recipe.data, recipe.task
    device = pick_device()
    dtype = pick_dtype(model.dtype, device, recipe.quantization)
    recipe = recipe.with_compute_dtype(str(dtype).removeprefix("torch."))
    for line in describe_emulation(dtype, recipe.quantization, device):
        info(line)
    source = find_model(model, dtype=dtype, device=device, info=info, weights=weights)
    # The fast checks of the model come before the rows are encoded, which can take minutes.
    config = load_config(source)
    _check_task(config, recipe)
    recipe = _resolve_packing(recipe, config, device, info)
    quantized_before = prequantized.detect_prequantized(config)
    if source.packed:
        quantized_before = prequantized.Prequantized("gguf", None)
    if quantized_before is not None:
        prequantized.check_prequantized(quantized_before, recipe.adapter, recipe.quantization, path=model.path)
    _check_attention(model.attention)
    tokenizer = load_tokenizer(source, model.new_tokens, uses_template=data.chat_template is None)
    _check_max_length(config, data, virtual=recipe.adapter.virtual_tokens or 0)
    with panics_as_errors(f"the tokenizer of {model.path}", hint=restore_hint(source)):
        prepared = prepare_data(
            data,
            tokenizer,
            seed=recipe.training.seed,
            cache=cache_folder(),
            info=info,
            task=task,
            base_labels=head_labels(config, task),
            placeholders=multimodal.placeholder_tokens(config, tokenizer),
            train_key=train_key,
            model=model.path,
        )
    embeddings = len(tokenizer) if model.new_tokens else getattr(config.get_text_config(), "vocab_size", None)
    if embeddings is not None:
        _check_token_ids(prepared, tokenizer, embeddings, targets=task == "seq2seq-lm", hint=restore_hint(source))
    if task == "seq-cls" and config.is_encoder_decoder:
        _check_text_pairs(prepared, config)
    template_date = None
    if prepared.ledger.has_chats and writes_date(data.chat_template, tokenizer):
        template_date = data.template_date or date.today().isoformat()
        info(f"the chat template writes the date: {template_date} in every prompt of this run (data.template_date)")
    # The tokenizer is saved with the adapter: it must prompt the adapter as in training.
    tokenizer.chat_template = saved_template(data, tokenizer)
    # As long as it lives, each page of memory that this process writes to is kept twice.
    template_process().close()
    base = BaseCheckpoint(
        name=model.path,
        source=source,
        config=config,
        tokenizer=tokenizer,
        task=task,
        labels=prepared.labels,
        dtype=dtype,
        vocabulary=len(tokenizer) if model.new_tokens else 0,
        pad_id=_pad_id(tokenizer, embeddings),
    )
    return RunInputs(recipe, device, base, prepared, quantized_before, template_date)


def _resolve_packing(
    recipe: Recipe, config: PretrainedConfig, device: torch.device, info: Callable[[str], None]
) -> Recipe:
    """Fill in packing, if the recipe leaves it open: on, unless the base mixes packed rows.

    Raises:
        LoraError: the recipe asks for packing, and the config shows that the base mixes packed rows.
    """
    if recipe.data.packing is False:
        return recipe
    obstacle = packing_obstacle(config, device)
    if recipe.data.packing:
        if obstacle is None:
            return recipe
        raise LoraError(
            f"data.packing: rows would not stay separate in {config.model_type}: {obstacle}",
            hint="set data.packing: false, or remove it",
        )
    if obstacle is not None:
        info(f"packing: off, because rows would not stay separate in {config.model_type}: {obstacle}")
    return recipe.with_packing(obstacle is None)


def with_recorded_date(recipe: Recipe) -> Recipe:
    """Return the recipe with the date that its chat template wrote in the run of its output folder, if it has one."""
    if recipe.data.template_date is not None:
        return recipe
    run = Path(recipe.output)
    with suppress(LoraError):  # damaged, or of another version
        if (run / "recipe.yaml").is_file():
            return with_date(recipe, load_recipe(run / "recipe.yaml").data.template_date)
    for checkpoint in reversed(list_checkpoints(run / "checkpoints")):  # each has the date too
        with suppress(LoraError):
            recorded = read_json_object(checkpoint / TRAINED_ON_FILE).get("template_date")
            return with_date(recipe, recorded if isinstance(recorded, str) else None)
    return recipe


def with_date(recipe: Recipe, day: str | None) -> Recipe:
    """Return the recipe with the date that its chat template writes, as 2026-01-31."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"template_date": day})})


def _check_token_ids(
    data: PreparedData, tokenizer: PreTrainedTokenizerBase, embeddings: int, *, targets: bool, hint: str
) -> None:
    """Raise if a row has a token without one of the model's `embeddings`, as with the tokenizer of another model.

    With `targets`, labels are tokens that the input need not have.
    """
    if max(tokenizer.get_vocab().values(), default=0) < embeddings:
        return  # a tokenizer may have tokens that no row has, such as one for padding
    for rows in (data.train, data.eval):
        for row in rows or ():
            largest = max(int(row.input_ids.max()), int(row.labels.max()) if targets else 0)
            if largest >= embeddings:
                token = tokenizer.convert_ids_to_tokens(largest)
                raise LoraError(
                    f"{row.where}: the token {token!r} has the id {largest:,}, but the model has embeddings for "
                    f"{embeddings:,}",
                    hint=hint,
                )


def _pad_id(tokenizer: PreTrainedTokenizerBase, embeddings: int | None) -> int:
    """Return a token id to pad with: the tokenizer's own if it has one, and the model an embedding for it.

    Any id works, because padding is masked and carries no loss.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int) and (embeddings is None or candidate < embeddings):
            return candidate
    return 0


def _check_task(config: PretrainedConfig, recipe: Recipe) -> None:
    """Raise if transformers has no class of this architecture for the task; the config alone shows it."""
    if config.model_type in PREFIX_MODELS and recipe.task == "causal-lm":
        raise LoraError(
            f"task: {config.model_type} reads its prompt in both directions, and causal-lm trains from left to right",
            hint="give a causal model",
        )
    if is_supported(config, recipe.task):
        return
    others = [name for name in TASKS if is_supported(config, name)]
    raise LoraError(
        f"task: transformers has no {config.model_type} model for {recipe.task}",
        hint=f"write task: {' or '.join(others)}, or give another model" if others else "give another model",
    )


def _check_max_length(config: PretrainedConfig, data: DataSpec, *, virtual: int) -> None:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and config.model_type in MODELS_WITH_POSITION_OFFSET:
        limit -= config.pad_token_id + 1
    if limit is not None and data.max_length + virtual > limit:
        plus = f" and {virtual} virtual tokens" if virtual else ""
        raise LoraError(
            f"data.max_length: {data.max_length:,} tokens{plus}, but the model has positions for {limit:,}",
            hint=f"at most {limit - virtual}",
        )


def _check_text_pairs(data: PreparedData, config: PretrainedConfig) -> None:
    """Raise if rows differ in their number of end tokens: such a model reads the class at the last end token."""
    counts: dict[int, str] = {}
    for rows in (data.train, data.eval):
        for row in rows or ():
            counts.setdefault(int((row.input_ids == config.eos_token_id).sum()), row.where)
            if len(counts) > 1:
                first, second = counts.values()
                raise LoraError(
                    f"{first} and {second}: only one of them has a text_pair, and a {config.model_type} model cannot "
                    "read both in one batch",
                    hint="give all rows a text_pair, or none",
                )


def _check_attention(name: str) -> None:
    known = sorted(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in key and key not in OWN_ATTENTION)
    # A name with a slash is a kernel of the hub, which is looked up when the model is loaded.
    if name not in ("auto", "eager", *known) and "/" not in name:
        raise LoraError(f"model.attention: {name} is not known", hint=f"use one of auto, eager, {', '.join(known)}")
    if not FLASH_AVAILABLE.get(name, lambda: True)():
        raise LoraError(
            f"model.attention: {name} needs its package, which is not installed or does not work here",
            hint="write auto, or install the package that fits your GPU and torch",
        )


def batch_plan(recipe: Recipe, inputs: RunInputs, rows: EncodedDataset, *, processes: int) -> BatchPlan:
    """Plan the steps of training on `rows` by `processes`, with packing and batches of the recipe, `inputs.recipe`.

    The rows of a step are the same for any number of processes if the recipe gives their tokens or number; otherwise
    each process adds `gradient_accumulation` batches. With `tokens_per_batch: auto`, the batches of a step on one
    device are joined.

    Raises:
        LoraError: a step has fewer rows than there are processes, or the config of a seq2seq model has no
            decoder_start_token_id.
    """
    training, packing = recipe.training, bool(recipe.data.packing)
    count, per_step = training.gradient_accumulation, training.tokens_per_step if packing else training.rows_per_step
    join = packing and training.tokens_per_batch == "auto"
    size = _batch_size(recipe)
    batches = processes * count if per_step is None else per_step // size
    if join and per_step is not None:
        size = per_step // batches  # a step need not be a multiple of max_length
    if not packing and batches * size < processes:
        raise LoraError(
            f"training.rows_per_step: {batches * size} rows cannot be divided among {processes} processes",
            hint=f"write at least {processes}, or distributed.processes: {batches * size}",
        )
    return _plan(recipe, inputs, rows, size=size, batches_per_step=batches, processes=processes, join=join)


def evaluation_plan(recipe: Recipe, inputs: RunInputs, rows: EncodedDataset) -> BatchPlan:
    """Plan the batches of an evaluation on `rows`: those of training, none of them joined.

    Raises:
        LoraError: the config of a seq2seq model has no decoder_start_token_id.
    """
    return _plan(recipe, inputs, rows, size=_batch_size(recipe), batches_per_step=1, processes=1)


def _batch_size(recipe: Recipe) -> int:
    """Return the tokens of a batch with packing, the rows without; max_length where the size is auto."""
    training = recipe.training
    size = training.tokens_per_batch if recipe.data.packing else training.batch_size
    assert size is not None  # the schema fills in the one that packing uses
    return recipe.data.max_length if size == "auto" else size


def _plan(
    recipe: Recipe,
    inputs: RunInputs,
    rows: EncodedDataset,
    *,
    size: int,
    processes: int,
    batches_per_step: int,
    join: bool = False,
) -> BatchPlan:
    """Return the plan of batches of `size`.

    Raises:
        LoraError: the config of a seq2seq model has no decoder_start_token_id.
    """
    packing = bool(recipe.data.packing)
    assert inputs.base.pad_id is not None
    return BatchPlan(
        rows,
        packing=packing,
        size=size,
        batches_per_step=batches_per_step,
        seed=recipe.training.seed,
        pad_id=inputs.base.pad_id,
        collate=collate_for(inputs.base, packing=packing),
        join=join,
        processes=processes,
    )


def collate_for(base: BaseCheckpoint, *, packing: bool) -> Collate:
    """Return the function that makes batches of the base's task.

    Raises:
        LoraError: the config of a seq2seq model has no decoder_start_token_id.
    """
    match base.task:
        case "seq-cls":
            return collate_sequence_classification
        case "token-cls":
            return collate_token_classification
        case "seq2seq-lm":
            start = base.config.decoder_start_token_id
            if start is None:
                raise LoraError(
                    "model.path: its config has no decoder_start_token_id, the token that a decoder starts with",
                    hint="add it to the model's config.json",
                )
            return partial(collate_seq2seq, start_id=start)
        case _:
            return collate_packed if packing else collate_padded
