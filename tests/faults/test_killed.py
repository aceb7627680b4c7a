"""A run killed with SIGKILL resumes from its last checkpoint, and its result equals that of the uninterrupted run."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.commands.conftest import LORA_ON_ONE_CORE, Lora, WriteRecipe

pytestmark = pytest.mark.slow


def test_a_run_resumed_after_sigkill_equals_the_uninterrupted_run(recipe: WriteRecipe, lora: Lora):
    recipe({"training.max_steps": 40, "training.save_every": 5, "training.eval_every": None})
    assert lora("train", "recipe.yaml", "--output", "runs/complete").code == 0
    first = Path("runs/a/checkpoints/step-00000005")
    with subprocess.Popen(
        [*LORA_ON_ONE_CORE, "train", "recipe.yaml"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as run:
        while not first.exists() and run.poll() is None:
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    assert not Path("runs/a/adapter").exists()
    resumed = lora("train", "recipe.yaml", "--resume")
    assert resumed.code == 0, resumed.err
    assert "resuming after step " in resumed.err
    records = [json.loads(line) for line in Path("runs/a/metrics.jsonl").read_text().splitlines()]
    # Every step occurs once, although the killed process had logged steps after its last checkpoint.
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 41))
    name = "adapter/adapter_model.safetensors"
    assert (Path("runs/a") / name).read_bytes() == (Path("runs/complete") / name).read_bytes()
    assert [p.name for p in Path("runs/a").rglob(".*-*") if p.name != ".lora-lock"] == []
