"""`lora eval`: base and adapters side by side on held-out rows, the base loaded once."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftConfig, PeftModel
from rich.table import Table
from transformers import PreTrainedModel

from lora_cli.data import class_labels as labelling
from lora_cli.errors import LoraError
from lora_cli.evaluation import answers, bootstrap, classification_metrics
from lora_cli.evaluation.answers import GenerationOptions
from lora_cli.evaluation.bootstrap import Interval
from lora_cli.evaluation.generation import Answer
from lora_cli.evaluation.likelihood import Likelihood, RowLikelihoods, measure_row_likelihoods
from lora_cli.evaluation.predict import predict
from lora_cli.model import base_model
from lora_cli.model.load_adapter import load_adapter
from lora_cli.model.loss import LossFunction
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.tasks import TaskName
from lora_cli.run import atomic, console
from lora_cli.setup.inputs import RunInputs, batch_plan, load_inputs
from lora_cli.setup.training_model import load_base, prepare_for_compute
from lora_cli.training import cpu

BASE = "base"
FEWEST_ROWS = 5  # of which an interval says anything


class Figures(NamedTuple):
    """What was measured of one model."""

    rows: RowLikelihoods
    more: dict[str, float]  # metrics of a classifier, by name

    @property
    def likelihood(self) -> Likelihood:
        """Of all rows together."""
        return self.rows.whole


class Target(NamedTuple):
    """What the command line named."""

    recipe: Recipe
    adapters: dict[str, Path]  # by the name shown
    models: dict[str, Path]  # whole models, merged ones mostly


def evaluate(
    target: str, *, adapters: Sequence[str], data: str | None, json_file: Path | None, asked: GenerationOptions
) -> None:
    """Print a table of base and adapters, and what each answers; the figures as JSON if asked."""
    for option, file in (("--json", json_file), ("--predictions", asked.file)):
        if file is not None and not file.absolute().parent.is_dir():
            raise LoraError(f"{option} {file}: there is no folder {file.parent}", hint="make it first")
    asked.check()
    found = _find(Path(target), adapters)
    if asked.tasks and TASKS[found.recipe.task].classes:
        raise LoraError(f"--tasks: the harness asks language models, not {found.recipe.task}", hint="leave it out")
    _refuse_biases_of_several(found.adapters)
    recipe = found.recipe
    spec = recipe.data if data is None else recipe.data.model_copy(update={"train": data, "eval": None})
    if trained := _labels(found.adapters):
        # The rows at hand may lack a label that the head was trained for.
        update = "regression" if trained.kind == "regression" else list(trained.names)
        spec = spec.model_copy(update={"labels": update})
    opening = load_inputs(recipe, info=console.info, data=spec, train_key="data.train" if data is None else data)
    rows = opening.data.train if data is not None else opening.data.eval
    if rows is None:
        raise LoraError(
            f"{target}: its recipe holds no rows out (data.eval is null)", hint="name rows with --data FILE"
        )
    if opening.device.type == "cpu":
        cpu.set_up_cpu()
    labels = opening.data.labels
    if labels is not None and (lacking := classification_metrics.missing_packages()):
        console.info(f'without {", ".join(lacking)}: loss and accuracy only; for more, pip install "lora-cli[eval]"')
    if trained and labels and trained.kind != labels.kind:
        raise LoraError(
            f"{data or 'data.eval'}: its labels are {labels.describe()}, the adapter's {trained.describe()}",
            hint="give rows with labels of the adapter's kind",
        )
    model = load_base(recipe, opening, info=console.info).model
    model.eval()
    plan = batch_plan(recipe, opening, rows, batches_per_step=1)
    questions = answers.select_prompts(rows, asked.prompts, opening, recipe)
    figures: dict[str, Figures] = {}
    said: dict[str, list[Answer]] = {}
    by_task: dict[str, dict[str, float]] = {}

    def look(name: str, at: PeftModel | PreTrainedModel) -> None:
        console.info(f"measuring {name} on {len(rows):,} rows")
        loss_fn = LossFunction(at, task=recipe.task)
        more = (
            classification_metrics.compute_classification_metrics(predict(loss_fn, plan, labels))
            if labels and not classification_metrics.missing_packages()
            else {}
        )
        figures[name] = Figures(measure_row_likelihoods(loss_fn, plan), more)
        if questions:
            console.info(f"answering {len(questions):,} prompts")
            said[name] = answers.generate_answers(at, opening, questions, recipe)
        if asked.tasks:
            console.info(f"{name} on {', '.join(asked.tasks)}")
            by_task[name] = answers.run_lm_eval(at, opening, asked)

    # Before any adapter is there: biases that one has trained stay when it is switched off.
    look(BASE, model)
    if found.adapters:
        loaded = _load(model, found.adapters, base_path=recipe.model.path)
        for name in found.adapters:
            loaded.set_adapter(name)
            look(name, loaded)
        del loaded
    del model
    for name, folder in found.models.items():
        look(name, _load_whole(recipe, opening, folder))
    console.out.print(_table(figures, recipe.task))
    for line in _compared(figures, recipe.task):
        console.out.print(line)
    scores = answers.score_answers(asked.metrics, questions, said)
    if asked.metrics and scores:
        console.out.print(answers.score_table(scores, len(questions)))
    if by_task:
        console.out.print(answers.task_table(by_task))
    answers.print_answers(questions, said, asked.file)
    if asked.file is not None:
        atomic.write_text(asked.file, "".join(answers.prediction_lines(questions, said)))
    if json_file is not None:
        report = {
            "rows": len(rows),
            "data": rows.fingerprint,
            "results": {
                n: _record(f, figures[BASE], recipe.task) | scores.get(n, {}) | by_task.get(n, {})
                for n, f in figures.items()
            },
        }
        atomic.write_json(json_file, report)


def _find(target: Path, named: Sequence[str]) -> Target:
    """The recipe and adapters that `target`, a recipe, run folder or adapter folder, and `named` stand for.

    Raises:
        LoraError: nothing of the kind is there.
    """
    adapters = {}
    if target.is_file():
        recipe = load_recipe(target)
        if (Path(recipe.output) / "adapter").is_dir():
            adapters["adapter"] = Path(recipe.output) / "adapter"
    elif (target / "adapter_config.json").is_file():
        recipe_file = target.parent / "recipe.yaml"
        if not recipe_file.is_file():
            raise LoraError(
                f"{target}: no recipe.yaml beside this adapter says what base and rows it had",
                hint="write a recipe with its model and data, and run lora eval RECIPE --adapter DIR",
            )
        recipe = load_recipe(recipe_file)
        adapters["adapter"] = target
    elif (target / "recipe.yaml").is_file():
        recipe = load_recipe(target / "recipe.yaml")
        if (target / "adapter").is_dir():
            adapters["adapter"] = target / "adapter"
        else:
            console.info(f"{target} has no adapter yet: measuring the base alone")
    else:
        raise LoraError(
            f"{target} is no recipe, run or adapter folder", hint="give a YAML file, or a folder of lora train"
        )
    models: dict[str, Path] = {}
    for item in named:
        name, _, path = item.rpartition("=")
        folder = Path(path)
        whole = (folder / "config.json").is_file()
        if not whole and not (folder / "adapter_config.json").is_file():
            raise LoraError(
                f"--adapter {item}: {folder} has no adapter_config.json",
                hint="give an adapter folder, or that of a merged model",
            )
        name = name or (folder.resolve().name if whole else folder.resolve().parent.name)
        if name in (BASE, *adapters, *models):
            raise LoraError(f"--adapter {item}: the name {name} is taken", hint="give another: --adapter NAME=DIR")
        (models if whole else adapters)[name] = folder
    return Target(recipe, adapters, models)


def _labels(adapters: dict[str, Path]) -> labelling.ClassLabels | None:
    """What the heads of the adapters tell apart.

    Raises:
        LoraError: not all the same, in the same order: one number would stand for two labels.
    """
    found = {folder: labels for folder in adapters.values() if (labels := labelling.load_labels(folder))}
    first = next(iter(found.items()), None)
    for folder, labels in found.items():
        if first and labels != first[1]:
            raise LoraError(
                f"{folder}: its head tells apart {labels.describe()}; that of {first[0]} {first[1].describe()}",
                hint="measure each adapter by itself",
            )
    return first[1] if first else None


def _refuse_biases_of_several(adapters: dict[str, Path]) -> None:
    """An adapter that brings biases puts them into the base, where the next one would be measured with them."""
    for folder in adapters.values():
        # Kinds of PEFT that have no such option train no biases.
        if len(adapters) > 1 and getattr(PeftConfig.from_pretrained(str(folder)), "bias", "none") != "none":
            raise LoraError(
                f"{folder}: trained the base's biases too, and cannot be measured beside others",
                hint="measure each adapter by itself",
            )


def _load(model: PreTrainedModel, adapters: dict[str, Path], *, base_path: str) -> PeftModel:
    loaded: PeftModel | PreTrainedModel = model
    for name, folder in adapters.items():
        trained_on = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
        if trained_on != base_path:
            # One model has many names (hub id, folder, GGUF), so this may be right: it is said, not refused.
            console.info(f"note: {folder} names its base {trained_on}, and is measured on {base_path}")
        loaded = load_adapter(loaded, folder, base=base_path, name=name)
    prepare_for_compute(loaded)
    return loaded


def _load_whole(recipe: Recipe, opening: RunInputs, folder: Path) -> PreTrainedModel:
    """A merged model in the base's stead, in 16 or 32 bits as the run has it."""
    spec = recipe.model.model_copy(update={"path": str(folder), "revision": None})
    source = base_model.find_model(spec, dtype=opening.dtype, device=opening.device, info=console.info)
    whole = recipe.model_copy(update={"model": spec, "quantization": None})
    model = load_base(whole, opening._replace(source=source), info=console.info).model
    return model.eval()


