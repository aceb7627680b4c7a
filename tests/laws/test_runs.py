"""Laws of complete runs of `lora train`: repeating, resuming, two processes (DDP), and loading in plain PEFT."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli.commands.train import train
from lora_cli.errors import LoraError
from lora_cli.recipe.load import load_recipe
from lora_cli.run import metrics_log
from lora_cli.training import launch
from tests.model import families, zoo
from tests.model.families import FAMILIES
from tests.support import short_of_memory

pytestmark = pytest.mark.slow

STEPS = 24
ALL_CORES = os.sched_getaffinity(0)
BELL = "\x07"  # a character that occurs in no row, unless a test inserts it


def write_rows(path: Path, count: int = 60) -> None:
    """Write questions and answers of different lengths."""
    lines = []
    for n in range(count):
        question, answer = f"question {n} " + "the fox " * (n % 7), "answer " * (1 + n * n % 11) + str(n)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")


class Workspace:
    """A folder with rows, the path of the tiny model, and runs of one recipe."""

    def __init__(self, folder: Path, model: Path, **data: Any) -> None:
        """`data` are keys of the recipe's data section."""
        self.folder, self.model, self.data = folder, model, data
        write_rows(folder / "rows.jsonl")

    def recipe(self, run: str, **training: Any) -> Path:
        """Write a recipe with dropout, accumulation and packing: 24 steps, in epochs of an odd number of batches."""
        defaults = {"max_steps": STEPS, "tokens_per_batch": 256, "gradient_accumulation": 2, "learning_rate": 1e-3}
        defaults |= {"eval_every": 1, "save_every": 1000, "seed": 7}
        sections = {
            "model": {"path": str(self.model), "dtype": "float32"},
            "adapter": {"rank": 4, "dropout": 0.2},
            "data": {"train": str(self.folder / "rows.jsonl"), "eval": 0.1, "max_length": 128, **self.data},
            "training": {**defaults, **training},
            "output": str(self.folder / run),
        }
        path = self.folder / f"{run}.yaml"
        path.write_text(yaml.safe_dump(sections))
        return path

    def train(self, run: str, *, resume: bool = False, **training: Any) -> Path:
        """Train in this process; earlier runs in the same process must not change the result."""
        assert train(load_recipe(self.recipe(run, **training)), resume=resume, fresh=False, arguments=[]) == 0
        return self.folder / run

    def start(self, run: str, *options: str, **training: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "lora_cli", "train", str(self.recipe(run, **training)), *options]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def start_two_processes(self, run: str, *options: str, **training: Any) -> subprocess.Popen[str]:
        one_core = os.sched_getaffinity(0)
        os.sched_setaffinity(0, ALL_CORES)  # inherited by the process that is started
        process = self.start(run, "--processes", "2", *options, **training)
        os.sched_setaffinity(0, one_core)
        return process


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return all records, without their times and memory."""
    return [
        {k: v for k, v in record.items() if k not in ("seconds", "peak_memory")}
        for record in metrics_log.read_metrics(run / "metrics.jsonl")
    ]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in metrics(run) if "loss" in record]


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for something that `process` does while it runs."""
    deadline = time.monotonic() + 240
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_for_losses(run: Path, process: subprocess.Popen[str], *, more_than: int = 0) -> None:
    wait_until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > more_than, process)


def stop(run: Path, process: subprocess.Popen[str]) -> tuple[int, str]:
    """Send SIGINT to a process that trains; return the step that it saved, and its stderr."""
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    (saved,) = (run / "checkpoints").iterdir()
    return int(saved.name.removeprefix("step-")), stderr


def records_until(run: Path, until: int) -> list[dict[str, Any]]:
    """Return the records up to step `until` with their times, which differ if a resumed run repeats these steps."""
    return [record for record in metrics_log.read_metrics(run / "metrics.jsonl") if record["step"] <= until]


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use a separate cache and one core, because threads that wait for each other are slow on a busy machine."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {sorted(ALL_CORES)[worker % len(ALL_CORES)]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    os.sched_setaffinity(0, ALL_CORES)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("runs"), tiny_folder)


@pytest.fixture(scope="module")
def uninterrupted(workspace: Workspace) -> Path:
    return workspace.train("uninterrupted")


