"""What a run records of itself: manifest.json, trained_on.json, and in each checkpoint, what resume compares."""

import hashlib
import json
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import psutil
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lora_cli.data.batches import BatchPlan
from lora_cli.data.chat_templates import shared_variables
from lora_cli.data.dataset import EncodedDataset, show_mask
from lora_cli.data.label_mask import spans_of_labels
from lora_cli.errors import LoraError
from lora_cli.model.model_source import fingerprint, hub_commit
from lora_cli.model.trained_on import DtypeName, TrainedOn
from lora_cli.recipe.dump import dump_recipe
from lora_cli.recipe.schema import Recipe
from lora_cli.run import atomic, metrics_log
from lora_cli.run.folder import RunFolder
from lora_cli.run.read_file import read_json_object, read_text
from lora_cli.run.redact import redact_path
from lora_cli.run.set_aside import set_aside_damaged
from lora_cli.run.shell import shell_path
from lora_cli.setup.inputs import RunInputs
from lora_cli.setup.tracked_run import write_tracked_config
from lora_cli.setup.training_model import TrainableModel, resolve_optimizer
from lora_cli.training.best_step import EvaluationHistory
from lora_cli.training.loss_scale import LossScale
from lora_cli.training.loss_spikes import LossSpikes
from lora_cli.training.memory_ladder import MemoryLadder
from lora_cli.training.model_card import render_model_card

# Libraries whose versions can change a result, within rounding; numpy shuffles the rows.
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "bitsandbytes",
    "numpy",
    "lora-cli",
)


def trained_on(recipe: Recipe, inputs: RunInputs, model: PeftModel, built: TrainableModel, *, step: int) -> TrainedOn:
    """Return the record of the base that the adapter of `step` was trained on, and of the adapters before it."""
    spec, base = recipe.quantization, inputs.base
    return TrainedOn(
        commit=hub_commit(base.source),
        fingerprint=fingerprint(base.source),
        architecture=type(model.get_base_model()).__name__,
        dtype=cast(DtypeName, str(base.dtype).removeprefix("torch.")),
        quantization=spec.model_dump(mode="json") if spec else None,
        prompts=inputs.data.ledger.prompt_kind() if recipe.task == "causal-lm" else None,
        template_variables=shared_variables(recipe.data),
        template_date=inputs.template_date,
        step=step,
        origins=built.origins,
    )


def describe_results(run: RunFolder, recipe: Recipe, history: EvaluationHistory, *, step: int) -> list[str]:
    """Return lines on the adapter of `step` for the end of a run: its loss, and what to do before it is published."""
    losses = [result["loss"] for result in results(run.metrics, recipe, history, step=step).values()]
    if len(losses) != 2:
        return _publishing_notes(recipe)
    before, after = losses
    return [f"eval loss {before:.4f} -> {after:.4f} ({after / before - 1:+.1%})", *_publishing_notes(recipe)]


def model_card(
    run: RunFolder, recipe: Recipe, inputs: RunInputs, history: EvaluationHistory, *, step: int, steps_done: int
) -> str:
    """Return the model card of the adapter of `step`, after `steps_done` steps of the run."""
    return render_model_card(
        recipe,
        recipe_text=dump_recipe(recipe),
        ledger=inputs.data.ledger.to_json(),
        results=results(run.metrics, recipe, history, step=step),
        step=step,
        steps_done=steps_done,
    )


def _publishing_notes(recipe: Recipe) -> list[str]:
    """Return what to do before the adapter is published, if its configuration names a base of this machine."""
    if not Path(os.path.expanduser(recipe.model.path)).exists():
        return []
    return [
        f"note: adapter_config.json names the base by a local path, {redact_path(recipe.model.path)}; to publish it, "
        f"give the base's hub id: lora export {shell_path(recipe.output)} --to peft --base ORG/NAME --out FOLDER"
    ]


def resume_state(
    recipe: Recipe, inputs: RunInputs, plan: BatchPlan, *, total: int, strategy: Literal["ddp", "fsdp", "hsdp"]
) -> dict[str, Any]:
    """Return what a checkpoint records of its run, as JSON, before the model is built: see `setup/resume.py`.

    Args:
        recipe: of the run, resolved.
        inputs: of the run.
        plan: of its batches, divided among all processes.
        total: optimizer steps of the run.
        strategy: how it is spread over its processes.
    """
    base, data = inputs.base, inputs.data
    template = json.dumps(base.tokenizer.chat_template)
    machine: dict[str, Any] = {"device": inputs.device.type, "processes": plan.processes, "strategy": strategy}
    if inputs.device.type == "cpu":
        machine |= {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}
    elif inputs.device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(inputs.device)
    return {
        "recipe": recipe.model_dump(mode="json"),
        "total_steps": total,
        "batches_per_step": plan.batches_per_step,
        "batch_size": plan.size,
        "data": data.fingerprint,
        "sources": [
            {"source": e.source, "split": e.split, "content": e.content, "read": e.tally.read, "kept": e.tally.kept}
            for e in data.ledger.entries
        ],
        "template": hashlib.blake2b(template.encode(), digest_size=16).hexdigest(),
        "labels": data.labels and list(data.labels.names),
        "model": fingerprint(base.source),
        "model_is_local": Path(recipe.model.path).exists(),
        "dtype": str(base.dtype).removeprefix("torch."),
        "optimizer": resolve_optimizer(recipe, inputs),
        "versions": _versions(),
        "machine": machine,
    }


