"""What a run records of itself: manifest.json, trained_on.json, and the settings that a resumed run must share."""

import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftModel

from lora_cli.data.batches import BatchPlan
from lora_cli.data.chat_templates import shared_variables
from lora_cli.model.model_source import fingerprint, hub_commit
from lora_cli.model.trained_on import TrainedOn
from lora_cli.recipe.dump import dump_recipe
from lora_cli.recipe.field_types import Section
from lora_cli.recipe.schema import AdapterSpec, Recipe
from lora_cli.recipe.training_section import TrainingSpec
from lora_cli.run import atomic, metrics_log
from lora_cli.run.folder import RunFolder
from lora_cli.run.read_file import read_json_object, read_text
from lora_cli.run.set_aside import set_aside_damaged
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


def write_records(run: RunFolder, recipe: Recipe, manifest: dict[str, Any], *, info: Callable[[str], None]) -> None:
    """Write recipe.yaml and manifest.json of a run; what is damaged or in their place is reported and set aside.

    Raises:
        OSError: they cannot be written.
    """
    set_aside_damaged(run.recipe, read_text, info=info)
    set_aside_damaged(run.manifest, read_json_object, info=info)
    atomic.write_text(run.recipe, dump_recipe(recipe))
    atomic.write_json(run.manifest, manifest)


def results(metrics: Path, recipe: Recipe, history: EvaluationHistory, *, step: int) -> dict[str, dict[str, Any]]:
    """Return loss and accuracy before training and of the adapter of `step`; empty without evaluation rows.

    The losses are those of `history`, which is saved in the checkpoints. Only the metrics log has the accuracies: they
    are None where a damaged log lacks them.
    """
    records = metrics_log.read_metrics(metrics)
    losses = {r["step"]: r["eval_loss"] for r in records if isinstance(r.get("eval_loss"), float)}
    losses |= {evaluated.step: evaluated.loss for evaluated in history.evaluations}
    accuracies = {r["step"]: r["eval_accuracy"] for r in records if isinstance(r.get("eval_accuracy"), float)}
    steps = {"before" if recipe.adapter.source else "base": 0, "adapter": step}
    return {
        name: {"loss": losses[number], "accuracy": accuracies.get(number)}
        for name, number in steps.items()
        if number in losses
    }
