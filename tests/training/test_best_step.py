"""The evaluation history: which step is best, when a run stops early, and what a checkpoint restores."""

from pathlib import Path

import numpy as np
import pytest

from lora_cli.training.best_step import Evaluated, EvaluationHistory, RowLosses


def history_of(losses: list[float], *, start_is_candidate: bool = False) -> EvaluationHistory:
    history = EvaluationHistory(start_is_candidate=start_is_candidate)
    for number, loss in enumerate(losses):
        history.add(10 * number, loss, RowLosses(np.array([loss, 2 * loss]), np.array([1, 2])))
    return history


@pytest.mark.parametrize(
    ("losses", "best", "without_gain"),
    [
        ([3.0], None, 0),
        ([3.0, 2.0], 10, 0),
        ([3.0, 2.0, 2.5, 2.0], 10, 2),  # an equal loss is no gain, and the earlier step is kept
        ([3.0, 4.0, 3.5], 20, 2),  # the base is best: it counts for stopping, but is no adapter
        ([3.0, 2.0, 2.5, 1.0], 30, 0),
    ],
)
def test_the_best_step_and_the_evaluations_without_gain(losses: list[float], best: int | None, without_gain: int):
    history = history_of(losses)
    assert (history.best and history.best.step) == best
    assert history.without_gain == without_gain
    assert [history.should_stop(n) for n in (None, without_gain + 1)] == [False, False]
    assert history.should_stop(without_gain) or not without_gain


def test_the_adapter_that_training_goes_on_from_can_be_the_best():
    assert history_of([3.0, 4.0, 3.5], start_is_candidate=True).best == Evaluated(0, 3.0)


def test_a_checkpoint_restores_the_history_and_the_rows_that_are_compared(tmp_path: Path):
    history = history_of([3.0, 2.0, 2.5, 2.2])
    assert set(history.rows) == {0, 10, 30}  # the start, the best and the last
    history.save_rows(tmp_path)
    restored = EvaluationHistory(start_is_candidate=False)
    restored.restore({"evaluations": history.to_json()}, tmp_path)
    assert restored.evaluations == history.evaluations
    assert {step: rows.loss.tolist() for step, rows in restored.rows.items()} == {
        0: [3.0, 6.0],
        10: [2.0, 4.0],
        30: [2.2, 4.4],
    }
