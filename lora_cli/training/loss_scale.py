"""Loss scale for float16: gradients are multiplied by it in the backward pass, so that small ones are not rounded to 0.

It is dynamic (Micikevicius et al., arXiv:1710.03740, section 3.2): halved when a gradient overflows, doubled after many
steps without. A step that overflows is taken again with the lower scale, so that none is lost.
"""

from collections.abc import Mapping
from typing import Any

START, LOWEST, HIGHEST = 2.0**10, 2.0**-10, 2.0**16
GROWTH_INTERVAL = 2000  # steps without an overflow, after which the scale is doubled


class LossScale:
    """The scale of a run, and how often it was lowered. All processes of a run have equal ones."""

    def __init__(self, *, enabled: bool) -> None:
        """`enabled`: whether the run multiplies in float16; if not, the scale is and stays 1."""
        self.enabled = enabled
        self.value = START if enabled else 1.0
        self.overflows = 0
        self._steps = 0  # since the scale changed

    def lower(self) -> bool:
        """Halve the scale after an overflow; return False if no lower one would help."""
        if not self.enabled or self.value <= LOWEST:
            return False
        self.value /= 2
        self.overflows += 1
        self._steps = 0
        return True

    def count_step(self) -> None:
        """Count a step without an overflow."""
        self._steps += 1
        if self.enabled and self._steps >= GROWTH_INTERVAL and self.value < HIGHEST:
            self.value *= 2
            self._steps = 0

    def to_json(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"value": self.value, "overflows": self.overflows, "steps": self._steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load what `to_json` returned."""
        self.value, self.overflows, self._steps = state["value"], state["overflows"], state["steps"]
