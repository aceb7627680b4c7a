"""Laws of runs that are killed and started again, on one machine and on two: two network namespaces with a cable."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lora_cli.training.checkpoint_folders import checkpoint_damage
from tests.laws.test_runs import Workspace, same_bits, wait_for_losses, weights

pytestmark = pytest.mark.slow

ALL_CORES = os.sched_getaffinity(0)
# A step of dropout on two processes; a checkpoint every few steps, so that a kill loses some.
TRAINING = {"gradient_accumulation": 1, "eval_every": None, "save_every": 5, "max_steps": 160}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use a separate cache and one core, so that all processes sum in the same order, however many a machine has."""
    os.sched_setaffinity(0, {max(ALL_CORES)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    os.sched_setaffinity(0, ALL_CORES)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("runs"), tiny_folder)


@pytest.fixture(scope="module")
def two(workspace: Workspace) -> Path:
    """An uninterrupted run in two processes."""
    process = workspace.start("two", "--processes", "2", **TRAINING)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    return workspace.folder / "two"


def workers_of(process: subprocess.Popen[Any]) -> list[psutil.Process]:
    """Return the processes that a launcher has started, by rank."""
    return sorted(psutil.Process(process.pid).children(), key=lambda worker: worker.pid)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_run_that_restarts_after_a_kill_equals_an_uninterrupted_one(killed: int, workspace: Workspace, two: Path):
    run = workspace.folder / f"restarted-{killed}"
    process = workspace.start(run.name, "--processes", "2", "--max-restarts", "1", **TRAINING)
    wait_for_losses(run, process, more_than=12)
    workers_of(process)[killed].kill()
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert re.findall("^error: .* was ended by SIGKILL$", stderr, re.MULTILINE) == [
        f"error: process {killed} ({os.uname().nodename}) was ended by SIGKILL"
    ]
    assert stderr.count("error: ") == 1
    assert "starting all 2 processes again, from the newest checkpoint: restart 1 of 1" in stderr
    assert "resuming after step " in stderr
    assert same_bits(weights(run), weights(two))


def test_a_run_of_one_process_restarts_too(workspace: Workspace):
    whole = workspace.train("one-whole", **{**TRAINING, "gradient_accumulation": 2})
    run = workspace.folder / "one"
    process = workspace.start("one", "--max-restarts", "2", **{**TRAINING, "gradient_accumulation": 2})
    wait_for_losses(run, process, more_than=12)
    workers_of(process)[0].kill()
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert "starting the process again, from the newest checkpoint: restart 1 of 2" in stderr
    assert same_bits(weights(run), weights(whole))


def test_workers_that_torchrun_starts_again_resume_the_run(workspace: Workspace, two: Path):
    run = workspace.folder / "torchrun"
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "lora_cli", "train"]
    command = [*TORCHRUN, *options, str(workspace.recipe(run.name, **TRAINING))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for_losses(run, process, more_than=12)
    workers_of(process)[1].kill()
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert "resuming after step " in stderr
    assert same_bits(weights(run), weights(two))


class Machines:
    """Two machines with names and addresses of their own; they share all disks, except for their caches."""

    NAMES = ("machine-a", "machine-b")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spaces = [f"lora-{os.getpid()}-{letter}" for letter in "ab"]
        self.started: list[subprocess.Popen[bytes]] = []
        (folder / "hosts").write_text("127.0.0.1 localhost\n10.99.0.1 machine-a\n10.99.0.2 machine-b\n")
        for space in self.spaces:
            self._ip("netns", "add", space)
        a, b = self.spaces
        self._ip("link", "add", "veth0", "netns", a, "type", "veth", "peer", "name", "veth0", "netns", b)
        for number, space in enumerate(self.spaces, 1):
            self._ip("-n", space, "address", "add", f"10.99.0.{number}/24", "dev", "veth0")
            for device in ("lo", "veth0"):
                self._ip("-n", space, "link", "set", device, "up")

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    def close(self) -> None:
        for process in self.started:
            self.kill(process)
        for space in self.spaces:
            subprocess.run(["ip", "netns", "delete", space], check=False, capture_output=True)

    def start(self, at: int, recipe: Path, *options: str, hidden: Path | None = None) -> subprocess.Popen[bytes]:
        """Run `lora train` under torchrun on machine `at`, with an empty folder in the place of `hidden`."""
        setup = f"hostname {self.NAMES[at]} && mount --bind {self.folder}/hosts /etc/hosts"
        if hidden is not None:
            setup += f" && mount -t tmpfs tmpfs {hidden}"
        shell = ["ip", "netns", "exec", self.spaces[at], "unshare", "--uts", "--mount", "sh", "-c"]
        rendezvous = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", recipe.stem]
        command = [*TORCHRUN, *rendezvous, "--rdzv-endpoint", "10.99.0.1:29400", "-m", "lora_cli", "train"]
        with self.log(at, recipe).open("ab") as log:
            process = subprocess.Popen(
                [*shell, f'{setup} && exec "$@"', "sh", *command, str(recipe), *options],
                env=os.environ | {"LORA_CACHE": str(self.folder / f"cache-{at}")},
                stdout=log,
                stderr=log,
            )
        self.started.append(process)
        return process

    def log(self, at: int, recipe: Path) -> Path:
        return self.folder / f"{recipe.stem}-{at}.log"

    def messages(self, at: int, recipe: Path) -> list[str]:
        """Return the `error:` lines of the workers on machine `at`."""
        return re.findall("^error: (.*)$", self.log(at, recipe).read_text(), re.MULTILINE)

    @staticmethod
    def kill(process: subprocess.Popen[bytes]) -> None:
        """Kill all processes of a machine, as if its power was cut off; its kernel still closes connections."""
        if process.poll() is None:
            for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                each.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("iproute2 or util-linux is not installed")
    try:
        found = Machines(tmp_path)
        subprocess.run(["unshare", "--uts", "--mount", "true"], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this process may not create network namespaces: {error.stderr.decode().strip()}")
    yield found
    found.close()


def test_a_machine_that_is_lost_ends_the_run_which_both_resume_to_the_same_adapter(
    machines: Machines, workspace: Workspace, two: Path
):
    recipe = workspace.recipe("machines", **TRAINING)
    run = workspace.folder / "machines"
    first, second = (machines.start(at, recipe) for at in range(2))
    wait_for_losses(run, first, more_than=12)
    machines.kill(second)
    start = time.monotonic()
    assert first.wait(timeout=60) == 1
    assert time.monotonic() - start < 30
    assert machines.messages(0, recipe) == ["process 1 (machine-b) ended"]
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    assert checkpoints
    assert [checkpoint_damage(folder) for folder in checkpoints] == [None] * len(checkpoints)
    resumed = [machines.start(at, recipe, "--resume") for at in range(2)]
    assert [process.wait(timeout=240) for process in resumed] == [0, 0]
    assert "resuming after step " in machines.log(0, recipe).read_text()
    assert same_bits(weights(run), weights(two))


def test_a_machine_without_the_rows_or_the_checkpoint_is_named(
    machines: Machines, workspace: Workspace, two: Path, tmp_path: Path
):
    rows = tmp_path / "data" / "rows.jsonl"
    rows.parent.mkdir()
    shutil.copy(workspace.folder / "rows.jsonl", rows)
    recipe = workspace.recipe("rows", **TRAINING)
    started = [
        machines.start(at, recipe, "--set", f"data.train={rows}", hidden=rows.parent if at else None) for at in range(2)
    ]
    assert [process.wait(timeout=120) for process in started] == [1, 1]  # torchrun's own exit code
    assert machines.messages(1, recipe) == [f"process 1 (machine-b): data: {rows} does not exist"]
    assert machines.messages(0, recipe) == [f"process 1 (machine-b) failed: data: {rows} does not exist"]
    recipe, checkpoints = workspace.recipe("two", **TRAINING), two / "checkpoints"
    started = [machines.start(at, recipe, "--resume", hidden=checkpoints if at else None) for at in range(2)]
    assert [process.wait(timeout=120) for process in started] == [1, 1]
    message = "process 1 (machine-b) resumes from no checkpoint, process 0 (machine-a) from the checkpoint of step 160"
    for at in range(2):
        assert machines.messages(at, recipe) == [f"{message} of {two}"]
        assert "on a disk that all machines share" in machines.log(at, recipe).read_text()