def _compared(figures: dict[str, Figures], task: TaskName) -> list[str]:
    """How sure the figures are, and how each model compares with the base, row by row."""
    first = figures[BASE].rows
    if len(first.units) < FEWEST_ROWS or first.units.sum() == 0:
        return []
    lines = [f"in 95 of 100 draws of the {len(first.units):,} rows:"]
    for name, found in figures.items():
        loss = bootstrap.mean_interval(found.rows.loss, first.units)
        line = f"  {name}: loss {loss.low:.4f} to {loss.high:.4f}"
        if name != BASE:
            apart = bootstrap.difference_interval(found.rows.loss, first.loss, first.units)
            line += f"; against the base {_better(apart, '.4f')}"
            if first.counted:
                unit = "token accuracy" if not TASKS[task].classes else "accuracy"
                hits = bootstrap.difference_interval(first.hits * 100, found.rows.hits * 100, first.units)
                line += f", {unit} {_better(hits, '.1f')} points"
        lines.append(line)
    return lines


def _better(apart: Interval, digits: str) -> str:
    word = "better" if apart.low > 0 else "worse" if apart.high < 0 else "the same, within chance,"
    if word.startswith("the same"):
        return f"{word} {apart.value:+{digits}} ± {apart.half:{digits}}"
    return f"{word} by {abs(apart.value):{digits}} ± {apart.half:{digits}}"


