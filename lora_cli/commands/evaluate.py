"""`lora eval`: measure base, adapters and merged models side by side on held-out rows, with the base loaded once."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lora_cli.data.batches import BatchPlan
from lora_cli.data.class_labels import LABELS_FILE, ClassLabels
from lora_cli.data.dataset import EncodedDataset
from lora_cli.data.ledger import PromptKind
from lora_cli.errors import LoraError
from lora_cli.evaluation import answers, report
from lora_cli.evaluation.answers import GenerationOptions, Prompt
from lora_cli.evaluation.classification_metrics import compute_classification_metrics, missing_packages
from lora_cli.evaluation.likelihood import RowLikelihoods, measure_row_likelihoods
from lora_cli.evaluation.predict import predict
from lora_cli.evaluation.report import ModelResult
from lora_cli.model.adapter_files import AdapterFiles, open_adapter
from lora_cli.model.base_model import BaseCheckpoint
from lora_cli.model.fp32_weights import upcast_trainable_params
from lora_cli.model.load_adapter import NamedAdapters, load_adapters
from lora_cli.model.loss import LossFunction
from lora_cli.model.model_source import find_model, load_config, load_tokenizer
from lora_cli.model.save_adapter import ADAPTER_WEIGHTS
from lora_cli.model.saved_adapter import CPU, labels_of_head
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import DataSpec, Recipe
from lora_cli.run import atomic, console
from lora_cli.run.checksums import checksum
from lora_cli.run.folder import BASE, CONFIG_FILE, recipe_of_adapter
from lora_cli.run.redact import redact_path
from lora_cli.setup.adapter_folders import find_adapter, is_model_folder, parse_named_folder
from lora_cli.setup.check_bases import check_bases
from lora_cli.setup.inputs import RunInputs, evaluation_plan, load_inputs, with_recorded_date
from lora_cli.setup.training_model import load_base, prepare_base
from lora_cli.training import cpu


class Target(NamedTuple):
    """The recipe, adapters and models that the command line names."""

    recipe: Recipe
    adapters: dict[str, AdapterFiles]  # by the displayed name
    models: dict[str, Path]  # full models, such as merged ones


def evaluate(
    target: str,
    *,
    adapters: Sequence[str],
    data: str | None,
    options: GenerationOptions,
    other_base: bool = False,
) -> dict[str, Any]:
    """Print a table of base, adapters and merged models, and the answers of each; return the figures for JSON.

    Args:
        target: a recipe, run folder or adapter folder.
        adapters: further adapters or merged models, `DIR` or `NAME=DIR`.
        data: rows in place of the recipe's evaluation rows.
        options: of generated answers and lm-eval tasks.
        other_base: whether the base may have other weights than those that an adapter was trained on.

    Raises:
        LoraError: a recipe, run, adapter, model or folder does not exist, or they do not fit together.
    """
    options.check()
    resolved = _resolve_target(Path(target), adapters)
    recipe = resolved.recipe
    if options.tasks and TASKS[recipe.task].is_classification:
        raise LoraError(f"--tasks: the harness needs language models, not {recipe.task}", hint="leave it out")
    _check_single_bias(resolved.adapters)
    trained_labels = _common_labels(resolved.adapters, recipe)
    spec = _data_spec(recipe, data, trained_labels)
    train_key = "data.train" if data is None else data
    inputs = load_inputs(recipe, info=console.info, data=spec, train_key=train_key)
    recipe = inputs.recipe
    rows = inputs.data.train if data is not None else inputs.data.eval
    if rows is None:
        raise LoraError(
            f"{target}: its recipe has no evaluation rows (data.eval is null)", hint="name rows with --data FILE"
        )
    if inputs.device.type == "cpu":
        cpu.set_up_cpu()
    _check_labels(inputs.data.labels, trained_labels, data or "data.eval")
    if recipe.task == "causal-lm":
        kind = inputs.data.ledger.prompt_kind("train" if data is not None else "eval")
        _tell_other_prompts(kind, resolved.adapters, data or "data.eval")
    evaluation = Evaluation(recipe, inputs, rows, options)
    for name, files in resolved.adapters.items():
        evaluation.weights[name] = checksum(files.folder / ADAPTER_WEIGHTS, sha256=True).sha256
    with check_bases(resolved.adapters.values(), inputs.base, allowed=other_base):
        base = load_base(recipe, inputs, info=console.info).model
    base.eval()
    # Before any adapter is loaded: an adapter's trained biases stay in the base when the adapter is disabled.
    evaluation.measure(BASE, base)
    if resolved.adapters:
        adapted = _load_adapters(base, resolved.adapters, base_path=recipe.model.path)
        for name in resolved.adapters:
            adapted.activate(name)
            evaluation.measure(name, adapted.model)
        del adapted
    del base
    for name, folder in resolved.models.items():
        evaluation.measure(name, _load_full_model(recipe, inputs, folder))
    evaluation.print_results()
    return evaluation.to_json()


class Evaluation:
    """Measures one model after another on the same rows and prompts, and keeps the results."""

    def __init__(self, recipe: Recipe, inputs: RunInputs, rows: EncodedDataset, options: GenerationOptions) -> None:
        """`rows` are those of `inputs` to measure on."""
        self.recipe, self.rows, self.options = recipe, rows, options
        self.tokenizer, self.labels = inputs.base.tokenizer, inputs.data.labels
        self.plan: BatchPlan = evaluation_plan(recipe, inputs, rows)
        self.prompts: list[Prompt] = answers.select_prompts(
            rows, options.prompts, tokenizer=self.tokenizer, task=recipe.task, loss_on=recipe.data.loss_on
        )
        self.results: dict[str, ModelResult] = {}
        self.weights: dict[str, str | None] = {}  # SHA-256 of each adapter's, by which `lora report` knows its run

    def measure(self, name: str, model: PeftModel | PreTrainedModel) -> None:
        """Measure `model`, and keep the result under `name`.

        Raises:
            LoraError: a loss is not finite.
        """
        console.info(f"measuring {name} on {len(self.rows):,} rows")
        loss_fn = LossFunction(model, task=self.recipe.task)
        likelihoods = measure_row_likelihoods(loss_fn, self.plan)
        self._check_finite(name, likelihoods)
        metrics: dict[str, float] = {}
        if self.labels and not missing_packages():
            metrics = compute_classification_metrics(predict(loss_fn, self.plan, self.labels))
        result = ModelResult(likelihoods, metrics)
        if self.prompts:
            console.info(f"answering {len(self.prompts):,} prompts")
            spec, seed = self.recipe.generation, self.recipe.training.seed
            generated = answers.generate_answers(model, self.tokenizer, self.prompts, spec=spec, seed=seed)
            result = result._replace(answers=generated)
        if self.options.tasks:
            console.info(f"{name} on {', '.join(self.options.tasks)}")
            result = result._replace(tasks=answers.run_lm_eval(model, self.tokenizer, self.options))
        self.results[name] = result

    def _check_finite(self, name: str, likelihoods: RowLikelihoods) -> None:
        wrong = np.flatnonzero(~np.isfinite(likelihoods.loss))
        if len(wrong):
            raise LoraError(
                f"{name}: the loss of {len(wrong):,} of {len(self.rows):,} rows is not finite, the first is "
                f"{self.rows[int(wrong[0])].where}",
                hint="its numbers overflow: weights are damaged or too large, or model.dtype is too small for them",
                exit_code=1,
            )

    def print_results(self) -> None:
        """Print tables, intervals and answers, and write the predictions if a file is requested."""
        task = self.recipe.task
        console.print_table(report.results_table(self.results, task))
        for line in report.interval_lines(self.results, task):
            console.out.print(line)
        scores = self._scores()
        if self.options.metrics and scores:
            console.print_table(answers.score_table(scores, len(self.prompts)))
            for name, signature in answers.metric_signatures(self.options.metrics, self.prompts).items():
                console.out.print(f"{name}: {signature}")
        if self.options.tasks:
            console.print_table(answers.task_table({name: result.tasks for name, result in self.results.items()}))
        answers.print_answers(self.prompts, self._answers(), self.options.file)
        if self.options.file is not None:
            atomic.write_text(self.options.file, "".join(answers.prediction_lines(self.prompts, self._answers())))

    def to_json(self) -> dict[str, Any]:
        """Return all figures for JSON, and the answers; the losses of rows, for paired comparisons between runs."""
        base, scores = self.results[BASE], self._scores()
        signatures = answers.metric_signatures(self.options.metrics, self.prompts) if scores else {}
        return {
            "rows": len(self.rows),
            "data": self.rows.fingerprint,
            **({"metrics": signatures} if signatures else {}),
            "results": {
                name: report.result_record(result, base, self.recipe.task) | scores.get(name, {}) | dict(result.tasks)
                for name, result in self.results.items()
            },
            "adapters": self.weights,
            "units_of_rows": base.rows.units.tolist(),
            "losses_of_rows": {name: result.rows.loss.tolist() for name, result in self.results.items()},
            "answers": answers.prediction_records(self.prompts, self._answers()),
        }

    def _answers(self) -> answers.Answers:
        return {name: result.answers for name, result in self.results.items()} if self.prompts else {}

    def _scores(self) -> dict[str, dict[str, float]]:
        return answers.score_answers(self.options.metrics, self.prompts, self._answers())


def _resolve_target(target: Path, options: Sequence[str]) -> Target:
    """Return the recipe, adapters and models to measure.

    Args:
        target: a recipe, run folder or adapter folder, see `check_measurable`.
        options: values of --adapter, `DIR` or `NAME=DIR`.

    Raises:
        LoraError: a recipe, run or adapter does not exist, or a name is used twice.
    """
    folders: dict[str, Path] = {}
    if target.is_file():
        recipe = with_recorded_date(load_recipe(target))
        if os.path.lexists(Path(recipe.output) / "adapter"):
            folders["adapter"] = find_adapter(Path(recipe.output))
    elif os.path.lexists(target / CONFIG_FILE):
        recipe_file = recipe_of_adapter(target)
        if recipe_file is None:
            raise LoraError(
                f"{target}: there is no recipe.yaml next to this adapter, so its base and rows are unknown",
                hint="write a recipe with its model and data, and run lora eval RECIPE --adapter DIR",
            )
        recipe = load_recipe(recipe_file)
        folders["adapter"] = target
    else:
        recipe = load_recipe(target / "recipe.yaml")
        if os.path.lexists(target / "adapter"):
            folders["adapter"] = find_adapter(target)
        else:
            console.info(f"{target} has no adapter yet: measuring the base alone")
    models: dict[str, Path] = {}
    for item in options:
        named = parse_named_folder(item, taken=[*folders, *models], accepts_models=True)
        (models if is_model_folder(named.folder) else folders)[named.name] = named.folder
    return Target(recipe, {name: open_adapter(folder) for name, folder in folders.items()}, models)


def _data_spec(recipe: Recipe, data: str | None, labels: ClassLabels | None) -> DataSpec:
    """Return the data section with the rows of --data, and with the labels that the adapters' heads have."""
    spec = recipe.data if data is None else recipe.data.model_copy(update={"train": data, "eval": None})
    if labels:
        # The rows may lack a label that the head has.
        update = "regression" if labels.kind == "regression" else list(labels.names)
        spec = spec.model_copy(update={"labels": update})
    return spec