def test_the_loss_falls_and_the_last_step_of_an_epoch_is_smaller(uninterrupted: Path):
    """Needed because the laws below would also hold for a run that learns nothing."""
    loss_of_steps = losses(uninterrupted)
    assert len(loss_of_steps) == STEPS
    assert sum(loss_of_steps[-5:]) < 0.9 * sum(loss_of_steps[:5])
    tokens = [record["tokens"] for record in metrics(uninterrupted) if "loss" in record]
    assert min(tokens) < 0.7 * max(tokens)  # the last step of an epoch has one batch, the others have two


def test_the_same_seed_gives_the_same_adapter(workspace: Workspace, uninterrupted: Path):
    again = workspace.train("again")
    assert same_bits(weights(again), weights(uninterrupted))
    assert metrics(again) == metrics(uninterrupted)


def test_another_seed_gives_another_adapter(workspace: Workspace, uninterrupted: Path):
    other = workspace.train("other", seed=8)
    assert not any(torch.equal(weights(other)[name], tensor) for name, tensor in weights(uninterrupted).items())


def test_a_run_stopped_by_sigint_and_resumed_equals_the_uninterrupted_run(workspace: Workspace, uninterrupted: Path):
    run, process = workspace.folder / "stopped", workspace.start("stopped")
    wait_for_losses(run, process)
    done, stderr = stop(run, process)
    assert 0 < done < STEPS
    assert f"stopped after step {done}" in stderr
    before = records_until(run, done)
    resumed = workspace.train("stopped", resume=True)
    # The signal leaves out the evaluation of its step, which the resumed run makes first.
    assert records_until(resumed, done)[: len(before)] == before
    assert same_bits(weights(resumed), weights(uninterrupted))
    assert metrics(resumed) == metrics(uninterrupted)


def test_a_run_resumed_from_an_older_checkpoint_equals_the_uninterrupted_run(workspace: Workspace):
    """As after a power failure: the metrics log contains steps after the last checkpoint."""
    complete = workspace.train("saving", save_every=7, keep_checkpoints=9)
    copy = shutil.copytree(complete, workspace.folder / "copy")
    shutil.rmtree(copy / "adapter")
    for later in sorted((copy / "checkpoints").iterdir())[1:]:
        shutil.rmtree(later)
    resumed = workspace.train("copy", resume=True, save_every=7, keep_checkpoints=9)
    assert records_until(resumed, 7) == records_until(complete, 7)
    assert records_until(resumed, STEPS) != records_until(complete, STEPS)
    assert same_bits(weights(resumed), weights(complete))
    assert metrics(resumed) == metrics(complete)


def test_resuming_a_run_on_experts_in_4_bits_equals_the_uninterrupted_run(workspace: Workspace, tmp_path: Path):
    """The packed weights are made again when a run resumes, and its adapter is on stacked experts."""
    mixture = tmp_path / "qwen3-moe"
    tokenizer = AutoTokenizer.from_pretrained(workspace.model)
    size = {"vocab_size": len(tokenizer), "bos_token_id": None, "pad_token_id": None}
    family = FAMILIES["qwen3-moe"]
    families.write(family._replace(options={**family.options, **size}), mixture)
    tokenizer.save_pretrained(mixture)

    def run(name: str, *, resume: bool = False) -> Path:
        path = workspace.recipe(name, max_steps=4, save_every=2, keep_checkpoints=9)
        sections = yaml.safe_load(path.read_text())
        sections["model"]["path"], sections["adapter"]["dropout"] = str(mixture), 0
        path.write_text(yaml.safe_dump({**sections, "quantization": {"bits": 4}}))
        assert train(load_recipe(path), resume=resume, fresh=False, arguments=[]) == 0
        return workspace.folder / name

    complete = run("experts")
    copy = shutil.copytree(complete, workspace.folder / "resumed-experts")
    shutil.rmtree(copy / "adapter")
    shutil.rmtree(copy / "checkpoints" / "step-00000004")
    resumed = run("resumed-experts", resume=True)
    assert records_until(resumed, 4) != records_until(complete, 4)  # it did resume
    assert any("experts" in name and bool(tensor.any()) for name, tensor in weights(complete).items())
    assert same_bits(weights(resumed), weights(complete))
    assert metrics(resumed) == metrics(complete)