def _table(figures: dict[str, Figures], task: TaskName) -> Table:
    first = next(iter(figures.values()))
    columns = ["mse" if first.likelihood.accuracy is None else "loss"]
    tokens = task in ("causal-lm", "seq2seq-lm")
    if tokens:
        columns.append("perplexity")
    if first.likelihood.accuracy is not None:
        columns.append("token accuracy" if tokens else "accuracy")
    table = Table("", *columns, *first.more, f"{TASKS[task].unit}s", box=None)
    for name, (rows, more) in figures.items():
        found = rows.whole
        cells = [f"{found.loss:.4f}"]
        if tokens:
            cells.append(f"{found.perplexity:.2f}")
        if found.accuracy is not None:
            cells.append(f"{found.accuracy:.1%}")
        table.add_row(name, *cells, *(f"{value:.4f}" for value in more.values()), f"{found.tokens:,}")
    return table


def _record(found: Figures, base: Figures, task: TaskName) -> dict[str, Any]:
    likelihood = found.likelihood
    values = {**likelihood._asdict(), **found.more}
    if not TASKS[task].classes:
        values["perplexity"] = likelihood.perplexity
    # JSON has no infinity, and no NaN.
    record: dict[str, Any] = {
        name: value if value is not None and math.isfinite(value) else None for name, value in values.items()
    }
    rows = found.rows
    if len(rows.units) >= FEWEST_ROWS and likelihood.tokens:
        record["loss_95"] = bootstrap.mean_interval(rows.loss, rows.units)[1:]
        if found is not base:
            record["loss_below_base"] = bootstrap.difference_interval(rows.loss, base.rows.loss, rows.units)._asdict()
    return record
