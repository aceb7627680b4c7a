"""A run folder with metrics, as training writes it, and what its trackers have told."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_cli.recipe.tracking_section import TrackingSpec
from lora_cli.run.metrics_log import MetricsLog
from lora_cli.training.tracking import Tracking

CONFIG = {"recipe": {"training": {"eval_every": 2}, "name": "a"}, "steps": 4, "ledger": {"eval": {"rows": 3}}}


class Run:
    """A run folder with metrics, as training writes it."""

    def __init__(self, path: Path) -> None:
        self.path, self.told = path, list[str]()
        (path / "tracking").mkdir(parents=True, exist_ok=True)
        (path / "tracking" / "config.json").write_text(json.dumps(CONFIG))

    def write(self, *steps: int) -> None:
        with MetricsLog(self.path / "metrics.jsonl") as log:
            for step in steps:
                log.write({"step": step, "loss": 1 / step})
                if step % 2 == 0:
                    log.write({"step": step, "eval_loss": 1 / step})

    def track(self, done: int = 0, **spec: Any) -> Tracking:
        return Tracking(TrackingSpec.model_validate(spec), self.path, done=done, info=self.told.append)

    def wait_for(self, trackers: Tracking, happened: Callable[[], bool]) -> None:
        for _ in range(600):
            trackers.poll()
            if happened():
                return
            time.sleep(0.1)
        raise TimeoutError(str(self.told))
