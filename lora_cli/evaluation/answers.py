"""Prompts of held-out rows, what models answer to them, and how good the answers are."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from peft import PeftModel
from rich.table import Table
from transformers import PreTrainedModel

from lora_cli.data.dataset import EncodedDataset
from lora_cli.errors import LoraError
from lora_cli.evaluation import lm_eval_harness, text_metrics
from lora_cli.evaluation.generation import Answer, generate, prompt_ids, reference_ids, stop_ids
from lora_cli.model import packed_attention
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.schema import Recipe
from lora_cli.run import console
from lora_cli.setup.inputs import RunInputs

MAX_PRINTED = 10  # answers that are printed
MIN_PROMPT_TOKENS = 2  # tokens; one alone is the begin mark


class GenerationOptions(NamedTuple):
    """What the command line wants to hear of answers."""

    prompts: int  # how many
    metrics: Sequence[str]
    file: Path | None  # for every answer
    tasks: Sequence[str] = ()  # of the lm-evaluation-harness
    tasks_folder: Path | None = None
    limit: int | None = None  # documents of each task

    def check(self) -> None:
        """Refuse what does not go together, before any model is loaded.

        Raises:
            LoraError: metrics or a file without answers, or a metric that is not to be had.
        """
        if (self.metrics or self.file) and not self.prompts:
            raise LoraError("--metric and --predictions are about answers", hint="say how many: --answers 100")
        text_metrics.check_text_metrics(self.metrics)
        lm_eval_harness.check_tasks(self.tasks, self.tasks_folder)


class Prompt(NamedTuple):
    """A prompt, and all that rows answer to it."""

    where: str  # its first row
    prompt: list[int]  # token ids
    text: str  # the prompt, special tokens included
    references: list[str]
    longest: int  # tokens, of a reference
    ends: list[list[int]]  # ids of the references


def select_prompts(rows: EncodedDataset, count: int, opening: RunInputs, recipe: Recipe) -> list[Prompt]:
    """The first `count` prompts; rows that share one are its references."""
    if not count:
        return []
    if TASKS[recipe.task].classes:
        console.info(f"--answers: none, since a model for {recipe.task} writes no text")
        return []
    if recipe.task == "causal-lm" and recipe.data.loss_on == "all":
        console.info("--answers: none, since with data.loss_on: all no row has a prompt apart from its answer")
        return []
    decode = opening.tokenizer.decode
    found: dict[tuple[int, ...], Prompt] = {}
    without = 0
    for row in rows:
        ids = prompt_ids(row, recipe.task)
        if len(ids) < MIN_PROMPT_TOKENS:
            without += 1
            continue
        key, answer_ids = tuple(ids), reference_ids(row, recipe.task)
        if key not in found:
            if len(found) == count:
                continue
            shown = decode(ids, skip_special_tokens=False).strip()
            found[key] = Prompt(row.where, ids, shown, [], 0, [])
        question = found[key]
        question.references.append(decode(answer_ids, skip_special_tokens=True).strip())
        question.ends.append(answer_ids)
        found[key] = question._replace(longest=max(question.longest, len(answer_ids)))
    if without:
        skipped = "1 row" if without == 1 else f"{without:,} rows"
        console.info(f"--answers: {skipped} skipped, as no prompt stands before the first supervised token")
    return list(found.values())


def score_answers(
    metrics: Sequence[str], questions: Sequence[Prompt], said: dict[str, list[Answer]]
) -> dict[str, dict[str, float]]:
    """The metrics of each model's answers, by its name."""
    references = [question.references for question in questions]
    return {
        name: text_metrics.compute_text_metrics(metrics, [each.text for each in all_of], references)
        for name, all_of in said.items()
    }


def generate_answers(
    model: PeftModel | PreTrainedModel, opening: RunInputs, questions: Sequence[Prompt], recipe: Recipe
) -> list[Answer]:
    """What `model` answers to each prompt, as the recipe has it generate."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    longest = max(question.longest for question in questions)
    with _padding(inner):
        return generate(
            model,
            opening.tokenizer,
            [question.prompt for question in questions],
            spec=recipe.generation,
            max_new_tokens=recipe.generation.max_new_tokens or min(200, 2 * longest),
            stop=stop_ids(opening.tokenizer, inner, [ids for question in questions for ids in question.ends]),
            seed=recipe.training.seed,
        )


@contextmanager
def _padding(model: PreTrainedModel) -> Iterator[None]:
    """An attention that knows padding: ours packs rows."""
    measured_with = model.config._attn_implementation
    if measured_with == packed_attention.PACKED_ATTENTION:
        model.set_attn_implementation("sdpa")
    yield
    model.set_attn_implementation(measured_with)


def run_lm_eval(model: PeftModel | PreTrainedModel, opening: RunInputs, asked: GenerationOptions) -> dict[str, float]:
    """What the harness says of `model`, by task and metric."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    with _padding(inner):
        return lm_eval_harness.run_tasks(
            model, opening.tokenizer, asked.tasks, folder=asked.tasks_folder, limit=asked.limit
        )


def task_table(scores: dict[str, dict[str, float]]) -> Table:
    """A line for each task and metric, a column for each model."""
    table = Table("", *scores, box=None)
    for name in next(iter(scores.values())):
        table.add_row(name, *(f"{values[name]:.4f}" for values in scores.values()))
    return table


def score_table(scores: dict[str, dict[str, float]], count: int) -> Table:
    """The metrics of each model's answers."""
    first = next(iter(scores.values()))
    table = Table("", *first, "answers", box=None)
    for name, values in scores.items():
        table.add_row(name, *(f"{value:.4f}" for value in values.values()), f"{count:,}")
    return table


def prediction_lines(questions: Sequence[Prompt], said: dict[str, list[Answer]]) -> Iterator[str]:
    """A line of JSON for each prompt."""
    for number, question in enumerate(questions):
        answers = {name: all_of[number]._asdict() for name, all_of in said.items()}
        record = {"where": question.where, "prompt": question.text, "references": question.references}
        yield json.dumps({**record, "answers": answers}, ensure_ascii=False) + "\n"


def print_answers(questions: Sequence[Prompt], said: dict[str, list[Answer]], file: Path | None) -> None:
    """Print the first answers side by side; all are in `file`, if there is one."""
    for number, question in enumerate(questions[:MAX_PRINTED]):
        console.out.print(f"\n--- {question.where}")
        console.out.print(question.text)
        for reference in question.references:
            console.out.print(f"[reference] {reference}")
        for name, answered in said.items():
            ended = "" if answered[number].finished else " ... (not finished)"
            console.out.print(f"[{name}] {answered[number].text}{ended}")
    if len(questions) > MAX_PRINTED:
        where = f"in {file}" if file else "written with --predictions FILE"
        console.out.print(f"\n{len(questions) - MAX_PRINTED:,} more: {where}")
