"""`lora eval`: base and adapters side by side on held-out rows, the base loaded once."""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftConfig, PeftModel
from rich.table import Table
from transformers import PreTrainedModel

from lora_cli.commands.opening import Opening, batch_plan, load_base, open_run_inputs
from lora_cli.data.rows import Row
from lora_cli.errors import LoraError
from lora_cli.evaluation.generate import Answer, greedy, prompt_ids, reference_ids
from lora_cli.evaluation.likelihood import Likelihood, measure
from lora_cli.model.score import Scorer
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import Recipe
from lora_cli.run import atomic, console
from lora_cli.training import host

BASE = "base"


class Target(NamedTuple):
    """What the command line named."""

    recipe: Recipe
    adapters: dict[str, Path]  # by the name shown


def evaluate(target: str, *, adapters: Sequence[str], data: str | None, json_file: Path | None, answers: int) -> None:
    """Print a table of base and adapters; `answers` rows with what each says; the figures as JSON if asked."""
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise LoraError(f"--json {json_file}: there is no folder {json_file.parent}", hint="make it first")
    found = _find(Path(target), adapters)
    recipe = found.recipe
    spec = recipe.data if data is None else recipe.data.model_copy(update={"train": data, "eval": None})
    opening = open_run_inputs(recipe.model, spec, seed=recipe.training.seed, say=console.say)
    rows = opening.data.train if data is not None else opening.data.eval
    if rows is None:
        raise LoraError(
            f"{target}: its recipe holds no rows out (data.eval is null)", hint="name rows with --data FILE"
        )
    if opening.device.type == "cpu":
        host.set_up_cpu()
    model, _ = load_base(recipe, opening)
    model.eval()
    loaded = _load(model, found.adapters, base_path=recipe.model.path)
    plan = batch_plan(recipe, opening, rows, per_step=1)
    figures = {}
    for name in _each(loaded, found.adapters):
        console.say(f"measuring {name} on {len(rows):,} rows")
        with _only(loaded, name):
            figures[name] = measure(Scorer(loaded), plan)
    console.out.print(_table(figures))
    if answers:
        chosen = [rows[i] for i in range(min(answers, len(rows)))]
        _show_answers(loaded, found.adapters, opening, chosen)
    if json_file is not None:
        report = {"rows": len(rows), "data": rows.fingerprint, "results": {n: _record(f) for n, f in figures.items()}}
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
            console.say(f"{target} has no adapter yet: measuring the base alone")
    else:
        raise LoraError(
            f"{target} is no recipe, run or adapter folder", hint="give a YAML file, or a folder of lora train"
        )
    for item in named:
        name, _, path = item.rpartition("=")
        folder = Path(path)
        if not (folder / "adapter_config.json").is_file():
            raise LoraError(f"--adapter {item}: {folder} has no adapter_config.json", hint="give an adapter folder")
        name = name or folder.resolve().parent.name
        if name in (BASE, *adapters):
            raise LoraError(f"--adapter {item}: the name {name} is taken", hint="give another: --adapter NAME=DIR")
        adapters[name] = folder
    return Target(recipe, adapters)


def _load(model: PreTrainedModel, adapters: dict[str, Path], *, base_path: str) -> PeftModel | PreTrainedModel:
    loaded: PeftModel | PreTrainedModel = model
    for name, folder in adapters.items():
        trained_on = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
        if trained_on != base_path:
            # One model has many names (hub id, folder, GGUF), so this may be right: it is said, not refused.
            console.say(f"note: {folder} names its base {trained_on}, and is measured on {base_path}")
        try:
            if isinstance(loaded, PeftModel):
                loaded.load_adapter(str(folder), adapter_name=name)
            else:
                loaded = PeftModel.from_pretrained(loaded, str(folder), adapter_name=name)
        except (ValueError, RuntimeError) as reason:
            raise LoraError(
                f"{folder}: does not fit the base model: {str(reason).splitlines()[0]}",
                hint="an adapter fits only the base it was trained on; see its adapter_config.json",
            ) from reason
    return loaded


def _each(loaded: PeftModel | PreTrainedModel, adapters: dict[str, Path]) -> Iterator[str]:
    """`base`, then each adapter, made the active one."""
    yield BASE
    for name in adapters:
        loaded.set_adapter(name)
        yield name


def _only(loaded: PeftModel | PreTrainedModel, name: str) -> Any:
    """Within the block, the base stands alone if it is the one named."""
    return loaded.disable_adapter() if name == BASE and isinstance(loaded, PeftModel) else nullcontext()


def _table(figures: dict[str, Likelihood]) -> Table:
    table = Table("", "loss", "perplexity", "token accuracy", "supervised tokens", box=None)
    for name, found in figures.items():
        table.add_row(
            name, f"{found.loss:.4f}", f"{found.perplexity:.2f}", f"{found.accuracy:.1%}", f"{found.tokens:,}"
        )
    return table


def _record(found: Likelihood) -> dict[str, float | None]:
    # JSON has no infinity, and no NaN.
    values = {**found._asdict(), "perplexity": found.perplexity}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _show_answers(
    loaded: PeftModel | PreTrainedModel, adapters: dict[str, Path], opening: Opening, rows: Sequence[Row]
) -> None:
    prompts, references = [prompt_ids(row) for row in rows], [reference_ids(row) for row in rows]
    # An answer ends where the rows' own answers do, or at the tokenizer's end token.
    stop = sorted({ids[-1] for ids in references} | {opening.tokenizer.eos_token_id})
    longest = max(len(ids) for ids in references)
    inner = loaded.get_base_model() if isinstance(loaded, PeftModel) else loaded
    inner.set_attn_implementation("sdpa")
    said: dict[str, list[Answer]] = {}
    for name in _each(loaded, adapters):
        with _only(loaded, name):
            said[name] = greedy(loaded, opening.tokenizer, prompts, max_new_tokens=min(200, 2 * longest), stop=stop)
    for number, row in enumerate(rows):
        console.out.print(f"\n--- {row.where}")
        console.out.print(opening.tokenizer.decode(prompts[number], skip_special_tokens=False).strip())
        console.out.print(
            f"[reference] {opening.tokenizer.decode(references[number], skip_special_tokens=True).strip()}"
        )
        for name, answered in said.items():
            ended = "" if answered[number].finished else " ... (not finished)"
            console.out.print(f"[{name}] {answered[number].text}{ended}")
