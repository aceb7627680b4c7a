"""Loss spikes: losses far above those of the last steps, told or skipped (training.on_spike).

The losses that a step is compared with are part of each checkpoint, so that a resumed run makes the same decisions.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_cli.errors import LoraError

WINDOW = 128  # steps that a loss is compared with: the last ones
MIN_STEPS = 16  # of them, before any loss is called a spike
SIGMAS = 6.0  # standard deviations above the mean
# Least standard deviation: a share of the mean, and nats. In a flat loss, rounding alone would be many deviations.
MIN_RELATIVE_SIGMA, MIN_SIGMA = 0.01, 1e-3
MAX_SKIPPED_IN_A_ROW = 8  # then the weights are damaged, or the loss has another level: skipping does not help
ROWS_SHOWN = 5


class Spike(NamedTuple):
    """What is unusual in a step: its loss is a spike, or its loss or gradient is not finite."""

    problem: str  # of its loss, as text
    rows: Sequence[str]  # locations of rows in it: those of its batch with the highest loss, or of what is not finite
    skipped: bool  # the parameters, and the optimizer's state, stay as before the step
    mean: float | None = None  # nats, of the losses before it; None if loss or gradient is not finite
    sigma: float | None = None  # nats, their standard deviation

    def line(self, number: int) -> str:
        """Return one line on the spike in optimizer step `number`."""
        end = "; skipped: the weights stay as they were (training.on_spike)" if self.skipped else ""
        return f"step {number}: {self.problem}; {describe_rows(self.rows)}{end}"

    def record(self) -> dict[str, Any]:
        """Return the keys that metrics.jsonl has for this step in addition."""
        return {"spike": {"mean": self.mean, "sigma": self.sigma}, "skipped": self.skipped}


def describe_rows(rows: Sequence[str]) -> str:
    """Return `its rows: data/train.jsonl:17, ...`, at most ROWS_SHOWN of them."""
    more = f" and {len(rows) - ROWS_SHOWN} more" if len(rows) > ROWS_SHOWN else ""
    return f"its rows: {', '.join(rows[:ROWS_SHOWN])}{more}"


class UsualLoss(NamedTuple):
    """The losses of the steps before a spike, in nats."""

    mean: float
    sigma: float  # standard deviation
    steps: int

    def describe(self, loss: float) -> str:
        """Return how far `loss` is above them."""
        return (
            f"the loss {loss:.4f} is a spike, {(loss - self.mean) / self.sigma:.1f} sigma above the mean of the last "
            f"{self.steps} steps ({self.mean:.4f}, sigma {self.sigma:.4f})"
        )


class LossSpikes:
    """The losses of the last steps, and the number of spikes so far. All processes of a run have equal ones."""

    def __init__(self) -> None:
        self.count = 0  # spikes, those that are not finite included
        self.skipped = 0  # steps
        self._losses: deque[float] = deque(maxlen=WINDOW)  # nats
        self._skipped_in_a_row = 0

    def compare(self, loss: float) -> UsualLoss | None:
        """Return the losses before `loss` (nats) if it is a spike, else None; remember it.

        A spike is remembered as a loss at the limit: one spike does not hide the next one, and after a lasting change
        of the loss its steps are soon no spikes any more.
        """
        spike = None
        steps = len(self._losses)
        if steps >= MIN_STEPS:
            mean = math.fsum(self._losses) / steps
            deviation = math.sqrt(math.fsum((each - mean) ** 2 for each in self._losses) / steps)
            sigma = max(deviation, MIN_RELATIVE_SIGMA * abs(mean), MIN_SIGMA)
            limit = mean + SIGMAS * sigma
            if loss > limit:
                spike, loss = UsualLoss(mean, sigma, steps), limit
        self._losses.append(loss)
        return spike

    def add(self, number: int, spike: Spike | None) -> None:
        """Count what step `number` was; call it after each step, with None for an ordinary one.

        Raises:
            LoraError: too many steps in a row were skipped.
        """
        self.count += spike is not None
        if spike is None or not spike.skipped:
            self._skipped_in_a_row = 0
            return
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise LoraError(
                f"step {number}: {spike.problem}, and so were the {MAX_SKIPPED_IN_A_ROW} steps before it, which "
                f"training.on_spike: skip left out; {describe_rows(spike.rows)}",
                hint="skipping does not bring the loss back: train again with a lower training.learning_rate or a "
                "longer training.warmup, and inspect these rows; the last checkpoint is from before this step",
                exit_code=1,
            )

    def to_json(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "count": self.count,
            "skipped": self.skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "losses": list(self._losses),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load what `to_json` returned."""
        self.count, self.skipped = state["count"], state["skipped"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self._losses = deque(state["losses"], maxlen=WINDOW)

    def summary(self) -> str | None:
        """Return a line on all spikes of the run; None without any."""
        if not self.count:
            return None
        plural = "s" * (self.count > 1)
        skipped = {0: "trained on", self.count: "skipped"}.get(self.skipped, f"{self.skipped} of them skipped")
        return f"{self.count} loss spike{plural}, {skipped}: `spike` in metrics.jsonl"
