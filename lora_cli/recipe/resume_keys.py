"""What a change of each recipe key means for a run that is resumed: refused, checked, or applied and told. No torch.

The law: a run that is resumed with a changed recipe equals the uninterrupted run of the changed recipe, up to rounding
where that is said. So a key that steps already taken depend on is refused, unless what it stands for is the same.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from lora_cli.recipe.problem import shorten
from lora_cli.recipe.schema import Recipe, SourceSpec
from lora_cli.recipe.tracking_section import TrackingSpec

Effect = Literal[
    "learned",  # another value learns something else: refused
    "rates",  # applied if the learning rates of the steps done are the same with the new value
    # Applied if this value of the checkpoint's state.json, which the run resolves the key to, is the same:
    "data",  # the encoded rows of train and eval
    "model",  # the weights of the base
    "dtype",
    "optimizer",
    "batches_per_step",
    "origins",  # the adapters that training goes on from
    "rounding",  # applied: another order of the same sums
    "none",  # applied: no effect on what is learned
    "place",  # where the run is
]

_SOURCE_KEYS = (
    "path",
    "subset",
    "split",
    "format",
    "weight",
    "max_rows",
    "delimiter",
    "columns",
    "message_fields",
    "roles",
    "template_variables",
)
# Every key of the recipe.
RESUME_EFFECTS: dict[str, Effect] = {
    "model.path": "model",
    "model.revision": "model",
    "model.dtype": "dtype",
    "model.attention": "rounding",
    "model.trust_remote_code": "learned",  # another implementation
    "model.gguf": "learned",  # weights in another dtype
    "model.new_tokens": "learned",
    "task": "learned",
    "quantization": "learned",  # the whole section, which one recipe may leave out
    "quantization.bits": "learned",
    "quantization.type": "learned",
    "quantization.double_quant": "learned",
    "quantization.compute_dtype": "learned",
    "quantization.storage_dtype": "none",  # the same bits in tensors of another dtype
    "adapter.method": "learned",
    "adapter.from": "origins",
    "adapter.rank": "learned",
    "adapter.alpha": "learned",
    "adapter.dropout": "learned",
    "adapter.target_modules": "learned",
    "adapter.exclude_modules": "learned",
    "adapter.layers": "learned",
    "adapter.rank_pattern": "learned",
    "adapter.alpha_pattern": "learned",
    "adapter.bias": "learned",
    "adapter.modules_to_save": "learned",
    "adapter.trainable_tokens": "learned",
    "adapter.freeze_a": "learned",
    "adapter.lr_ratio": "learned",
    "adapter.final_rank": "learned",
    "adapter.feedforward_modules": "learned",
    "adapter.rotation_size": "learned",
    "adapter.butterflies": "learned",
    "adapter.virtual_tokens": "learned",
    "adapter.init_text": "learned",
    "adapter.hidden_size": "learned",
    "data.train": "data",
    **dict.fromkeys((f"data.train.{key}" for key in _SOURCE_KEYS), "data"),
    "data.eval": "data",  # the losses of other rows would be compared with those so far
    **dict.fromkeys((f"data.eval.{key}" for key in _SOURCE_KEYS), "data"),
    "data.format": "data",
    "data.columns": "data",
    "data.message_fields": "data",
    "data.roles": "data",
    "data.chat_template": "data",
    "data.template_variables": "data",
    "data.template_date": "data",
    "data.loss_on": "data",
    "data.max_length": "data",
    "data.overlong": "data",
    "data.stride": "data",
    "data.on_bad_row": "data",
    "data.merge_turns": "data",
    "data.dedup": "data",
    "data.max_loss": "data",
    "data.packing": "learned",  # other batches
    "data.labels": "data",
    "training.epochs": "rates",
    "training.max_steps": "rates",
    "training.tokens_per_batch": "learned",
    "training.batch_size": "learned",
    "training.gradient_accumulation": "batches_per_step",
    "training.tokens_per_step": "batches_per_step",
    "training.rows_per_step": "batches_per_step",
    "training.learning_rate": "rates",
    "training.min_learning_rate": "rates",
    "training.schedule": "rates",
    "training.cycles": "rates",
    "training.decay": "rates",
    "training.warmup": "rates",
    "training.optimizer": "optimizer",
    "training.adam_beta1": "learned",
    "training.adam_beta2": "learned",
    "training.weight_decay": "learned",
    "training.max_grad_norm": "learned",
    "training.label_smoothing": "learned",
    "training.neftune_alpha": "learned",
    "training.gradient_checkpointing": "rounding",
    "training.on_spike": "none",  # a decision on the steps that follow, which a spike may have caused
    "training.seed": "learned",
    "training.eval_every": "none",
    "training.save_every": "none",
    "training.keep_checkpoints": "none",
    "training.keep": "learned",  # which adapter is the result; the losses of rows so far are not saved for it
    "training.stop_after": "none",
    "training.answer_every": "none",
    "training.answer_prompts": "none",
    "training.log_every": "none",
    "generation.num_beams": "none",
    "generation.length_penalty": "none",
    "generation.temperature": "none",
    "generation.top_p": "none",
    "generation.no_repeat_ngram": "none",
    "generation.max_new_tokens": "none",
    "distributed.strategy": "rounding",
    "distributed.cpu_offload": "none",
    "distributed.processes": "batches_per_step",
    "distributed.timeout_minutes": "none",
    "performance.kernels": "rounding",
    "performance.compile": "rounding",
    "performance.deterministic": "rounding",
    "tracking": "none",  # the whole section, which one recipe may leave out
    **dict.fromkeys((f"tracking.{key}" for key in TrackingSpec.model_fields), "none"),
    "output": "place",
}
# Keys that the base or the rows decide on if the recipe leaves them out: they are compared after that.
# With the value that leaves them open.
FILLED_IN: dict[str, str | None] = {
    **dict.fromkeys(("data.packing", "data.template_date", "training.tokens_per_batch", "training.batch_size")),
    "quantization.compute_dtype": "auto",
}
SECTIONS = {key.partition(".")[0] for key in RESUME_EFFECTS if "." in key}
SOURCES = ("data.train", "data.eval")
VALUE_SHOWN = 200  # characters of a value in a diff


class Change(NamedTuple):
    """A key whose value differs between the checkpoint and the recipe."""

    key: str  # dotted, such as `data.train[0].path`
    before: Any  # as in JSON
    after: Any
    effect: Effect

    def line(self) -> str:
        """Return `training.seed: 1 -> 2`."""
        return f"{self.key.removesuffix('[0].path')}: {show_value(self.before)} -> {show_value(self.after)}"


def show_value(value: object) -> str:
    """Return a value of a recipe as text for a diff."""
    return shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), VALUE_SHOWN)


def find_changes(saved: Recipe, recipe: Recipe) -> list[Change]:
    """Return the keys of `recipe` that differ from those of a checkpoint, in the order of RESUME_EFFECTS."""
    before, after = (dict(_flatten(_list_sources(each.model_dump(mode="json")))) for each in (saved, recipe))
    changes = [
        Change(key, before.get(key), after.get(key), effect_of(key))
        for key in before.keys() | after.keys()
        if before.get(key) != after.get(key)
    ]
    order = list(RESUME_EFFECTS)
    return sorted(changes, key=lambda change: (order.index(_without_index(change.key)), change.key))


def effect_of(key: str) -> Effect:
    """Return the effect of a dotted key, such as `data.train[0].path`.

    Raises:
        KeyError: RESUME_EFFECTS does not have the key.
    """
    return RESUME_EFFECTS[_without_index(key)]


def _without_index(key: str) -> str:
    return re.sub(r"\[\d+\]", "", key)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a recipe, as in JSON, by dotted key."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key in SECTIONS:
            yield from _flatten(value, f"{key}.")
        elif isinstance(value, list) and key in SOURCES:
            for index, source in enumerate(value):
                yield from _flatten(source, f"{key}[{index}].")
        else:
            yield key, value


def _list_sources(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe, as in JSON, with a path of rows written as a source with defaults."""
    data = dict(tree["data"])
    for key in ("train", "eval"):
        if isinstance(data[key], str):
            data[key] = [SourceSpec(path=data[key]).model_dump(mode="json")]
    return {**tree, "data": data}