def test_saving_checkpoints_does_not_change_the_run_and_old_ones_are_removed(workspace: Workspace, uninterrupted: Path):
    run = workspace.train("checkpoints", save_every=4, keep_checkpoints=3)
    assert same_bits(weights(run), weights(uninterrupted))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-{n:08d}" for n in (16, 20, 24)]
    assert same_bits(load_file(run / "checkpoints" / f"step-{STEPS:08d}" / "adapter_model.safetensors"), weights(run))


@pytest.mark.parametrize("change", [{"seed": 8}, {"learning_rate": 2e-3}, {"max_steps": 30}, {"tokens_per_batch": 200}])
def test_a_changed_recipe_is_not_resumed(workspace: Workspace, uninterrupted: Path, change: dict[str, Any]):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    with pytest.raises(LoraError, match="changed since this checkpoint"):
        workspace.train("uninterrupted", resume=True, **change)
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def two(workspace: Workspace) -> Path:
    """The run of the same recipe in two processes."""
    process = workspace.start_two_processes("two", gradient_accumulation=1)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return workspace.folder / "two"


def test_two_processes_equal_one(two: Path, uninterrupted: Path):
    assert losses(two) == pytest.approx(losses(uninterrupted), rel=1e-5)
    for record, expected in zip(metrics(two), metrics(uninterrupted), strict=True):
        assert {k: v for k, v in record.items() if isinstance(v, int)} == {
            k: v for k, v in expected.items() if isinstance(v, int)
        }
        assert {k: v for k, v in record.items() if k != "grad_norm"} == pytest.approx(
            {k: v for k, v in expected.items() if k != "grad_norm"}, rel=1e-5
        )
    for name, tensor in weights(two).items():
        assert float((tensor - weights(uninterrupted)[name]).norm() / tensor.norm()) < 1e-5


@pytest.fixture(scope="module")
def sharded(workspace: Workspace) -> Path:
    """The run of the same recipe in two processes with a sharded base; a step has the batches of two processes."""
    command = ["--set", "distributed.strategy=fsdp"]
    process = workspace.start_two_processes("sharded", *command, gradient_accumulation=1, save_every=7)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "strategy: fsdp (set in the recipe)" in stderr.splitlines()
    assert "verified: the adapter on disk, loaded back, equals the trained model" in stderr
    return workspace.folder / "sharded"


def test_two_processes_with_a_sharded_base_equal_one(sharded: Path, uninterrupted: Path):
    assert losses(sharded) == pytest.approx(losses(uninterrupted), rel=1e-5)
    for name, tensor in weights(sharded).items():
        assert float((tensor - weights(uninterrupted)[name]).norm() / tensor.norm()) < 1e-4
    evaluations = [[r["eval_loss"] for r in metrics(run) if "eval_loss" in r] for run in (sharded, uninterrupted)]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-5)


def test_a_killed_run_with_a_sharded_base_goes_on_to_the_same_adapter(workspace: Workspace, sharded: Path):
    options = ["--set", "distributed.strategy=fsdp"]
    process = workspace.start_two_processes("killed", *options, gradient_accumulation=1, save_every=7)
    checkpoint = workspace.folder / "killed" / "checkpoints" / "step-00000007"
    wait_until(checkpoint.exists, process)
    for each in [*psutil.Process(process.pid).children(), psutil.Process(process.pid)]:
        each.kill()
    process.communicate()
    assert not (workspace.folder / "killed" / "adapter").exists()
    resumed = workspace.start_two_processes("killed", "--resume", *options, gradient_accumulation=1, save_every=7)
    _, stderr = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, stderr
    assert same_bits(weights(workspace.folder / "killed"), weights(sharded))