def model_state(built: TrainableModel) -> dict[str, Any]:
    """Return what a checkpoint records of the model that was built, as JSON."""
    return {
        "attention": built.model.get_base_model().config._attn_implementation,
        "origins": [dict(origin) for origin in built.origins],
    }


def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def manifest(
    run: RunFolder, recipe: Recipe, inputs: RunInputs, built: TrainableModel, *, state: dict[str, Any]
) -> dict[str, Any]:
    """Return the contents of manifest.json before training; `result` is added to it at the end.

    Args:
        run: to be trained; it has the manifest of the process before this one, if it is continued.
        recipe: of the run, resolved.
        inputs: of the run.
        built: its model.
        state: that of `resume_state`.
    """
    data = inputs.data
    base = trained_on(recipe, inputs, built.model, built, step=0)._asdict()
    del base["step"]
    origins = base.pop("origins")
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "base": {"path": recipe.model.path, "revision": recipe.model.revision, **base},
        "origins": origins,
        "device": inputs.device.type,
        "machine": {**state["machine"], **_describe_machine()},
        "command": run.arguments,
        "recipe_file": _recipe_file(run),
        "seed": recipe.training.seed,
        "steps": state["total_steps"],
        "trainable_parameters": built.trainable,
        "task": recipe.task,
        "labels": data.labels and data.labels._asdict(),
        "optimizer": built.optimizer,
        "performance": built.performance,
        "packing_proof": built.leak_check._asdict() if built.leak_check else None,
        "data_fingerprint": data.fingerprint,
        "ledger": data.ledger.to_json(),
        "label_mask": label_mask_rows(data.train, inputs.base.tokenizer) if recipe.task == "causal-lm" else None,
        "coverage": built.coverage.to_json(),
        "changes": state.get("changes", []),
    }


def describe_parts(
    history: EvaluationHistory, spikes: LossSpikes, ladder: MemoryLadder, scale: LossScale
) -> dict[str, Any]:
    """Return what the manifest records of the parts of a finished run."""
    return {
        "evaluations": history.to_json(),
        "loss_spikes": {"count": spikes.count, "skipped": spikes.skipped},
        "memory": ladder.to_json(),
        "loss_scale": scale.to_json(),
    }


def _describe_machine() -> dict[str, Any]:
    """Return what can explain a difference in speed: platform, cores of this process, memory in bytes."""
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total
    return {"platform": platform.platform(), "cores": cores, "memory": memory}


def _recipe_file(run: RunFolder) -> str | None:
    """Return the name of the recipe that the run was started with; None if it is unknown.

    A run is often continued with its own recipe.yaml, which says nothing: then it is the name recorded before.
    """
    name = next((Path(each).name for each in run.arguments if each.endswith((".yaml", ".yml"))), None)
    if name in (None, run.recipe.name):
        with suppress(LoraError):
            recorded = read_json_object(run.manifest).get("recipe_file")
            name = recorded if isinstance(recorded, str) else name
    return name


MASK_ROWS, MASK_TOKENS = 3, 200  # that the manifest has, of the first rows


def label_mask_rows(rows: EncodedDataset, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Return the first rows for manifest.json: the texts of their tokens, and the spans that carry loss.

    A span is the number of its first token, from 0, and of the token after its last. Long rows are cut.

    The manifest has them because the report of a run must not need the rows, the tokenizer and torch.
    """
    records = []
    for row in (rows[number] for number in range(min(MASK_ROWS, len(rows)))):
        texts = [text for text, _ in show_mask(row, tokenizer)][:MASK_TOKENS]
        spans = [
            [start, min(stop, len(texts))] for start, stop in spans_of_labels(row.labels.tolist()) if start < len(texts)
        ]
        left_out = len(row.input_ids) - len(texts)
        records.append({"where": row.where, "tokens": texts, "loss": spans, "left_out": left_out})
    return records


def write_records(run: RunFolder, recipe: Recipe, manifest: dict[str, Any], *, info: Callable[[str], None]) -> None:
    """Write recipe.yaml and manifest.json of a run; what is damaged or in their place is reported and set aside.

    With trackers, what they get of both is written too.

    Raises:
        OSError: they cannot be written.
    """
    set_aside_damaged(run.recipe, read_text, info=info)
    set_aside_damaged(run.manifest, read_json_object, info=info)
    atomic.write_text(run.recipe, dump_recipe(recipe))
    atomic.write_json(run.manifest, manifest)
    write_tracked_config(run, recipe, manifest)


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
