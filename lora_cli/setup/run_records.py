"""What a run records of itself: manifest.json, trained_on.json, and the settings that a resumed run must share."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from peft import PeftModel

from lora_cli.data.batches import BatchPlan
from lora_cli.data.chat_templates import shared_variables
from lora_cli.model.model_source import fingerprint, hub_commit
from lora_cli.model.trained_on import TrainedOn
from lora_cli.recipe.field_types import Section
from lora_cli.recipe.schema import AdapterSpec, Recipe
from lora_cli.recipe.training_section import TrainingSpec
from lora_cli.setup.inputs import RunInputs
from lora_cli.setup.training_model import TrainableModel
from lora_cli.training.best_step import EvaluationHistory

# Keys of the training section that a resumed run may change. They do not change what a step computes.
NO_EFFECT_ON_STEPS = {
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "log_every",
    "gradient_accumulation",
    "stop_after",
    "answer_every",
    "answer_prompts",
}
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "bitsandbytes", "lora-cli")


def trained_on(recipe: Recipe, inputs: RunInputs, model: PeftModel, built: TrainableModel, *, step: int) -> TrainedOn:
    """Return the record of the base that the adapter of `step` was trained on, and of the adapters before it."""
    spec, base = recipe.quantization, inputs.base
    return TrainedOn(
        commit=hub_commit(base.source),
        fingerprint=fingerprint(base.source),
        architecture=type(model.get_base_model()).__name__,
        dtype=str(base.dtype).removeprefix("torch."),
        quantization=spec.model_dump(mode="json") if spec else None,
        prompts=inputs.data.ledger.prompt_kind() if recipe.task == "causal-lm" else None,
        template_variables=shared_variables(recipe.data),
        template_date=inputs.template_date,
        step=step,
        origins=built.origins,
    )


def resume_state(
    recipe: Recipe, inputs: RunInputs, plan: BatchPlan, built: TrainableModel, *, total: int
) -> dict[str, Any]:
    """Return the settings that must be unchanged, so that a resumed run equals the uninterrupted one."""
    base, data = inputs.base, inputs.data
    return {
        "total_steps": total,
        "batches_per_step": plan.batches_per_step,
        "data": data.fingerprint,
        "model": fingerprint(base.source),
        "dtype": str(base.dtype).removeprefix("torch."),
        "attention": built.model.get_base_model().config._attn_implementation,
        "training": recipe.training.model_dump(mode="json", exclude=NO_EFFECT_ON_STEPS),
        "task": recipe.task,
        "labels": data.labels and list(data.labels.names),
        "optimizer": built.optimizer,
        "adapter": recipe.adapter.model_dump(mode="json"),
        "origins": [dict(origin) for origin in built.origins],
        "quantization": recipe.quantization and recipe.quantization.model_dump(mode="json"),
    }


def resume_defaults() -> dict[str, Any]:
    """Return the values of `resume_state` that a checkpoint of an earlier version does not have: those before them."""
    sections: dict[str, type[Section]] = {"training": TrainingSpec, "adapter": AdapterSpec}
    defaults: dict[str, Any] = {
        key: {field.alias or name: field.default for name, field in section.model_fields.items()}
        for key, section in sections.items()
    }
    return {**defaults, "origins": []}


def manifest(recipe: Recipe, inputs: RunInputs, built: TrainableModel, *, total: int) -> dict[str, Any]:
    """Return the contents of manifest.json before training; `result` is added to it at the end."""
    data = inputs.data
    base = trained_on(recipe, inputs, built.model, built, step=0)._asdict()
    del base["step"]
    origins = base.pop("origins")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "base": {"path": recipe.model.path, "revision": recipe.model.revision, **base},
        "origins": origins,
        "device": inputs.device.type,
        "seed": recipe.training.seed,
        "steps": total,
        "trainable_parameters": built.trainable,
        "task": recipe.task,
        "labels": data.labels and data.labels._asdict(),
        "optimizer": built.optimizer,
        "packing_proof": built.leak_check._asdict() if built.leak_check else None,
        "data_fingerprint": data.fingerprint,
        "ledger": data.ledger.to_json(),
    }


def results(
    records: Sequence[Mapping[str, Any]], history: EvaluationHistory, *, steps: Mapping[str, int]
) -> dict[str, dict[str, float | None]]:
    """Return loss and accuracy of evaluated steps.

    Args:
        records: of the metrics log, which alone has the accuracies; a damaged log may lack some.
        history: of the run, whose losses are saved in its checkpoints.
        steps: by name: "base" and "adapter", for example.

    Returns:
        By name, for the steps that were evaluated.
    """
    losses = {r["step"]: r["eval_loss"] for r in records if isinstance(r.get("eval_loss"), float)}
    losses |= {evaluated.step: evaluated.loss for evaluated in history.evaluations}
    accuracies = {r["step"]: r["eval_accuracy"] for r in records if isinstance(r.get("eval_accuracy"), float)}
    return {
        name: {"loss": losses[step], "accuracy": accuracies.get(step)} for name, step in steps.items() if step in losses
    }
