"""What one tracker is to track: the run, its place in the tracker, and how the run ends. No libraries."""

import os
from pathlib import Path
from typing import Literal, NamedTuple

from lora_cli.recipe.tracking_section import PROJECT, TRACKERS, TrackerName, TrackingSpec

Status = Literal["finished", "stopped", "failed"]


class Job(NamedTuple):
    """A run to track with one tracker."""

    tracker: TrackerName
    spec: TrackingSpec
    run: Path  # the run folder
    run_id: str | None  # of the tracked run that goes on; None for a new one
    configured: bool  # it has its configuration
    new_id: str  # of a new one, where its id can be chosen: 32 hexadecimal digits
    done: int  # steps of the run before this start
    pid: int  # of the training process

    @property
    def folder(self) -> Path:
        """Folder of the trackers in the run folder."""
        return self.run / "tracking"

    @property
    def name(self) -> str:
        """Name of the tracked run."""
        return self.spec.name or self.run.resolve().name

    @property
    def project(self) -> str:
        """Project of the tracked run."""
        variable = TRACKERS[self.tracker].project_variable
        return self.spec.project or (os.environ.get(variable) if variable else None) or PROJECT

    @property
    def where(self) -> dict[str, str | bool | None]:
        """Return what decides on the store of the tracked run: with another one, another tracked run begins."""
        spec = self.spec
        if self.tracker == "tensorboard":  # in the run folder
            return {}
        store = {"mlflow": spec.server, "trackio": spec.space}.get(self.tracker)
        return {"project": self.project, "entity": spec.entity, "store": store}
