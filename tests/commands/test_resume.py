"""`lora train --resume`: a changed recipe is refused with a diff or applied and told; a moved run goes on in its place.

The law: a resumed run equals the uninterrupted run of its recipe, bit for bit on one CPU.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

from lora_cli.commands import train as train_command
from lora_cli.data.batches import BatchPlan
from lora_cli.run import metrics_log
from lora_cli.run.checksums import write_checksums
from lora_cli.training import cpu
from tests.commands.conftest import LORA_ON_ONE_CORE, Lora, WriteRecipe, rows
from tests.inputs.tiny_tokenizers import CHATML, build
from tests.model import zoo

pytestmark = pytest.mark.slow

CHANGED = "cannot resume, changed since this checkpoint: "


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def go_back_to(run: Path, step: int) -> Path:
    """Remove what a run wrote after `step`, as if it had been killed right after that checkpoint."""
    shutil.rmtree(run / "adapter")
    for folder in (run / "checkpoints").iterdir():
        if folder.name > f"step-{step:08d}":
            shutil.rmtree(folder)
    return run


def steps_of(run: Path) -> list[dict[str, Any]]:
    """Return the records of the steps, without their times."""
    records = metrics_log.read_metrics(run / "metrics.jsonl")
    own = ("seconds", "peak_memory")  # of each process
    return [{k: v for k, v in record.items() if k not in own} for record in records if "loss" in record]


def files_of(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lora-lock"}


def told(err: str) -> list[str]:
    """Return the lines on what a resumed run has changed."""
    return [line.removeprefix("--resume: ") for line in err.splitlines() if line.startswith("--resume: ")]


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        (["training.learning_rate=0.02"], ["training.learning_rate: 0.01 -> 0.02"]),
        (
            ["training.learning_rate=0.02", "adapter.rank=8", "training.save_every=3"],
            ["adapter.rank: 4 -> 8", "training.learning_rate: 0.01 -> 0.02"],
        ),
        (["adapter.target_modules=[q_proj]"], ['adapter.target_modules: all-linear -> ["q_proj"]']),
        (["training.seed=7"], ["training.seed: 42 -> 7"]),
        (
            ["quantization.bits=4"],
            [
                "quantization.bits: null -> 4",
                "quantization.type: null -> nf4",
                "quantization.double_quant: null -> true",
            ],
        ),
        (["training.max_steps=8"], ["training.max_steps: 4 -> 8"]),
        (
            ["training.epochs=1", "training.max_steps=null"],
            ["training.epochs: null -> 1.0", "training.max_steps: 4 -> null"],
        ),
        (
            ["training.schedule=constant", "training.max_steps=3"],
            [
                "training.max_steps: 4 -> 3",
                "training.schedule: cosine -> constant",
                "steps of the run: 4 -> 3, but 4 are done",
            ],
        ),
        (["training.keep=best"], ["training.keep: last -> best"]),
        (["model.dtype=bfloat16"], ["model.dtype: float32 -> bfloat16"]),
        (["training.optimizer=lion"], ["training.optimizer: adamw -> lion"]),
        (["training.gradient_accumulation=2"], ["training.gradient_accumulation: 1 -> 2"]),
        (
            ["data.packing=false"],
            ["data.packing: true -> false", "training.batch_size: null -> 4"],
        ),
        (["data.max_length=64"], ["training.tokens_per_batch: 128 -> 64", "data.max_length: 128 -> 64"]),
        (["data.loss_on=all"], ["data.loss_on: assistant -> all"]),
        (["data.eval=0.4"], ["data.eval: 0.2 -> 0.4"]),
        (["data.train=[{path: rows.jsonl, weight: 2}]"], ["data.train[0].weight: 1.0 -> 2.0"]),
    ],
)
def test_what_changes_what_is_learned_is_refused_with_a_diff(
    settings: list[str], lines: list[str], trained_run: Path, lora: Lora
):
    before = files_of(trained_run)
    result = lora("train", "recipe.yaml", "--resume", *(text for each in settings for text in ("--set", each)))
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[-2 - len(lines) : -2] == lines
    names = ", ".join(dict.fromkeys(line.partition(": ")[0] for line in lines))
    assert result.last_two[0] == f"error: runs/a/checkpoints/step-00000004: {CHANGED}{names}"
    assert result.last_two[1].startswith("hint: undo these changes, or start over with --fresh; ")
    assert files_of(trained_run) == before


def test_a_changed_key_is_refused_before_rows_and_base_are_read(trained_run: Path, lora: Lora):
    Path("rows.jsonl").unlink()
    Path("base").unlink()
    result = lora("train", "recipe.yaml", "--resume", "--set", "training.learning_rate=1")
    assert result.last_two[0].endswith(f"{CHANGED}training.learning_rate")


def test_an_edited_recipe_of_the_run_is_compared_with_the_checkpoint(trained_run: Path, lora: Lora):
    file = trained_run / "recipe.yaml"
    file.write_text(file.read_text().replace("learning_rate: 0.01", "learning_rate: 0.03"))
    result = lora("train", file, "--resume")
    assert "training.learning_rate: 0.01 -> 0.03" in result.err.splitlines()
    assert result.code == 2


def edit_rows(edit: Callable[[list[dict[str, Any]]], None]) -> None:
    changed = rows()
    edit(changed)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))


def add_a_row(changed: list[dict[str, Any]]) -> None:
    changed.append(rows(25)[24])


def edit_an_answer(changed: list[dict[str, Any]]) -> None:
    changed[3]["messages"][1]["content"] = "another answer"


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (add_a_row, "train rows of rows.jsonl: the file is another: 24 rows -> 25"),
        (list.pop, "train rows of rows.jsonl: the file is another: 24 rows -> 23"),
        (edit_an_answer, "train rows of rows.jsonl: edited"),
    ],
)
def test_changed_rows_are_refused(
    edit: Callable[[list[dict[str, Any]]], None], line: str, trained_run: Path, lora: Lora
):
    edit_rows(edit)
    result = lora("train", "recipe.yaml", "--resume")
    assert result.code == 2
    assert result.err.splitlines()[-3] == line
    assert result.last_two[0].endswith(f"{CHANGED}train rows of rows.jsonl")


def test_another_base_and_another_template_are_refused(trained_run: Path, lora: Lora, tiny_folder: Path):
    Path("base").unlink()
    shutil.copytree(tiny_folder, "base")
    weights = Path("base/model.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\x00\x00\x00\x40")
    result = lora("train", "recipe.yaml", "--resume")
    assert result.last_two[0].endswith(f"{CHANGED}weights of the base (model.path)")
    weights.write_bytes(content)
    template = Path("base/chat_template.jinja")
    template.write_text("Hello. " + template.read_text())
    result = lora("train", "recipe.yaml", "--resume")
    assert result.last_two[0].endswith(f"{CHANGED}chat template")


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        ([], []),
        (
            ["training.save_every=3", "training.log_every=2", "training.keep_checkpoints=1", "training.eval_every=3"],
            [
                "training.eval_every: 2 -> 3 applies from here",
                "training.save_every: 2 -> 3 applies from here",
                "training.keep_checkpoints: 2 -> 1 applies from here",
                "training.log_every: 1 -> 2 applies from here",
            ],
        ),
        (["training.on_spike=skip"], ["training.on_spike: warn -> skip applies from here"]),
        (
            ["training.gradient_checkpointing=true"],
            ["training.gradient_checkpointing: auto -> true applies from here (results differ within rounding)"],
        ),
        (
            ["training.warmup=1"],
            ["training.warmup: 0.03 -> 1.0 applies from here (the learning rates so far are the same)"],
        ),
        (["data.train=./rows.jsonl"], ["data.train: rows.jsonl -> ./rows.jsonl (the rows are the same)"]),
        (["data.format=messages"], ["data.format: auto -> messages (the rows are the same)"]),
        (["model.path=./base"], ["model.path: base -> ./base (the weights are the same)"]),
        (["training.optimizer=auto"], ["training.optimizer: adamw -> auto (the optimizer of the run is the same)"]),
        (
            ["generation.num_beams=2", "generation.length_penalty=1"],
            [
                "generation.num_beams: 1 -> 2 applies from here",
                "generation.length_penalty: null -> 1.0 applies from here",
            ],
        ),
    ],
)
def test_other_changes_apply_are_told_and_leave_the_result_as_it_is(
    settings: list[str], lines: list[str], trained_run: Path, lora: Lora
):
    expected, records = adapter_bytes(trained_run), steps_of(trained_run)
    go_back_to(trained_run, 2)
    result = lora("train", "recipe.yaml", "--resume", *(text for each in settings for text in ("--set", each)))
    assert result.code == 0, result.err
    assert told(result.err) == lines
    assert "resuming after step 2" in result.err
    assert adapter_bytes(trained_run) == expected
    assert steps_of(trained_run) == records
    changes = json.loads((trained_run / "manifest.json").read_text())["changes"]
    assert [change["step"] for change in changes] == [2] * len(lines)
    assert lora("train", trained_run / "recipe.yaml", "--resume").code == 0  # the next checkpoint has the new recipe
    assert json.loads((trained_run / "manifest.json").read_text())["changes"] == changes


def test_another_attention_applies_within_rounding(recipe: WriteRecipe, lora: Lora):
    packing = ("--set", "data.packing=false", "--set", "training.batch_size=4")
    assert lora("train", recipe(), *packing).code == 0
    losses = [record["loss"] for record in steps_of(Path("runs/a"))]
    go_back_to(Path("runs/a"), 2)
    result = lora("train", "recipe.yaml", *packing, "--resume", "--set", "model.attention=eager")
    assert result.code == 0, result.err
    assert told(result.err) == ["model.attention: auto -> eager applies from here (results differ within rounding)"]
    assert [record["loss"] for record in steps_of(Path("runs/a"))] == pytest.approx(losses, rel=1e-5)


def edit_state(run: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit state.json of the newest checkpoint, as another version of lora would have written it."""
    file = run / "checkpoints" / "step-00000004" / "state.json"
    state = json.loads(file.read_text())
    edit(state)
    file.write_text(json.dumps(state))
    (file.parent / "checksums.json").unlink()
    write_checksums(file.parent, kind="checkpoint", published=False)


