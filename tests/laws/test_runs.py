"""Laws of whole runs of `lora train`: repeated, resumed, shared by two processes, and read back by plain PEFT."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_cli.commands.train import train
from lora_cli.errors import LoraError
from lora_cli.recipe.load import load_recipe
from lora_cli.run import metrics_log

STEPS = 24
ALL_CORES = os.sched_getaffinity(0)
POISON = "\x07"  # a byte that no row has unless a test puts it there


def write_rows(path: Path, count: int = 60) -> None:
    """Ragged questions and answers."""
    lines = []
    for n in range(count):
        question, answer = f"question {n} " + "the fox " * (n % 7), "answer " * (1 + n * n % 11) + str(n)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")


class Place:
    """A folder with rows, the tiny model, and runs of one recipe in it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        write_rows(folder / "rows.jsonl")

    def recipe(self, run: str, **training: Any) -> Path:
        """Dropout, accumulation and packing are on; 24 steps in epochs of an odd number of batches."""
        plan = {"max_steps": STEPS, "tokens_per_batch": 256, "gradient_accumulation": 2, "learning_rate": 1e-3}
        rest = {"eval_every": 1, "save_every": 1000, "seed": 7}
        whole = {
            "model": {"path": str(self.model), "dtype": "float32"},
            "adapter": {"rank": 4, "dropout": 0.2},
            "data": {"train": str(self.folder / "rows.jsonl"), "eval": 0.1, "max_length": 128},
            "training": {**plan, **rest, **training},
            "output": str(self.folder / run),
        }
        path = self.folder / f"{run}.yaml"
        path.write_text(yaml.safe_dump(whole))
        return path

    def train(self, run: str, *, resume: bool = False, **training: Any) -> Path:
        """In this process, in which other runs went before: nothing of them may show."""
        assert train(load_recipe(self.recipe(run, **training)), resume=resume, fresh=False, arguments=[]) == 0
        return self.folder / run

    def start(self, run: str, *options: str, **training: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "lora_cli", "train", str(self.recipe(run, **training)), *options]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def metrics(run: Path) -> list[dict[str, Any]]:
    """Every record but its times."""
    return [
        {k: v for k, v in record.items() if k != "seconds"}
        for record in metrics_log.read_metrics(run / "metrics.jsonl")
    ]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in metrics(run) if "loss" in record]


