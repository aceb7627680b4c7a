"""Records of the metrics log on their way to a tracker: their order, what it has, and what it lacks. No torch."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.errors import LoraError
from lora_cli.run.metrics_log import MetricsFollower, read_metrics
from lora_cli.run.read_file import read_json_object

EVALUATION = {"eval_loss": "eval/loss", "eval_accuracy": "eval/accuracy"}  # keys of metrics.jsonl, and of trackers

Mark = tuple[int, int]  # place of a record in the order in which it is sent: its step; 0 for training, 1 for evaluation
START: Mark = (-1, 0)


class Counts(NamedTuple):
    """Numbers of records."""

    steps: int
    evaluations: int


def mark_of(record: Mapping[str, Any]) -> Mark:
    """Return the place of a record of metrics.jsonl."""
    return int(record["step"]), int("eval_loss" in record)


def values_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record by the names that trackers show: `train/loss`, `eval/loss`."""
    return {
        EVALUATION.get(key, f"train/{key}"): value
        for key, value in record.items()
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def count(marks: Iterable[Mark]) -> Counts:
    """Return how many of the records are steps and evaluations."""
    kinds = [kind for _, kind in marks]
    return Counts(len(kinds) - sum(kinds), sum(kinds))


def count_after(metrics: Path, mark: Mark) -> Counts:
    """Return how many records of a metrics log follow `mark`.

    Raises:
        UnreadableError: the system refuses to open the log.
    """
    return count({found for record in read_metrics(metrics) if (found := mark_of(record)) > mark})


class State(NamedTuple):
    """What the run folder records of a tracked run, in `tracking/NAME.json`."""

    id: str | None = None
    where: Mapping[str, Any] | None = None  # its project and store
    mark: Mark = START  # of the last record that the tracker has
    configured: bool = False  # the tracker has the configuration

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {**self._asdict(), "mark": list(self.mark)}


def read_state(path: Path) -> State:
    """Return the state in `path`; a new one if there is none, or it is damaged."""
    try:
        values = read_json_object(path)
        step, kind = values["mark"]
        return State(str(values["id"]), values["where"], (int(step), int(kind)), bool(values["configured"]))
    except (LoraError, OSError, ValueError, KeyError, TypeError):
        return State()


class Pending:
    """Records of the metrics log that the tracker does not have yet, in order."""

    def __init__(self, path: Path, mark: Mark, awaits_evaluation: Callable[[int], bool]) -> None:
        """`awaits_evaluation` tells whether an evaluation after a step is due.

        Such a step is held until its evaluation is there: W&B takes no more values of a step once the next one began,
        and a run that is stopped during the evaluation makes it when it is resumed.
        """
        self._follower = MetricsFollower(path)
        self._records: deque[dict[str, Any]] = deque()
        self._mark = mark
        self._awaits_evaluation = awaits_evaluation

    def read(self, *, reopen: bool = True) -> None:
        """Read what was written since the last call; see MetricsFollower.read."""
        for record in self._follower.read(reopen=reopen):
            if mark_of(record) > self._mark:
                self._records.append(record)
                self._mark = mark_of(record)

    def next(self, *, whole: bool = False) -> dict[str, Any] | None:
        """Return the next record, which stays the next one; with `whole`, also one whose evaluation is awaited."""
        if not self._records:
            return None
        step, kind = mark_of(self._records[0])
        held = kind == 0 and len(self._records) == 1 and self._awaits_evaluation(step)
        return None if held and not whole else self._records[0]

    def remove(self) -> None:
        """Remove the next record."""
        self._records.popleft()

    @property
    def left(self) -> Counts:
        """Numbers of the records that are left."""
        return count(map(mark_of, self._records))