@pytest.mark.parametrize(
    ("edit", "key"),
    [
        (lambda state: state.pop("recipe"), "recipe"),
        (lambda state: state.update(recipe=[]), "recipe"),
        (lambda state: state["recipe"]["training"].update(schedule="spiral"), "recipe.training.schedule"),
        (lambda state: state["recipe"]["training"].update(of_a_later_version=1), "recipe.training.of_a_later_version"),
        (lambda state: state.update(machine=None), "machine"),
        (lambda state: state["sources"][0].pop("read"), "sources.0.read"),
        (lambda state: state["loss_spikes"].update(losses={}), "loss_spikes.losses"),
    ],
)
def test_a_checkpoint_of_another_version_is_named(
    edit: Callable[[dict[str, Any]], object], key: str, trained_run: Path, lora: Lora
):
    edit_state(trained_run, edit)
    result = lora("train", "recipe.yaml", "--resume")
    assert result.code == 2
    assert result.last_two == [
        "error: runs/a/checkpoints/step-00000004 was written by another version of lora: "
        f"unexpected `{key}` in its state.json",
        "hint: resume with the version that the run was started with, or start over with --fresh",
    ]


def test_another_machine_and_other_versions_are_told(trained_run: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    edit_state(trained_run, lambda state: state["versions"].update(torch="1.0"))
    monkeypatch.setattr(cpu, "available_cores", lambda: 2)
    result = lora("train", "recipe.yaml", "--resume")
    torch.set_num_threads(1)
    assert result.code == 0, result.err
    assert told(result.err) == [
        f"torch 1.0 -> {torch.__version__}, threads 1 -> 2: "
        "the result equals an uninterrupted run's within rounding only"
    ]


EXTENDABLE = {
    "constant": {"schedule": "constant", "warmup": 2},
    "wsd before its decay": {"schedule": "wsd", "warmup": 1, "decay": 2},
    "schedule-free": {"schedule": "constant", "warmup": 0, "optimizer": "schedule-free-adamw"},
}


@pytest.mark.parametrize("name", EXTENDABLE)
def test_a_run_that_is_made_longer_equals_an_uninterrupted_run_of_that_length(
    name: str, recipe: WriteRecipe, lora: Lora
):
    recipe({f"training.{key}": value for key, value in EXTENDABLE[name].items()})
    longer = ("--set", "training.max_steps=8")
    assert lora("train", "recipe.yaml", "--output", "runs/longer", *longer).code == 0
    assert lora("train", "recipe.yaml").code == 0
    if name.startswith("wsd"):
        refused = lora("train", "recipe.yaml", "--resume", *longer)  # two steps had rates of the decay
        assert refused.last_two[0].endswith(f"{CHANGED}training.max_steps")
        assert "made longer or shorter" in refused.last_two[1]
        go_back_to(Path("runs/a"), 2)
    result = lora("train", "recipe.yaml", "--resume", *longer)
    assert result.code == 0, result.err
    assert told(result.err) == ["training.max_steps: 4 -> 8 applies from here (the learning rates so far are the same)"]
    assert adapter_bytes(Path("runs/a")) == adapter_bytes(Path("runs/longer"))
    assert steps_of(Path("runs/a")) == steps_of(Path("runs/longer"))


MOVED = "output: runs/a -> {} (the run folder was moved)"


def test_a_moved_run_goes_on_in_its_new_place(trained_run: Path, lora: Lora):
    expected = adapter_bytes(trained_run)
    Path("archive").mkdir()
    moved = go_back_to(trained_run, 2).rename("archive/b")
    result = lora("train", "archive/b/recipe.yaml", "--resume")
    assert (result.code, result.out) == (0, "archive/b/adapter\n"), result.err
    assert told(result.err) == [MOVED.format("archive/b")]
    assert adapter_bytes(moved) == expected
    assert list(Path("runs").iterdir()) == []
    assert "adapter " in lora("eval", "archive/b/recipe.yaml").out  # of the run in its new place


def test_a_run_moved_with_its_base_goes_on_from_another_working_folder(
    trained_run: Path, lora: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = adapter_bytes(trained_run)
    go_back_to(trained_run, 2)
    new = tmp_path / "new"
    new.mkdir()
    Path("runs").rename(new / "old runs")
    Path("base").rename(new / "model")
    monkeypatch.chdir(new)
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "empty cache"))
    command = ("train", "old runs/a/recipe.yaml", "--resume")
    missing = lora(*command)
    assert missing.code == 2
    assert missing.last_two == [
        f"error: model.path: base does not exist in this working folder, {new}",
        "hint: run the command where the run was started, or give its new path: --set model.path=PATH",
    ]
    missing = lora(*command, "--set", "model.path=model")
    assert missing.last_two[0] == "error: data: rows.jsonl does not exist"
    result = lora(*command, "--set", f"model.path={new / 'model'}", "--set", "data.train=../rows.jsonl")
    assert result.code == 0, result.err
    assert told(result.err) == [
        f"model.path: base -> {new / 'model'} (the weights are the same)",
        "data.train: rows.jsonl -> ../rows.jsonl (the rows are the same)",
        MOVED.format("old runs/a"),
    ]
    assert adapter_bytes(new / "old runs" / "a") == expected
    monkeypatch.chdir(new / "old runs" / "a")
    go_back_to(Path(), 2)
    again = lora(
        "train", "recipe.yaml", "--resume", "--set", "model.path=../../model", "--set", "data.train=../../../rows.jsonl"
    )
    assert (again.code, again.out) == (0, "adapter\n"), again.err
    assert adapter_bytes(Path()) == expected