def taken(run: Path, until: int) -> list[dict[str, Any]]:
    """Records up to step `until` with their times: they change where a resumed run starts from the beginning."""
    return [record for record in metrics_log.read_metrics(run / "metrics.jsonl") if record["step"] <= until]


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of its own, and one core: on a busy machine, threads that wait for each other cost most of the time."""
    os.sched_setaffinity(0, {random.choice(sorted(ALL_CORES))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    os.sched_setaffinity(0, ALL_CORES)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Place:
    return Place(tmp_path_factory.mktemp("runs"), tiny_folder)


@pytest.fixture(scope="module")
def whole(place: Place) -> Path:
    """The uninterrupted run."""
    return place.train("whole")


def test_the_run_learns_and_is_ragged(whole: Path):
    """The laws below would hold for a run that does nothing, too."""
    found = losses(whole)
    assert len(found) == STEPS
    assert sum(found[-5:]) < 0.9 * sum(found[:5])
    tokens = [record["tokens"] for record in metrics(whole) if "loss" in record]
    assert min(tokens) < 0.7 * max(tokens)  # a last step of the epoch with one batch where others have two


def test_one_seed_one_adapter(place: Place, whole: Path):
    again = place.train("again")
    assert same_bits(weights(again), weights(whole))
    assert metrics(again) == metrics(whole)


def test_another_seed_another_adapter(place: Place, whole: Path):
    other = place.train("other", seed=8)
    assert not any(torch.equal(weights(other)[name], tensor) for name, tensor in weights(whole).items())


def test_stopped_by_sigint_and_resumed_is_uninterrupted(place: Place, whole: Path):
    process = place.start("stopped")
    file = place.folder / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (file.exists() and losses(file.parent)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    (saved,) = (place.folder / "stopped" / "checkpoints").iterdir()
    done = int(saved.name.removeprefix("step-"))
    assert 0 < done < STEPS
    assert f"stopped after step {done}" in said
    before = taken(file.parent, done)
    resumed = place.train("stopped", resume=True)
    assert taken(resumed, done) == before
    assert same_bits(weights(resumed), weights(whole))
    assert metrics(resumed) == metrics(whole)


def test_killed_and_resumed_from_an_older_checkpoint_is_uninterrupted(place: Place):
    """As a power cut leaves it: a checkpoint, and a journal that went on after it."""
    straight = place.train("saving", save_every=7, keep_checkpoints=9)
    cut = shutil.copytree(straight, place.folder / "cut")
    shutil.rmtree(cut / "adapter")
    for later in sorted((cut / "checkpoints").iterdir())[1:]:
        shutil.rmtree(later)
    resumed = place.train("cut", resume=True, save_every=7, keep_checkpoints=9)
    assert taken(resumed, 7) == taken(straight, 7)
    assert taken(resumed, STEPS) != taken(straight, STEPS)
    assert same_bits(weights(resumed), weights(straight))
    assert metrics(resumed) == metrics(straight)


def test_checkpoints_change_nothing_and_the_oldest_go(place: Place, whole: Path):
    run = place.train("checkpoints", save_every=4, keep_checkpoints=3)
    assert same_bits(weights(run), weights(whole))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-{n:08d}" for n in (16, 20, 24)]
    assert same_bits(load_file(run / "checkpoints" / f"step-{STEPS:08d}" / "adapter_model.safetensors"), weights(run))


@pytest.mark.parametrize("change", [{"seed": 8}, {"learning_rate": 2e-3}, {"max_steps": 30}, {"tokens_per_batch": 200}])
def test_a_changed_recipe_is_not_resumed(place: Place, whole: Path, change: dict[str, Any]):
    before = (whole / "metrics.jsonl").read_bytes()
    with pytest.raises(LoraError, match="changed since this checkpoint"):
        place.train("whole", resume=True, **change)
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_two_processes_are_one(place: Place, whole: Path):
    one = os.sched_getaffinity(0)
    os.sched_setaffinity(0, ALL_CORES)  # what is started inherits it
    process = place.start("two", "--processes", "2", gradient_accumulation=1)
    os.sched_setaffinity(0, one)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    two = place.folder / "two"
    assert losses(two) == pytest.approx(losses(whole), rel=1e-5)
    for mine, theirs in zip(metrics(two), metrics(whole), strict=True):
        assert {k: v for k, v in mine.items() if isinstance(v, int)} == {
            k: v for k, v in theirs.items() if isinstance(v, int)
        }
        assert {k: v for k, v in mine.items() if k != "grad_norm"} == pytest.approx(
            {k: v for k, v in theirs.items() if k != "grad_norm"}, rel=1e-5
        )
    for name, tensor in weights(two).items():
        assert float((tensor - weights(whole)[name]).norm() / tensor.norm()) < 1e-5


def test_two_processes_stopped_by_sigint_save_and_say_so_once(place: Place):
    process = place.start("pair", "--processes", "2", max_steps=2000, eval_every=None)
    file = place.folder / "pair" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (file.exists() and losses(file.parent)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    (saved,) = (place.folder / "pair" / "checkpoints").iterdir()
    done = int(saved.name.removeprefix("step-"))
    assert said.splitlines()[-1] == f"stopped after step {done}, which is saved; --resume continues from there"
    assert "Traceback" not in said


def test_saved_is_loaded_by_plain_peft(place: Place, whole: Path):
    last = metrics(whole)[-1]["eval_loss"]
    ids = torch.arange(5, 60)[None]

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32, attn_implementation="eager")

    fresh = base().eval()(ids).logits
    loaded = PeftModel.from_pretrained(base(), str(whole / "adapter")).eval()
    newest = sorted((whole / "checkpoints").iterdir())[-1]
    by_hand = base().eval()
    tensors = load_file(newest / "adapter_model.safetensors")
    with torch.no_grad():  # W + alpha/rank·BA, from what the last checkpoint holds
        for name, a in tensors.items():
            if "lora_A" in name:
                layer = by_hand.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                layer.weight += 32 / 4 * (tensors[name.replace("lora_A", "lora_B")] @ a)
    got = loaded(ids).logits
    assert float((got - by_hand(ids).logits).abs().max() / got.abs().max()) < 1e-5
    assert float((got - fresh).abs().max() / got.abs().max()) > 1e-3
    assert last < metrics(whole)[0]["eval_loss"]


def test_only_the_name_of_the_base_in_the_adapter_knows_this_machine(place: Place, whole: Path):
    # PEFT finds the base by it, so that it is the recipe's own word, a path of this machine or not.
    config = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(place.model)
    strangers = re.compile(
        rf"{re.escape(str(Path.home()))}\b|{re.escape(str(place.folder))}|{place.model.parent}|/tmp/"
    )
    for file in set((whole / "adapter").iterdir()) - {whole / "adapter" / "adapter_config.json"}:
        found = strangers.search(file.read_bytes().decode("latin-1"))
        assert found is None, f"{file.name}: {found}"


def test_a_non_finite_loss_ends_the_run_and_its_last_checkpoint_goes_on(place: Place, tmp_path: Path):
    # One token's embedding is infinite: the row that has it breaks the step it is in.
    broken = shutil.copytree(place.model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    where = Place(tmp_path, broken)
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    rows[30] = json.dumps(json.loads(rows[30].replace("question", "question \\u0007")))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    from transformers import AutoTokenizer

    token = AutoTokenizer.from_pretrained(broken).encode(POISON, add_special_tokens=False)
    tensors["model.embed_tokens.weight"][token[-1]] = torch.inf
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoraError, match=r"step \d+: the loss is not finite; its rows: .*rows\.jsonl:") as caught:
        where.train("run", save_every=1, gradient_accumulation=1, keep_checkpoints=50)
    failed = int(caught.value.message.split()[1].rstrip(":"))
    assert failed > 1, "choose a seed that meets the row later"
    assert "rows.jsonl:31" in caught.value.message or "more" in caught.value.message
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in saved] == [f"step-{n:08d}" for n in range(1, failed)]
    assert all(tensor.isfinite().all() for tensor in load_file(saved[-1] / "adapter_model.safetensors").values())
    assert not (tmp_path / "run" / "adapter").exists()
    with pytest.raises(LoraError, match=f"step {failed}: the loss is not finite"):
        where.train("run", resume=True, save_every=1, gradient_accumulation=1, keep_checkpoints=50)
