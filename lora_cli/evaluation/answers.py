"""Generated answers: prompts selected from held-out rows, generation, text metrics, printing, and lm-eval tasks."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from rich.table import Table
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.data.dataset import EncodedDataset
from lora_cli.evaluation import lm_eval_harness, text_metrics
from lora_cli.evaluation.generation import Answer, generate, prompt_ids, reference_ids, stop_ids
from lora_cli.evaluation.likelihood import Stopping, never
from lora_cli.model.select_attention import OWN_ATTENTION
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.schema import GenerationSpec
from lora_cli.recipe.tasks import TaskName
from lora_cli.run import console

MAX_PRINTED = 10  # prompts whose answers are printed
MIN_PROMPT_TOKENS = 2  # a single token is BOS alone

Answers = Mapping[str, Sequence[Answer]]  # by the model's name: one answer for each prompt


class GenerationOptions(NamedTuple):
    """CLI options for generated answers."""

    prompts: int  # number of prompts that are answered
    metrics: Sequence[str]
    file: Path | None  # for every answer
    tasks: Sequence[str] = ()  # of the lm-evaluation-harness
    tasks_folder: Path | None = None
    limit: int | None = None  # documents of each task

    def check(self) -> None:
        """Check the tasks before any model is loaded.

        Raises:
            LoraError: one is not available.
        """
        lm_eval_harness.check_tasks(self.tasks, self.tasks_folder)


class Prompt(NamedTuple):
    """A prompt with the answers of all rows that have it."""

    where: str  # its first row
    ids: list[int]
    text: str  # special tokens included
    references: list[str]
    longest: int  # tokens of the longest reference
    reference_ids: list[list[int]]


def select_prompts(
    rows: EncodedDataset,
    count: int,
    *,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskName,
    loss_on: str,
    option: str = "--answers",
    info: Callable[[str], None] = console.info,
) -> list[Prompt]:
    """Return the first `count` prompts of `rows`; rows with the same prompt are its references.

    Args:
        rows: encoded rows.
        count: of prompts.
        tokenizer: decodes them.
        task: of the model.
        loss_on: the recipe's data.loss_on; with `all`, rows have no prompt.
        option: that requested the answers, for messages.
        info: prints why there are no or fewer prompts.
    """
    if not count:
        return []
    if TASKS[task].is_classification:
        info(f"{option}: none, because a model for {task} does not generate text")
        return []
    if task == "causal-lm" and loss_on == "all":
        info(f"{option}: none, because rows have no prompt with data.loss_on: all")
        return []
    prompts: dict[tuple[int, ...], Prompt] = {}
    skipped = 0
    for row in rows:
        ids = prompt_ids(row, task)
        if len(ids) < MIN_PROMPT_TOKENS:
            skipped += 1
            continue
        key, answer_ids = tuple(ids), reference_ids(row, task)
        if key not in prompts:
            if len(prompts) == count:
                continue
            text = tokenizer.decode(ids, skip_special_tokens=False).strip()
            prompts[key] = Prompt(row.where, ids, text, [], 0, [])
        prompt = prompts[key]
        prompt.references.append(tokenizer.decode(answer_ids, skip_special_tokens=True).strip())
        prompt.reference_ids.append(answer_ids)
        prompts[key] = prompt._replace(longest=max(prompt.longest, len(answer_ids)))
    if skipped:
        number = "1 row" if skipped == 1 else f"{skipped:,} rows"
        info(f"{option}: {number} skipped, without a prompt before the first supervised token")
    return list(prompts.values())


def score_answers(metrics: Sequence[str], prompts: Sequence[Prompt], answers: Answers) -> dict[str, dict[str, float]]:
    """Return the text metrics of each model's answers, by the model's name."""
    references = [prompt.references for prompt in prompts]
    return {
        name: text_metrics.compute_text_metrics(metrics, [answer.text for answer in model_answers], references)
        for name, model_answers in answers.items()
    }


def metric_signatures(metrics: Sequence[str], prompts: Sequence[Prompt]) -> dict[str, str]:
    """Return the tokenizer and version of each metric that has one, by the metric's name."""
    return text_metrics.metric_signatures(metrics, [prompt.references for prompt in prompts])


def generate_answers(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    spec: GenerationSpec,
    seed: int,
    stopping: Stopping = never,
) -> list[Answer]:
    """Return the answer of `model` to each prompt, generated as `spec` describes; none if `stopping` returned True."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    longest = max(prompt.longest for prompt in prompts)
    # Each length of the cache would be a graph of its own, and layers have a limited number of them.
    with _padding_attention(base), torch.compiler.set_stance("force_eager"):
        return generate(
            model,
            tokenizer,
            [prompt.ids for prompt in prompts],
            spec=spec,
            max_new_tokens=spec.max_new_tokens or min(200, 2 * longest),
            stop=stop_ids(tokenizer, base, [ids for prompt in prompts for ids in prompt.reference_ids]),
            seed=seed,
            stopping=stopping,
        )


@contextmanager
def _padding_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, the model has an attention that supports padding on the left; ours do not."""
    before = model.config._attn_implementation
    if before in OWN_ATTENTION:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def run_lm_eval(
    model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: GenerationOptions
) -> dict[str, float]:
    """Return the metrics of the lm-evaluation-harness for `model`, by task and metric."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with _padding_attention(base):
        return lm_eval_harness.run_tasks(
            model, tokenizer, options.tasks, folder=options.tasks_folder, limit=options.limit
        )


def task_table(scores: Mapping[str, Mapping[str, float]]) -> Table:
    """Return a table with a line for each task and metric, and a column for each model."""
    table = Table("", *scores, box=None)
    for name in next(iter(scores.values())):
        table.add_row(name, *(f"{values[name]:.4f}" for values in scores.values()))
    return table


def score_table(scores: Mapping[str, Mapping[str, float]], count: int) -> Table:
    """Return a table with the text metrics of each model's `count` answers."""
    first = next(iter(scores.values()))
    table = Table("", *first, "answers", box=None)
    for name, values in scores.items():
        table.add_row(name, *(f"{value:.4f}" for value in values.values()), f"{count:,}")
    return table


def prediction_records(prompts: Sequence[Prompt], answers: Answers) -> list[dict[str, Any]]:
    """Return a record of JSON for each prompt, with the answer of each model."""
    return [
        {
            "where": prompt.where,
            "prompt": prompt.text,
            "references": prompt.references,
            "answers": {name: model_answers[number]._asdict() for name, model_answers in answers.items()},
        }
        for number, prompt in enumerate(prompts)
    ]


def prediction_lines(prompts: Sequence[Prompt], answers: Answers) -> Iterator[str]:
    """Yield a line of JSON for each prompt."""
    for record in prediction_records(prompts, answers):
        yield json.dumps(record, ensure_ascii=False) + "\n"


def print_answers(prompts: Sequence[Prompt], answers: Answers, file: Path | None) -> None:
    """Print the first answers side by side, and where all answers are: `file`, or None if they are not written."""
    for number, prompt in enumerate(prompts[:MAX_PRINTED]):
        console.out.print(f"\n--- {prompt.where}")
        console.out.print(prompt.text)
        for reference in prompt.references:
            console.out.print(f"[reference] {reference}")
        for name, model_answers in answers.items():
            unfinished = "" if model_answers[number].finished else " ... (not finished)"
            console.out.print(f"[{name}] {model_answers[number].text}{unfinished}")
    if len(prompts) > MAX_PRINTED:
        location = f"in {file}" if file else "written with --predictions FILE"
        console.out.print(f"\n{len(prompts) - MAX_PRINTED:,} more: {location}")