def test_a_recipe_names_the_run_folder_of_its_run_only(trained_run: Path, lora: Lora):
    shutil.copy(trained_run / "recipe.yaml", "recipe.yaml")  # next to no run: its output is the recipe's
    assert "runs/a contains a run already" in lora("train", "recipe.yaml").last_two[0]
    trained_run.rename("moved")
    missing = lora("train", "recipe.yaml", "--resume")
    assert missing.last_two == [
        "error: runs/a contains no run to resume",
        "hint: start it without --resume; to resume a run that was moved, give the recipe.yaml in its folder",
    ]
    assert not Path("runs/a").exists()
    other = lora("train", "moved/recipe.yaml", "--output", "runs/new")
    assert (other.code, other.out) == (0, "runs/new/adapter\n")


def test_a_run_goes_on_after_the_cache_is_lost(
    trained_run: Path, lora: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = adapter_bytes(trained_run)
    go_back_to(trained_run, 2)
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "empty cache"))
    result = lora("train", "recipe.yaml", "--resume")
    assert result.code == 0, result.err
    assert "rows.jsonl: encoding" in result.err
    assert told(result.err) == []
    assert adapter_bytes(trained_run) == expected


USER = 12345


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root, to run as another user")
def test_another_user_copies_a_run_and_goes_on(trained_run: Path, monkeypatch: pytest.MonkeyPatch):
    expected = adapter_bytes(trained_run)
    go_back_to(trained_run, 2)
    with TemporaryDirectory() as name:  # not in pytest's folders, which only their owner can read
        place = shutil.copytree(Path.cwd(), Path(name) / "place")
        home = Path(name) / "home"
        home.mkdir()
        for path in (Path(name), *Path(name).rglob("*")):
            path.chmod(0o755)
        os.chown(home, USER, USER)
        monkeypatch.chdir(place)

        def as_other(*command: str) -> subprocess.CompletedProcess[str]:
            user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
            environment = {**os.environ, "HOME": str(home), "LORA_CACHE": str(home / "cache")}
            return subprocess.run([*user, *command], env=environment, capture_output=True, text=True, check=False)

        in_place = as_other(*LORA_ON_ONE_CORE, "train", "recipe.yaml", "--resume")
        if "error" not in in_place.stderr:
            pytest.skip("another user cannot run this Python environment")
        assert in_place.stderr.splitlines()[-2:] == [
            "error: runs/a cannot be written: Permission denied",
            "hint: copy it, with cp -r, and resume the copy: lora train COPY/recipe.yaml --resume",
        ]
        assert as_other("cp", "-r", "runs/a", str(home / "copy")).returncode == 0
        resumed = as_other(*LORA_ON_ONE_CORE, "train", str(home / "copy" / "recipe.yaml"), "--resume")
        assert resumed.returncode == 0, resumed.stderr
        assert told(resumed.stderr) == [MOVED.format(home / "copy")]
        assert adapter_bytes(home / "copy") == expected
        assert (home / "copy" / "adapter").stat().st_uid == USER