def test_processes_start_again_in_the_next_form_after_one_ran_out_of_memory_in_a_sharded_step(
    workspace: Workspace, sharded: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    script = Path(short_of_memory.__file__)
    monkeypatch.setattr(launch, "WORKER", (sys.executable, str(script)))
    monkeypatch.setenv("PYTHONPATH", str(script.parents[2]))
    path = workspace.recipe("short", gradient_accumulation=1, save_every=7)
    sections = yaml.safe_load(path.read_text()) | {"distributed": {"strategy": "fsdp", "processes": 2}}
    path.write_text(yaml.safe_dump(sections))
    one_core = os.sched_getaffinity(0)
    os.sched_setaffinity(0, ALL_CORES)
    code = train(load_recipe(path), resume=False, fresh=False, arguments=["train", str(path)])
    os.sched_setaffinity(0, one_core)
    stderr = capfd.readouterr().err
    assert code == 0, stderr
    told = f"step {short_of_memory.STEP} ran out of memory: every 4th layer is recomputed from here on"
    lines = [line for line in stderr.splitlines() if "ran out of memory" in line]
    assert lines == [f"process 1 ({socket.gethostname()}): {told}; all processes start again"]
    assert stderr.count("resuming after step 7") == 1
    assert "error" not in stderr
    manifest = json.loads((workspace.folder / "short" / "manifest.json").read_text())
    assert manifest["result"]["memory"]["every"] == 4
    assert losses(workspace.folder / "short") == pytest.approx(losses(sharded), rel=1e-5)
    for name, tensor in weights(workspace.folder / "short").items():
        assert float((tensor - weights(sharded)[name]).norm() / tensor.norm()) < 1e-4


def test_a_run_with_a_sharded_base_goes_on_in_one_process(workspace: Workspace, sharded: Path):
    copy = shutil.copytree(sharded, workspace.folder / "gathered")
    shutil.rmtree(copy / "adapter")
    for later in sorted((copy / "checkpoints").iterdir())[1:]:
        shutil.rmtree(later)
    resumed = workspace.train("gathered", resume=True, save_every=7)
    for name, tensor in weights(resumed).items():
        assert float((tensor - weights(sharded)[name]).norm() / tensor.norm()) < 1e-4


def test_a_run_in_one_process_goes_on_in_two(workspace: Workspace):
    """The recipe says how many tokens a step has, so the steps are the same; here without dropout's random numbers."""
    size = {"tokens_per_batch": "auto", "tokens_per_step": 512, "gradient_accumulation": 1}
    size |= {"save_every": 7, "keep_checkpoints": 9}

    def without_dropout(run: str) -> Path:
        path = workspace.recipe(run, **size)
        sections = yaml.safe_load(path.read_text())
        sections["adapter"]["dropout"] = 0.0
        path.write_text(yaml.safe_dump(sections))
        return path

    assert train(load_recipe(without_dropout("whole")), resume=False, fresh=False, arguments=[]) == 0
    whole = workspace.folder / "whole"
    copy = shutil.copytree(whole, workspace.folder / "more")
    shutil.rmtree(copy / "adapter")
    for later in sorted((copy / "checkpoints").iterdir())[1:]:
        shutil.rmtree(later)
    command = [sys.executable, "-m", "lora_cli", "train", str(without_dropout("more")), "--processes", "2", "--resume"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "processes 1 -> 2" in done.stderr
    assert "resuming after step 7" in done.stderr
    assert "each step is divided among 2 processes" in done.stderr
    assert losses(copy) == pytest.approx(losses(whole), rel=1e-5)
    for name, tensor in weights(copy).items():
        assert float((tensor - weights(whole)[name]).norm() / tensor.norm()) < 1e-4
    assert records_until(copy, STEPS) != records_until(whole, STEPS)  # it did resume


def test_two_processes_stopped_by_sigint_save_one_checkpoint_and_report_it_once(workspace: Workspace):
    run, process = workspace.folder / "pair", workspace.start_two_processes("pair", max_steps=2000, eval_every=None)
    wait_for_losses(run, process)
    done, stderr = stop(run, process)
    assert stderr.splitlines()[-1] == f"stopped after step {done}, which is saved; --resume continues from there"
    assert "Traceback" not in stderr


def test_two_processes_skip_the_same_loss_spike_as_one(workspace: Workspace, tmp_path: Path):
    base = tmp_path / "varied"  # a base on which rows have very different losses
    tokenizer = AutoTokenizer.from_pretrained(workspace.model)
    zoo.make("llama", vocab_size=len(tokenizer), initializer_range=1.0).save_pretrained(base)
    tokenizer.save_pretrained(base)
    own = Workspace(tmp_path, base, max_length=24, eval=None)  # one row per batch
    chats = [("line one", "line two")] * 79 + [("The fox", "quick Paris jumps capital brown 42")]
    messages = [[{"role": "user", "content": ask}, {"role": "assistant", "content": answer}] for ask, answer in chats]
    spec = {"tokens_per_batch": 24, "learning_rate": 1e-5, "eval_every": None, "on_spike": "skip", "seed": 0}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in messages))
    one = own.train("one", **spec)
    process = own.start_two_processes("two", gradient_accumulation=1, **spec)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    skipped = [[record["step"] for record in metrics(run) if record.get("skipped")] for run in (one, tmp_path / "two")]
    assert len(skipped[0]) == 1
    assert skipped[0] == skipped[1]
    assert stderr.count("is a spike") == 1
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)


