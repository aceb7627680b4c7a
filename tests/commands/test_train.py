"""`lora train` as a user types it: what it prints, what it leaves behind, and how it goes on."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lora_cli.run import console, metrics_log
from lora_cli.run.folder import LOCK
from lora_cli.training import launch
from tests.commands.conftest import Finished, Lora, WriteRecipe


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_prints_the_adapter_alone_on_stdout(finished: Finished):
    done = finished.done
    assert (done.code, done.out) == (0, "runs/a/adapter\n")
    assert "24 rows read = " in done.err
    assert "q_proj" in done.err
    assert re.search(r"^step 4/4  loss \d", done.err, re.MULTILINE)
    assert "verified: the adapter on disk" in done.err
    assert re.search(r"^eval loss \d+\.\d+ -> ", done.err, re.MULTILINE)


def test_every_line_is_its_own_and_not_a_librarys(finished: Finished):
    ours = (
        r"rows\.jsonl: |  24 rows read|train: |eval: |4 steps of |base: |packing |adapter on:|  \w+_proj "
        r"|  [\d,]+ trainable|eval at step |step \d/4 |verified: |eval loss |measuring the base "
    )
    assert [line for line in finished.done.err.splitlines() if not re.match(ours, line)] == []


def test_leaves_the_folder_of_the_house_plan(finished: Finished):
    trained = finished.folder
    assert {p.name for p in trained.iterdir()} == {
        LOCK,
        "recipe.yaml",
        "manifest.json",
        "metrics.jsonl",
        "checkpoints",
        "adapter",
    }
    assert [p.name for p in sorted((trained / "checkpoints").iterdir())] == ["step-00000002", "step-00000004"]
    names = {p.name for p in (trained / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= names
    resolved = yaml.safe_load((trained / "recipe.yaml").read_text())
    assert resolved["training"]["optimizer"] == "adamw"  # a default, filled in
    assert resolved["training"]["max_steps"] == 4


def test_the_manifest_says_what_was_used(finished: Finished):
    trained = finished.folder
    manifest = json.loads((trained / "manifest.json").read_text())
    assert {"python", "torch", "transformers", "peft", "tokenizers", "lora-cli"} <= manifest["versions"].keys()
    assert re.fullmatch(r"[0-9a-f]{64}", manifest["base"]["fingerprint"])
    assert manifest["seed"] == 42
    assert manifest["steps"] == 4
    assert manifest["trainable_parameters"] == sum(
        tensor.numel() for tensor in load_file(trained / "adapter" / "adapter_model.safetensors").values()
    )
    [source] = manifest["ledger"]["sources"]
    assert source["content"]
    assert source["read"] == source["kept"] == 24
    assert manifest["ledger"]["train"]["rows"] + manifest["ledger"]["eval"]["rows"] == 24


def test_metrics_have_every_step_and_the_evaluations(finished: Finished):
    records = metrics(finished.folder)
    assert [(r["step"], "eval_loss" in r) for r in records] == [
        (0, True),
        (1, False),
        (2, False),
        (2, True),
        (3, False),
        (4, False),
        (4, True),
    ]
    assert {"loss", "learning_rate", "grad_norm", "tokens", "supervised", "seconds"} <= records[1].keys()
    assert records[-1]["eval_loss"] < records[0]["eval_loss"]


def test_the_card_names_no_path_of_this_machine(recipe: WriteRecipe, lora: Lora, place: Path):
    file = recipe({"model.path": str(place / "base"), "data.train": str(place / "rows.jsonl")})
    assert lora("train", file, "--output", place / "elsewhere").code == 0
    text = (place / "elsewhere" / "adapter" / "README.md").read_text()
    assert str(place) not in text
    assert "base_model: base" in text
    assert "rows.jsonl (messages): 24 rows read" in text
    assert "| adapter |" in text


def test_there_is_no_pickle(finished: Finished):
    files = [p for p in finished.folder.rglob("*") if p.is_file()]
    kinds = {p.suffix for p in files if p.name != LOCK}
    assert kinds <= {".safetensors", ".json", ".jsonl", ".yaml", ".md", ".jinja"}
    # A zip (what torch.save writes) or a pickle begins with these bytes.
    assert not [p for p in files if p.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04")]


def test_two_runs_of_one_seed_are_equal(trained: Path, lora: Lora):
    assert lora("train", "recipe.yaml", "--output", "runs/b").code == 0
    assert adapter(trained) == adapter(Path("runs/b"))
    assert lora("train", "recipe.yaml", "--output", "runs/c", "--set", "training.seed=7").code == 0
    assert adapter(trained) != adapter(Path("runs/c"))


def test_a_second_start_is_refused_and_told_what_to_do(trained: Path, lora: Lora):
    before = adapter(trained)
    done = lora("train", "recipe.yaml")
    assert done.code == 2
    assert done.out == ""
    assert done.last_two == [
        "error: runs/a contains a run already",
        "hint: --resume continues it, --fresh removes it and starts again; or set another output",
    ]
    assert adapter(trained) == before


def test_fresh_starts_again(trained: Path, lora: Lora):
    done = lora("train", "recipe.yaml", "--fresh", "--set", "training.max_steps=2")
    assert done.code == 0
    assert [p.name for p in (trained / "checkpoints").iterdir()] == ["step-00000002"]
    assert [r["step"] for r in metrics(trained)] == [0, 1, 2, 2]


def test_a_mistake_with_fresh_leaves_the_run_that_is_there(trained: Path, lora: Lora):
    before = {path: path.read_bytes() for path in sorted(trained.rglob("*")) if path.is_file()}
    for change in ("data.max_length=9", "model.path=nowhere/at/all", "adapter.target_modules=[nothing]"):
        assert lora("train", "recipe.yaml", "--fresh", "--set", change).code == 2
        after = {path: path.read_bytes() for path in sorted(trained.rglob("*")) if path.is_file()}
        assert after.keys() == before.keys()
        assert all(after[path] == content for path, content in before.items() if path.name != ".lora-lock")


def test_resuming_a_complete_run_changes_nothing(trained: Path, lora: Lora):
    before, records = adapter(trained), metrics(trained)
    done = lora("train", "recipe.yaml", "--resume")
    assert (done.code, done.out) == (0, "runs/a/adapter\n")
    assert adapter(trained) == before
    assert metrics(trained) == records


def test_resume_refuses_another_recipe(trained: Path, lora: Lora):
    done = lora("train", "recipe.yaml", "--resume", "--set", "adapter.alpha=3")
    assert done.code == 2
    assert re.fullmatch(
        r"error: .*step-00000004: cannot resume, changed since this checkpoint: adapter", done.last_two[0]
    )
    assert done.last_two[1].startswith("hint: ")


@pytest.mark.parametrize(("key", "value"), [("dtype", "bfloat16"), ("attention", "eager")])
def test_resume_refuses_another_arithmetic(key: str, value: str, trained: Path, lora: Lora):
    packing = ("--set", "data.packing=false", "--set", "training.batch_size=4")
    assert lora("train", "recipe.yaml", "--output", "runs/b", *packing).code == 0
    done = lora("train", "recipe.yaml", "--output", "runs/b", *packing, "--resume", "--set", f"model.{key}={value}")
    assert done.code == 2
    assert done.last_two[0].endswith(f"cannot resume, changed since this checkpoint: {key}")


def test_bad_rows_are_told_before_any_process_is_started(
    recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch, "launch_workers", lambda *_: pytest.fail("started"))
    with Path("rows.jsonl").open("a") as rows:
        rows.write('{"messages": 3}\n')
    done = lora("train", recipe(), "--processes", "2")
    assert done.code == 2
    assert done.err.count("error: ") == 1
    assert done.last_two[0] == "error: rows.jsonl: 1 of 25 rows is bad"


def test_of_several_processes_the_first_tells_a_mistake(
    recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    recipe({"training.max_steps": -1})
    assert "error: " in lora("train", "recipe.yaml").err
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert lora("train", "recipe.yaml") == (2, "", "")


def test_too_little_memory_names_what_to_lower(recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    from lora_cli.model.loss import LossFunction

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(LossFunction, "__call__", full)
    done = lora("train", recipe())
    assert (done.code, done.out) == (1, "")
    assert done.last_two == [
        "error: cpu has too little memory for a step",
        "hint: lower training.tokens_per_batch, or set training.gradient_checkpointing to true",
    ]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_resume_ends_where_the_uninterrupted_run_does(
    sent: signal.Signals, code: int, trained: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    show = console.StepProgress.step

    def signalled(meter: console.StepProgress, number: int, values: dict[str, str]) -> None:
        show(meter, number, values)
        if number == 3:
            os.kill(os.getpid(), sent)

    with monkeypatch.context() as patch:
        patch.setattr(console.StepProgress, "step", signalled)
        stopped = lora("train", "recipe.yaml", "--output", "runs/b")
    assert (stopped.code, stopped.out) == (code, "")
    assert stopped.err.splitlines()[-1] == "stopped after step 3, which is saved; --resume continues from there"
    assert Path("runs/b/checkpoints/step-00000003").is_dir()
    assert not Path("runs/b/adapter").exists()
    resumed = lora("train", "recipe.yaml", "--output", "runs/b", "--resume")
    assert resumed.code == 0
    assert "resuming after step 3" in resumed.err
    assert adapter(Path("runs/b")) == adapter(trained)
    drop_time = [{k: v for k, v in r.items() if k != "seconds"} for r in metrics(Path("runs/b"))]
    assert drop_time == [{k: v for k, v in r.items() if k != "seconds"} for r in metrics(trained)]


def test_a_loss_that_is_not_finite_stops_before_the_step(
    recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    from lora_cli.model.loss import BatchLoss, LossFunction

    recipe({"data.eval": None, "training.save_every": 1})
    score, calls = LossFunction.__call__, []

    def fourth_is_broken(loss_fn: LossFunction, batch: Any) -> BatchLoss:  # the first one is the look for dead layers
        calls.append(batch)
        found = score(loss_fn, batch)
        return found._replace(loss=found.loss * float("nan")) if len(calls) == 4 else found

    monkeypatch.setattr(LossFunction, "__call__", fourth_is_broken)
    done = lora("train", "recipe.yaml")
    assert (done.code, done.out) == (1, "")
    assert re.fullmatch(r"error: step 3: the loss is not finite; its rows: rows\.jsonl:\d+.*", done.last_two[0])
    assert done.last_two[1].startswith("hint: try a lower")
    assert sorted(p.name for p in Path("runs/a/checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    assert [r["step"] for r in metrics_log.read_metrics(Path("runs/a/metrics.jsonl"))] == [1, 2]


def test_a_base_that_is_broken_is_told_at_the_first_evaluation(
    recipe: WriteRecipe, lora: Lora, tiny: Any, tiny_folder: Path
):
    tiny.resize_token_embeddings(json.loads((tiny_folder / "config.json").read_text())["vocab_size"])
    tiny.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    tiny.save_pretrained("broken")
    for file in tiny_folder.glob("*token*"):
        (Path("broken") / file.name).write_bytes(file.read_bytes())
    (Path("broken") / "chat_template.jinja").write_bytes((tiny_folder / "chat_template.jinja").read_bytes())
    done = lora("train", recipe({"model.path": "broken", "data.packing": False}))
    assert done.code == 1
    assert done.last_two == [
        "error: the loss on the held-out rows is not finite at step 0",
        "hint: the base model causes it: see model.path and model.dtype",
    ]
