"""Signals in every phase of a command: it ends with its code and one line, and leaves nothing half."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands.conftest import LORA_ON_ONE_CORE, WriteRecipe
from tests.faults.signal_phases import PHASES, find_problems, send_in_phase
from tests.support.warm_lora import WarmLora

pytestmark = pytest.mark.slow

# Some phases, each with another signal; scripts/faults tries all of them with all signals.
QUICK = {
    "train encoding": (signal.SIGHUP,),
    "train base evaluation": (signal.SIGTERM,),
    "train save": (signal.SIGINT, signal.SIGTERM),
    "train proof": (signal.SIGINT,),
    "merge tensors": (signal.SIGTERM,),
    "export gguf files": (signal.SIGHUP,),
    "eval measure": (signal.SIGINT,),
}
BY_NAME = {f"{phase.command} {phase.name}": phase for phase in PHASES}


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmLora]:
    with WarmLora() as lora:
        yield lora


@pytest.mark.parametrize("name", QUICK)
def test_a_signal_ends_each_phase_in_one_line_and_leaves_nothing_half(
    name: str, warm: WarmLora, trained_run: Path, recipe: WriteRecipe, tmp_path: Path
):
    phase = BY_NAME[name]
    if phase.command == "train":
        trained_run.rename("runs/finished")
        recipe({"training.max_steps": 12, "training.save_every": 6, "training.eval_every": 4})
    end = send_in_phase(warm, phase, tmp_path, QUICK[name], environment={"LORA_CACHE": str(tmp_path / "cache")})
    assert end is not None
    assert end.code != 0, "the signal came too late"
    assert find_problems(end, training=phase.training) == []
    assert not Path(phase.arguments[-1]).exists() or phase.command in ("train", "eval")


def test_a_run_stopped_by_sigterm_under_nohup_resumes_to_the_same_adapter(
    warm: WarmLora, recipe: WriteRecipe, tmp_path: Path
):
    """A parent that ignores SIGINT and SIGHUP: both stay ignored, and SIGTERM stops the run after the step."""
    recipe({"training.max_steps": 12, "training.save_every": 6, "training.eval_every": 4})
    assert warm.wait(warm.start(["train", "recipe.yaml", "--output", "runs/whole"], tmp_path)) == 0
    ignored = (signal.SIGINT, signal.SIGHUP)
    end = send_in_phase(warm, BY_NAME["train step"], tmp_path, (*ignored, signal.SIGTERM), ignored=ignored)
    assert end is not None
    assert end.code == 143, end.err
    assert end.last_line.startswith("stopped after step ")
    assert warm.wait(warm.start(["train", "recipe.yaml", "--resume"], tmp_path)) == 0
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "runs/a" / name).read_bytes() == (tmp_path / "runs/whole" / name).read_bytes()


def test_a_signal_during_the_import_of_libraries(recipe: WriteRecipe, tmp_path: Path):
    """In a new process: extensions in C turn an exception in the middle of their import into other errors."""
    import subprocess

    recipe()
    with subprocess.Popen([*LORA_ON_ONE_CORE, "train", "recipe.yaml"], stderr=subprocess.PIPE, text=True) as run:
        maps = Path(f"/proc/{run.pid}/maps")
        while "libtorch_cpu" not in maps.read_text():
            time.sleep(0.001)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=120)
    assert (run.returncode, err) == (130, "stopped by SIGINT\n")
    assert not Path("runs").exists()