def test_two_processes_whose_launcher_is_killed_stop_and_resume_to_the_same_adapter(workspace: Workspace, two: Path):
    run, process = workspace.folder / "lost", workspace.start_two_processes("lost", gradient_accumulation=1)
    wait_for_losses(run, process)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2, [worker.cmdline() for worker in workers]
    process.kill()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []
    _, stderr = process.communicate()
    assert "stopped after step" in stderr
    assert "Traceback" not in stderr
    assert not (run / "adapter").exists()
    resumed = workspace.start_two_processes("lost", "--resume", gradient_accumulation=1)
    _, stderr = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, stderr
    assert same_bits(weights(run), weights(two))


def test_plain_peft_loads_the_saved_adapter(workspace: Workspace, uninterrupted: Path):
    last = metrics(uninterrupted)[-1]["eval_loss"]
    ids = torch.arange(5, 60)[None]

    def load_base() -> Any:
        return AutoModelForCausalLM.from_pretrained(workspace.model, dtype=torch.float32, attn_implementation="eager")

    base_logits = load_base().eval()(ids).logits
    loaded = PeftModel.from_pretrained(load_base(), str(uninterrupted / "adapter")).eval()
    newest = sorted((uninterrupted / "checkpoints").iterdir())[-1]
    merged = load_base().eval()
    tensors = load_file(newest / "adapter_model.safetensors")
    with torch.no_grad():  # W + alpha/rank·BA, with the tensors of the last checkpoint
        for name, a in tensors.items():
            if "lora_A" in name:
                layer = merged.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                layer.weight += 32 / 4 * (tensors[name.replace("lora_A", "lora_B")] @ a)
    logits = loaded(ids).logits
    assert float((logits - merged(ids).logits).abs().max() / logits.abs().max()) < 1e-5
    assert float((logits - base_logits).abs().max() / logits.abs().max()) > 1e-3
    assert last < metrics(uninterrupted)[0]["eval_loss"]


def test_the_adapter_folder_contains_no_path_of_this_machine(workspace: Workspace, uninterrupted: Path):
    config = json.loads((uninterrupted / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == workspace.model.name
    local_paths = re.compile(
        rf"{re.escape(str(Path.home()))}\b|{re.escape(str(workspace.folder))}|{workspace.model.parent}|/tmp/"
    )
    for file in (uninterrupted / "adapter").iterdir():
        match = local_paths.search(file.read_bytes().decode("latin-1"))
        assert match is None, f"{file.name}: {match}"


def test_a_non_finite_loss_ends_the_run_and_resume_reaches_the_same_step(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # One token makes the forward pass overflow: the step that contains the row with this token has a non-finite loss.
    token = AutoTokenizer.from_pretrained(workspace.model).encode(BELL, add_special_tokens=False)[-1]
    embed = torch.nn.Embedding.forward

    def overflow(self: torch.nn.Embedding, ids: Tensor) -> Tensor:
        return embed(self, ids).masked_fill((ids == token)[..., None], torch.inf)

    monkeypatch.setattr(torch.nn.Embedding, "forward", overflow)
    broken_workspace = Workspace(tmp_path, workspace.model)
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    rows[30] = json.dumps(json.loads(rows[30].replace("question", "question \\u0007")))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(LoraError, match=r"step \d+: the loss is not finite; its rows: .*rows\.jsonl:") as caught:
        broken_workspace.train("run", save_every=1, gradient_accumulation=1, keep_checkpoints=50)
    failed = int(caught.value.message.split()[1].rstrip(":"))
    assert failed > 1, "choose a seed with which the row is in a later step"
    assert "rows.jsonl:31" in caught.value.message or "more" in caught.value.message
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in saved] == [f"step-{n:08d}" for n in range(1, failed)]
    assert all(tensor.isfinite().all() for tensor in load_file(saved[-1] / "adapter_model.safetensors").values())
    assert not (tmp_path / "run" / "adapter").exists()
    with pytest.raises(LoraError, match=f"step {failed}: the loss is not finite"):
        broken_workspace.train("run", resume=True, save_every=1, gradient_accumulation=1, keep_checkpoints=50)