def test_a_checkpoint_that_is_not_finite_is_not_written(
    recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    make_optimizer, calls = train_command.make_optimizer, []

    def make_optimizer_that_breaks(*arguments: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer = make_optimizer(*arguments, **options)

        def break_step_4(optimizer: torch.optim.Optimizer, *_: object) -> None:
            calls.append(optimizer)
            if len(calls) == 4:
                next(iter(optimizer.state.values()))["exp_avg"][0, 0] = torch.nan

        optimizer.register_step_post_hook(break_step_4)
        return optimizer

    monkeypatch.setattr(train_command, "make_optimizer", make_optimizer_that_breaks)
    result = lora("train", recipe())
    assert (result.code, result.out) == (1, "")
    assert result.last_two[0].startswith("error: step 4 is not saved: exp_avg of base_model.model.")
    assert result.last_two[0].endswith(" has NaN")
    assert result.last_two[1].startswith(
        "hint: runs/a/checkpoints/step-00000002 is from before it: go on with --resume"
    )
    assert [path.name for path in Path("runs/a/checkpoints").iterdir()] == ["step-00000002"]
    assert not Path("runs/a/adapter").exists()


ODD = 23  # index of the row whose loss is a spike


def write_odd_rows(base: str) -> int:
    """Write a base, and equal rows with one whose loss is far above theirs; return a seed with it at step 18 to 22."""
    tokenizer = build("<|im_start|>", "<|endoftext|>", eos="<|im_end|>", template=CHATML)
    zoo.make("llama", vocab_size=len(tokenizer), initializer_range=1.0).save_pretrained(base)
    tokenizer.save_pretrained(base)
    chats = [("line one", "line two")] * ODD + [("The fox", "quick Paris jumps capital brown 42")]
    lines = [
        json.dumps({"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]})
        for ask, answer in chats
    ]
    Path("odd.jsonl").write_text("\n".join(lines) + "\n")

    class Lengths:
        lengths = np.array([10] * ODD + [14], np.int32)

        def __len__(self) -> int:
            return len(self.lengths)

        def __getitem__(self, i: int) -> Any:
            raise NotImplementedError

    plans = (BatchPlan(Lengths(), packing=False, size=1, batches_per_step=1, seed=seed) for seed in range(999))
    return next(plan.seed for plan in plans if 17 <= plan.epoch(0).index([ODD]) < 22)


def write_spike_recipe(recipe: WriteRecipe, **training: Any) -> None:
    """Write the recipe of a run of 24 steps with a spike, and its inputs."""
    seed = write_odd_rows("varied")
    changes = {"max_steps": 24, "eval_every": None, "save_every": 1, "keep_checkpoints": 99, "learning_rate": 1e-5}
    changes |= {"batch_size": 1, "seed": seed, **training}
    sections = {"model.path": "varied", "data.train": "odd.jsonl", "data.eval": None, "data.packing": False}
    recipe({**sections, **{f"training.{key}": value for key, value in changes.items()}})


@pytest.mark.parametrize("on_spike", ["warn", "skip"])
def test_a_loss_spike_is_told_counted_and_decided_alike_by_a_resumed_run(
    on_spike: str, recipe: WriteRecipe, lora: Lora
):
    write_spike_recipe(recipe, on_spike=on_spike)
    result, run = lora("train", "recipe.yaml"), Path("runs/a")
    assert result.code == 0, result.err
    [line] = [line for line in result.err.splitlines() if "is a spike" in line]
    [record] = [record for record in steps_of(run) if "spike" in record]
    step, skipped = record["step"], on_spike == "skip"
    assert line.startswith(f"step {step}: the loss {record['loss']:.4f} is a spike, ")
    assert line.partition("; its rows: ")[2].partition(";")[0] == f"odd.jsonl:{ODD + 1}"
    assert ("skipped" in line) == record["skipped"] == skipped
    assert (
        f"1 loss spike, {'skipped' if skipped else 'trained on'}: `spike` in metrics.jsonl" in result.err.splitlines()
    )
    counted = json.loads((run / "manifest.json").read_text())["result"]["loss_spikes"]
    assert counted == {"count": 1, "skipped": int(skipped)}
    files = [run / "checkpoints" / f"step-{n:08d}" / "adapter_model.safetensors" for n in (step - 1, step, step + 1)]
    before, after, later = (file.read_bytes() for file in files)
    assert (before == after) == skipped
    assert after != later

    expected, records = adapter_bytes(run), steps_of(run)
    for done in (step - 1, step):
        copy = go_back_to(shutil.copytree(run, Path("runs") / f"from-{done}"), done)
        resumed = lora("train", copy / "recipe.yaml", "--resume")
        assert resumed.code == 0, resumed.err
        assert adapter_bytes(copy) == expected
        assert steps_of(copy) == records
        assert json.loads((copy / "manifest.json").read_text())["result"]["loss_spikes"] == counted


def test_older_checkpoints_that_a_killed_run_left_are_removed(trained_run: Path, lora: Lora):
    checkpoints = trained_run / "checkpoints"
    assert [path.name for path in sorted(checkpoints.iterdir())] == ["step-00000002", "step-00000004"]
    # As if it had been killed before it removed the older one.
    assert lora("train", "recipe.yaml", "--resume", "--set", "training.keep_checkpoints=1").code == 0
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000004"]
