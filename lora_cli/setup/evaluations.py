"""Evaluations during training: loss of the held-out rows, the best step, early stopping, answers to prompts."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel

from lora_cli.errors import LoraError
from lora_cli.evaluation import report
from lora_cli.evaluation.answers import Prompt, generate_answers, select_prompts
from lora_cli.evaluation.likelihood import (
    Likelihood,
    Stopping,
    describe_likelihood,
    measure_likelihood,
    measure_row_likelihoods,
    never,
)
from lora_cli.model.loss import LossFunction
from lora_cli.model.sharding import is_sharded
from lora_cli.recipe.problem import shorten
from lora_cli.recipe.schema import GenerationSpec, Recipe
from lora_cli.run import console
from lora_cli.run.metrics_log import MetricsLog, read_metrics
from lora_cli.setup.inputs import RunInputs, evaluation_plan
from lora_cli.training.best_step import EvaluationHistory, RowLosses
from lora_cli.training.distributed import any_process
from lora_cli.training.lr_schedule import check_schedule_fits, describe_schedule
from lora_cli.training.optimizer import averaged_weights

Info = Callable[[str], None]


def check_evaluations(recipe: Recipe, *, total: int, held_out: bool, info: Info) -> None:
    """Check that a run has enough evaluations for `keep` and `stop_after`, before its model is loaded.

    Args:
        recipe: of the run.
        total: its number of steps.
        held_out: whether it has held-out rows.
        info: prints a note on a stop_after that is out of reach.

    Raises:
        LoraError: no row is held out, or the only evaluation is after the last step.
    """
    spec = recipe.training
    used = {"keep": spec.keep == "best", "stop_after": spec.stop_after, "answer_every": spec.answer_every}
    for key in (key for key, value in used.items() if value and not held_out):
        raise LoraError(f"training.{key}: it needs evaluation rows, but no row is held out", hint="raise data.eval")
    count = math.ceil(total / spec.eval_every) if spec.eval_every else 1
    if spec.keep == "best" and count < 2:
        raise LoraError(
            f"training.keep: best chooses between evaluations, but this run of {total:,} steps has only one, after "
            f"the last step: eval_every is {spec.eval_every}",
            hint=f"write training.eval_every: {max(1, total // 10)}, or keep: last",
        )
    if spec.stop_after and count <= spec.stop_after:
        plural = "s" * (count > 1)
        info(f"note: stop_after: {spec.stop_after} cannot end this run early: it has {count} evaluation{plural}")


def check_steps(recipe: Recipe, *, total: int, held_out: bool, info: Info) -> None:
    """Check schedule and evaluations of a run of `total` steps before its model is loaded, and print the schedule.

    Raises:
        LoraError: see `check_schedule_fits` and `check_evaluations`.
    """
    check_schedule_fits(recipe.training, total)
    check_evaluations(recipe, total=total, held_out=held_out, info=info)
    for line in describe_schedule(recipe.training, total):
        info(line)


def synchronized(stopping: Stopping, model: PeftModel, accelerator: Accelerator) -> Stopping:
    """Return `stopping` as all processes of a sharded model must see it, which run it equally often."""
    return (lambda: any_process(accelerator, stopping())) if is_sharded(model) else stopping


class Evaluations:
    """Evaluations of one run: when they are due, their results, and what follows from them."""

    def __init__(
        self,
        recipe: Recipe,
        inputs: RunInputs,
        model: PeftModel,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
    ) -> None:
        """`model` is in training with `optimizer`; all processes of `accelerator` evaluate together."""
        self.recipe, self.spec, self.inputs = recipe, recipe.training, inputs
        self._model, self._optimizer, self._accelerator = model, optimizer, accelerator
        held_out = inputs.data.eval
        self.plan = evaluation_plan(recipe, inputs, held_out) if held_out else None
        self._loss_fn = LossFunction(model, task=recipe.task)
        self.history = EvaluationHistory(start_is_candidate=recipe.adapter.source is not None)

    def is_due(self, step: int) -> bool:
        """Return whether the step, neither the first nor the last, is evaluated."""
        return self.spec.eval_every is not None and step % self.spec.eval_every == 0

    def is_left_out(self, step: int, total: int) -> bool:
        """Return whether the evaluation after the last step done is missing: a signal came before its end."""
        due = step == total or self.is_due(step)
        return self.plan is not None and due and (self.history.last is None or self.history.last.step != step)

    def measure(self, step: int, metrics: MetricsLog | None, info: Info, stopping: Stopping = never) -> bool:
        """Measure the likelihood of the held-out rows, print it and log it; return False if a signal stopped it.

        Raises:
            LoraError: the loss is not finite.
        """
        if self.plan is None:
            return True
        stopping = synchronized(stopping, self._model, self._accelerator)
        with averaged_weights(self._optimizer):
            rows = None
            if self.spec.keep == "best":
                rows = measure_row_likelihoods(
                    self._loss_fn, self.plan, accelerator=self._accelerator, stopping=stopping
                )
                likelihood: Likelihood = rows.overall
            else:
                likelihood = measure_likelihood(
                    self._loss_fn, self.plan, accelerator=self._accelerator, stopping=stopping
                )
        if any_process(self._accelerator, stopping()):
            return False
        if not math.isfinite(likelihood.loss):
            raise LoraError(
                f"the loss on the held-out rows is not finite at step {step}",
                hint="the base model causes it: see model.path and model.dtype"
                if step == 0
                else "the last checkpoint is from before it; try a lower training.learning_rate",
                exit_code=1,
            )
        self.history.add(step, likelihood.loss, RowLosses(rows.loss, rows.units) if rows else None)
        info(f"eval at step {step}: {describe_likelihood(likelihood, self.recipe.task)}")
        if metrics:
            metrics.write({"step": step, "eval_loss": likelihood.loss, "eval_accuracy": likelihood.accuracy})
        return True

    def is_new_best(self, step: int) -> bool:
        """Return whether the run keeps the best step, and the evaluation of `step` is the best so far."""
        return self.spec.keep == "best" and self.history.best is not None and self.history.best.step == step

    @property
    def should_stop(self) -> bool:
        """Whether `stop_after` evaluations in a row had no lower loss."""
        return self.history.should_stop(self.spec.stop_after)

    def describe_stop(self, step: int, total: int) -> str:
        """Return the line on an early stop after `step`."""
        lowest = min(self.history.evaluations, key=lambda e: e.loss)
        count = self.history.without_gain
        return (
            f"stopped early after step {step} of {total:,}: {count} evaluation{'s' * (count > 1)} without a loss below "
            f"{lowest.loss:.4f} of step {lowest.step}; the learning rate followed the schedule of {total:,} steps"
        )


def describe_choice(history: EvaluationHistory, *, step: int, source: str | None) -> list[str]:
    """Return lines on the best step of a run that ended after `step`, compared with the last one and with the start.

    Args:
        history: with the losses of rows at the start, the best and the last step.
        step: the last one.
        source: the adapter that training went on from; None if the start is the base.
    """
    best, start = history.best, history.start
    assert best is not None, "a run that keeps the best step has evaluations"
    count = sum(e.step > 0 for e in history.evaluations)
    lines = [f"kept: the adapter of step {best.step}, the best of {count} evaluations: loss {best.loss:.4f}"]
    if best.step != step:
        lines.append(f"  versus the last step ({step}): loss {_compare(history, best.step, step)}")
    if best.step == 0:
        return [*lines, f"warning: no step is better than the adapter in {source}, which is kept as it was"]
    if start is None:
        return lines
    before = f"the adapter in {source}" if source else "the base"
    lines.append(f"  versus {before}: loss {_compare(history, best.step, 0)}")
    if best.loss >= start.loss:
        lines.append(
            "warning: the base without adapter is better than every evaluated step: "
            f"loss {start.loss:.4f}. The adapter of step {best.step} is written, because an untrained one is the base, "
            "but do not use it: try a lower training.learning_rate"
        )
    return lines


def _compare(history: EvaluationHistory, step: int, other: int) -> str:
    first, second = history.rows[step], history.rows[other]
    return report.describe_loss_difference(first.loss, second.loss, first.units)


class HeldOutAnswers:
    """Greedy answers to the first held-out prompts during training, in answers.jsonl."""

    def __init__(
        self,
        recipe: Recipe,
        inputs: RunInputs,
        model: PeftModel,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
    ) -> None:
        """`model` is in training with `optimizer`; the run has held-out rows."""
        self.spec, self._recipe, self._model, self._optimizer = recipe.training, recipe, model, optimizer
        self._accelerator = accelerator
        self._tokenizer = inputs.base.tokenizer
        assert inputs.data.eval is not None, "Evaluations.check"
        self.prompts: list[Prompt] = select_prompts(
            inputs.data.eval,
            self.spec.answer_prompts,
            tokenizer=self._tokenizer,
            task=recipe.task,
            loss_on=recipe.data.loss_on,
            option="training.answer_every",
            info=console.info if accelerator.is_main_process else console.no_output,
        )

    def is_due(self, step: int) -> bool:
        """Return whether the prompts are answered after `step`, neither the first nor the last."""
        return self.spec.answer_every is not None and step % self.spec.answer_every == 0

    def is_left_out(self, step: int, file: Path, *, ended: bool) -> bool:
        """Return whether answers after the last step done are missing in `file`: a signal came before their end.

        Args:
            step: the last one done.
            file: answers.jsonl.
            ended: whether it is the last step of the run.
        """
        written = sum(record.get("step") == step for record in read_metrics(file))
        return (ended or self.is_due(step)) and written < len(self.prompts)

    def answer(self, step: int, log: MetricsLog | None, info: Info, stopping: Stopping = never) -> None:
        """Answer the prompts, write the answers to `log`, and print the first one. Training is not affected.

        Only the first process has a log; the others answer too if the model is sharded.

        If a signal stops it, it writes none.
        """
        if not self.prompts:
            return
        spec = GenerationSpec(max_new_tokens=self._recipe.generation.max_new_tokens)
        cuda = torch.cuda.is_available()
        with averaged_weights(self._optimizer), torch.random.fork_rng(range(torch.cuda.device_count()) if cuda else []):
            answers = generate_answers(
                self._model,
                self._tokenizer,
                self.prompts,
                spec=spec,
                seed=self.spec.seed,
                stopping=synchronized(stopping, self._model, self._accelerator),
            )
        if not answers or log is None:
            return
        for prompt, answer in zip(self.prompts, answers, strict=True):
            log.write(
                {
                    "step": step,
                    "where": prompt.where,
                    "prompt": prompt.text,
                    "references": prompt.references,
                    "answer": answer.text,
                    "finished": answer.finished,
                }
            )
        info(f"answer at step {step} to {self.prompts[0].where}: {shorten(answers[0].text, 100) or '(empty)'}")