def _common_labels(adapters: dict[str, AdapterFiles], recipe: Recipe) -> ClassLabels | None:
    """Return the labels of the adapters' heads.

    Raises:
        LoraError: the heads have other labels or another order of labels, so that one id would mean two labels.
    """
    if not TASKS[recipe.task].is_classification:
        return None
    by_folder = {each.folder: each.labels or _unnamed_labels(each, recipe) for each in adapters.values()}
    first = next(iter(by_folder.items()), None)
    for folder, labels in by_folder.items():
        if first and labels != first[1]:
            raise LoraError(
                f"{folder}: its head has {labels.describe()}; that of {first[0]} has {first[1].describe()}",
                hint="measure each adapter separately",
            )
    return first[1] if first else None


def _unnamed_labels(adapter: AdapterFiles, recipe: Recipe) -> ClassLabels:
    """Return the labels of an adapter of another tool: as many as its head has, by the names in the recipe if it has.

    Raises:
        LoraError: the adapter has no head, or data.labels has another number of names.
    """
    source = find_model(recipe.model, dtype=torch.float32, device=CPU, info=console.info, weights=False)
    tokenizer = load_tokenizer(source)
    base = BaseCheckpoint(recipe.model.path, source, load_config(source), tokenizer, task=recipe.task)
    labels, folder = labels_of_head(adapter, base), adapter.folder
    names = recipe.data.labels
    if not isinstance(names, str) and labels.kind != "regression":
        if len(names) != len(labels.names):
            raise LoraError(
                f"{folder}: its head has {len(labels.names)} outputs, but data.labels lists {len(names)}",
                hint="list the labels in the order of the head",
            )
        labels = labels._replace(names=tuple(names))
    else:
        console.info(
            f"{folder} has no {LABELS_FILE}: its head has {labels.describe()}; data.labels can name them in its order"
        )
    return labels


def _check_labels(labels: ClassLabels | None, trained: ClassLabels | None, name: str) -> None:
    if labels is not None and (missing := missing_packages()):
        console.info(f'without {", ".join(missing)}: loss and accuracy only; for more, pip install "lora-cli[eval]"')
    if trained and labels and trained.kind != labels.kind:
        raise LoraError(
            f"{name}: its labels are {labels.describe()}, the adapter's {trained.describe()}",
            hint="give rows with labels of the adapter's kind",
        )


PROMPTS = {"chat": "prompt by the chat template", "text": "are literal text", "both": "are of both kinds"}


def _tell_other_prompts(kind: PromptKind | None, adapters: dict[str, AdapterFiles], name: str) -> None:
    """Tell if the rows prompt in another way than the training rows of an adapter did."""
    for adapter, files in adapters.items():
        trained = files.trained_on.prompts if files.trained_on else None
        if kind and trained and trained not in (kind, "both"):
            console.info(
                f"note: the rows of {name} {PROMPTS[kind]}, but the training rows of {adapter} {PROMPTS[trained]}: "
                "the figures are for prompts that it was not trained on"
            )


def _check_single_bias(adapters: dict[str, AdapterFiles]) -> None:
    """Raise if one of several adapters has biases: PEFT sets them in the base, where the others would use them."""
    for adapter in adapters.values():
        # PEFT methods whose config has no `bias` field train no biases.
        if len(adapters) > 1 and getattr(adapter.config, "bias", "none") != "none":
            raise LoraError(
                f"{adapter.folder}: this adapter trained biases of the base too, and cannot be measured with others",
                hint="measure each adapter separately",
            )


def _load_adapters(model: PreTrainedModel, adapters: dict[str, AdapterFiles], *, base_path: str) -> NamedAdapters:
    for adapter in adapters.values():
        trained_base = adapter.config.base_model_name_or_path
        if adapter.trained_on is None and trained_base not in (base_path, redact_path(base_path)):
            # One model has many names (hub id, folder, GGUF), and the weights of this one are not known: a note.
            console.info(f"note: {adapter.folder} names its base {trained_base}, and is measured on {base_path}")
    loaded = load_adapters(model, adapters, base=base_path)
    upcast_trainable_params(loaded.model)
    return loaded


def _load_full_model(recipe: Recipe, inputs: RunInputs, folder: Path) -> PreTrainedModel:
    """Load a merged model in place of the base, in the dtype of the run, unquantized."""
    spec = recipe.model.model_copy(update={"path": str(folder), "revision": None})
    source = find_model(spec, dtype=inputs.base.dtype, device=inputs.device, info=console.info)
    unquantized = recipe.model_copy(update={"quantization": None})
    return prepare_base(inputs.base.at(source), unquantized, inputs.device, info=console.info).model.eval()
