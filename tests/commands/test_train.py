"""`lora train`: its output, the files of a run, resume, and errors during a run."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lora_cli.model import memory
from lora_cli.run import console, metrics_log
from lora_cli.run.checksums import write_checksums
from lora_cli.run.metrics_log import read_metrics
from lora_cli.run.run_lock import LOCK
from lora_cli.training import launch
from tests.commands.conftest import LORA_ON_ONE_CORE, CommandResult, Lora, WriteRecipe, write_inputs, write_recipe


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> CommandResult:
    """The output of `lora train recipe.yaml` in a separate process."""
    folder = tmp_path_factory.mktemp("process")
    write_inputs(folder, tiny_folder)
    write_recipe(folder / "recipe.yaml")
    run = subprocess.run(
        [*LORA_ON_ONE_CORE, "train", "recipe.yaml"],
        cwd=folder,
        env={**os.environ, "LORA_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    return CommandResult(run.returncode, run.stdout, run.stderr)


@pytest.mark.slow
def test_stdout_has_only_the_path_of_the_adapter(output: CommandResult):
    assert (output.code, output.out) == (0, "runs/a/adapter\n")
    assert "24 rows read = " in output.err
    assert "q_proj" in output.err
    assert re.search(r"^step 4/4  loss \d", output.err, re.MULTILINE)
    assert "verified: the adapter on disk" in output.err
    assert re.search(r"^eval loss \d+\.\d+ -> ", output.err, re.MULTILINE)


@pytest.mark.slow
def test_stderr_has_no_line_of_a_library(output: CommandResult):
    our_lines = (
        r"rows\.jsonl: |  24 rows read|train: |eval: |4 steps of |base: |packing |adapter on:|  \w+_proj "
        r"|  [\d,]+ trainable|eval at step |step \d/4 |verified: |eval loss |measuring the base "
        r"|note: adapter_config\.json names the base by a local path|kernels: |compile: "
    )
    assert [line for line in output.err.splitlines() if not re.match(our_lines, line)] == []


def test_the_run_folder_has_exactly_the_documented_files(finished_run: Path):
    run = finished_run
    assert {p.name for p in run.iterdir()} == {
        LOCK,
        "recipe.yaml",
        "manifest.json",
        "metrics.jsonl",
        "checksums.json",
        "checkpoints",
        "adapter",
    }
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-00000002", "step-00000004"]
    names = {p.name for p in (run / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= names
    resolved = yaml.safe_load((run / "recipe.yaml").read_text())
    assert resolved["training"]["optimizer"] == "adamw"  # a default value, written out
    assert resolved["training"]["max_steps"] == 4


def test_the_manifest_lists_versions_base_seed_and_data(finished_run: Path):
    run = finished_run
    manifest = json.loads((run / "manifest.json").read_text())
    assert {"python", "torch", "transformers", "peft", "tokenizers", "lora-cli"} <= manifest["versions"].keys()
    assert re.fullmatch(r"[0-9a-f]{64}", manifest["base"]["fingerprint"])
    assert manifest["seed"] == 42
    assert manifest["steps"] == 4
    assert manifest["trainable_parameters"] == sum(
        tensor.numel() for tensor in load_file(run / "adapter" / "adapter_model.safetensors").values()
    )
    [source] = manifest["ledger"]["sources"]
    assert source["content"]
    assert source["read"] == source["kept"] == 24
    assert manifest["ledger"]["train"]["rows"] + manifest["ledger"]["eval"]["rows"] == 24


def test_metrics_have_every_step_and_the_evaluations(finished_run: Path):
    records = metrics(finished_run)
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


def test_the_model_card_contains_no_local_path(recipe: WriteRecipe, lora: Lora, workdir: Path):
    file = recipe({"model.path": str(workdir / "base"), "data.train": str(workdir / "rows.jsonl")})
    assert lora("train", file, "--output", workdir / "elsewhere").code == 0
    text = (workdir / "elsewhere" / "adapter" / "README.md").read_text()
    assert str(workdir) not in text
    assert "base_model: base" in text
    assert "rows.jsonl (messages): 24 rows read" in text
    assert "| adapter |" in text


def test_the_run_folder_contains_no_pickle(finished_run: Path):
    files = [p for p in finished_run.rglob("*") if p.is_file()]
    kinds = {p.suffix for p in files if p.name != LOCK}
    assert kinds <= {".safetensors", ".json", ".jsonl", ".yaml", ".md", ".jinja"}
    # A zip file (the format of torch.save) or a pickle begins with these bytes.
    assert not [p for p in files if p.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04")]


def test_two_runs_of_the_same_seed_are_equal(trained_run: Path, lora: Lora):
    assert lora("train", "recipe.yaml", "--output", "runs/b").code == 0
    assert adapter_bytes(trained_run) == adapter_bytes(Path("runs/b"))
    assert lora("train", "recipe.yaml", "--output", "runs/c", "--set", "training.seed=7").code == 0
    assert adapter_bytes(trained_run) != adapter_bytes(Path("runs/c"))


def test_training_into_an_existing_run_is_refused_with_a_hint(trained_run: Path, lora: Lora):
    before = adapter_bytes(trained_run)
    result = lora("train", "recipe.yaml")
    assert result.code == 2
    assert result.out == ""
    assert result.last_two == [
        "error: runs/a contains a run already",
        "hint: --resume continues it, --fresh moves it aside and starts again; or set another output",
    ]
    assert adapter_bytes(trained_run) == before


def test_fresh_replaces_the_run(trained_run: Path, lora: Lora):
    result = lora("train", "recipe.yaml", "--fresh", "--set", "training.max_steps=2")
    assert result.code == 0
    assert [p.name for p in (trained_run / "checkpoints").iterdir()] == ["step-00000002"]
    assert [r["step"] for r in metrics(trained_run)] == [0, 1, 2, 2]


def test_an_error_with_fresh_keeps_the_existing_run(trained_run: Path, lora: Lora):
    before = {path: path.read_bytes() for path in sorted(trained_run.rglob("*")) if path.is_file()}
    for change in ("data.max_length=9", "model.path=nowhere/at/all", "adapter.target_modules=[nothing]"):
        assert lora("train", "recipe.yaml", "--fresh", "--set", change).code == 2
        after = {path: path.read_bytes() for path in sorted(trained_run.rglob("*")) if path.is_file()}
        assert after.keys() == before.keys()
        assert all(after[path] == content for path, content in before.items() if path.name != ".lora-lock")


def test_resuming_a_complete_run_changes_nothing(trained_run: Path, lora: Lora):
    before, records = adapter_bytes(trained_run), metrics(trained_run)
    result = lora("train", "recipe.yaml", "--resume")
    assert (result.code, result.out) == (0, "runs/a/adapter\n")
    assert adapter_bytes(trained_run) == before
    assert metrics(trained_run) == records


def test_a_run_of_an_earlier_version_is_resumed(trained_run: Path, lora: Lora):
    shutil.rmtree(trained_run / "checkpoints" / "step-00000004")
    expected = (trained_run / "adapter" / "adapter_model.safetensors").read_bytes()
    file = trained_run / "checkpoints" / "step-00000002" / "state.json"
    state = json.loads(file.read_text())
    for key in ("on_spike", "keep", "min_learning_rate", "cycles", "decay"):  # which that version did not have
        del state["recipe"]["training"][key]
    file.write_text(json.dumps(state))
    (file.parent / "checksums.json").unlink()
    write_checksums(file.parent, kind="checkpoint", published=False)
    refused = lora("train", "recipe.yaml", "--resume", "--set", "training.keep=best")
    assert "training.keep: last -> best" in refused.err.splitlines()
    assert refused.last_two[0].endswith("changed since this checkpoint: training.keep")
    result = lora("train", "recipe.yaml", "--resume")
    assert result.code == 0, result.err
    assert "resuming after step 2" in result.err
    assert "--resume:" not in result.err
    assert (trained_run / "adapter" / "adapter_model.safetensors").read_bytes() == expected


def test_bad_rows_are_reported_before_worker_processes_start(
    recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch, "launch_workers", lambda *_: pytest.fail("started"))
    with Path("rows.jsonl").open("a") as rows:
        rows.write('{"messages": 3}\n')
    result = lora("train", recipe(), "--processes", "2")
    assert result.code == 2
    assert result.err.count("error: ") == 1
    assert result.last_two[0] == "error: rows.jsonl: 1 of 25 rows is bad"


def test_only_the_first_of_several_processes_reports_an_error(
    recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    recipe({"training.max_steps": -1})
    assert "error: " in lora("train", "recipe.yaml").err
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "error: " in lora("train", "recipe.yaml").err  # of one process alone, whose shell has the variable
    for name, value in {"WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert lora("train", "recipe.yaml") == (2, "", "")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_out_of_memory_hints_at_the_keys_to_change(
    device: str, recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    from lora_cli.model.loss import LossFunction

    def out_of_memory(*_: object) -> torch.Tensor:
        if device == "cpu":
            return torch.empty(10**15)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(LossFunction, "__call__", out_of_memory)
    result = lora("train", recipe())
    assert (result.code, result.out) == (1, "")
    assert result.last_two == [
        "error: cpu has too little memory for a step",
        "hint: lower training.tokens_per_batch, or set training.gradient_checkpointing to true",
    ]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_checkpoint_and_the_resumed_run_equals_the_uninterrupted_run(
    sent: signal.Signals, code: int, trained_run: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    show_step = console.StepProgress.step

    def signal_after_step_3(
        progress: console.StepProgress, number: int, values: dict[str, str], *, loss: float
    ) -> None:
        show_step(progress, number, values, loss=loss)
        if number == 3:
            os.kill(os.getpid(), sent)

    with monkeypatch.context() as patch:
        patch.setattr(console.StepProgress, "step", signal_after_step_3)
        stopped = lora("train", "recipe.yaml", "--output", "runs/b")
    assert (stopped.code, stopped.out) == (code, "")
    assert stopped.err.splitlines()[-1] == "stopped after step 3, which is saved; --resume continues from there"
    assert Path("runs/b/checkpoints/step-00000003").is_dir()
    assert not Path("runs/b/adapter").exists()
    resumed = lora("train", "recipe.yaml", "--output", "runs/b", "--resume")
    assert resumed.code == 0
    assert "resuming after step 3" in resumed.err
    assert adapter_bytes(Path("runs/b")) == adapter_bytes(trained_run)
    own = ("seconds", "peak_memory")  # of each process
    resumed_records, records = (
        [{k: v for k, v in r.items() if k not in own} for r in metrics(run)] for run in (Path("runs/b"), trained_run)
    )
    assert resumed_records == records


def test_a_non_finite_loss_stops_the_run_before_the_step(
    recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    from lora_cli.model.loss import BatchLoss, LossFunction

    recipe({"data.eval": None, "training.save_every": 1})
    compute_loss, calls = LossFunction.__call__, []

    def nan_in_the_fourth_call(loss_fn: LossFunction, batch: Any) -> BatchLoss:
        if loss_fn.device.type != "meta":  # where activations are measured
            calls.append(batch)  # the first call is check_gradients_reach, the fourth is step 3
        batch_loss = compute_loss(loss_fn, batch)
        return batch_loss._replace(loss=batch_loss.loss * float("nan")) if len(calls) == 4 else batch_loss

    monkeypatch.setattr(LossFunction, "__call__", nan_in_the_fourth_call)
    result = lora("train", "recipe.yaml")
    assert (result.code, result.out) == (1, "")
    assert re.fullmatch(r"error: step 3: the loss is not finite; its rows: rows\.jsonl:\d+.*", result.last_two[0])
    assert result.last_two[1].startswith("hint: try a lower")
    assert sorted(p.name for p in Path("runs/a/checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    assert [r["step"] for r in metrics_log.read_metrics(Path("runs/a/metrics.jsonl"))] == [1, 2]


def test_a_base_whose_sums_overflow_is_reported_at_the_first_evaluation(
    recipe: WriteRecipe, lora: Lora, tiny: Any, tiny_folder: Path
):
    tiny.resize_token_embeddings(json.loads((tiny_folder / "config.json").read_text())["vocab_size"])
    tiny.model.layers[0].mlp.up_proj.weight.data[0] = 3e38  # finite, but not the sum of some of them
    tiny.save_pretrained("broken")
    for file in tiny_folder.glob("*token*"):
        (Path("broken") / file.name).write_bytes(file.read_bytes())
    (Path("broken") / "chat_template.jinja").write_bytes((tiny_folder / "chat_template.jinja").read_bytes())
    result = lora("train", recipe({"model.path": "broken", "data.packing": False}))
    assert result.code == 1
    assert result.last_two == [
        "error: the loss on the held-out rows is not finite at step 0",
        "hint: the base model causes it: see model.path and model.dtype",
    ]


@pytest.mark.slow
def test_a_damaged_checkpoint_does_not_change_the_result(trained_run: Path, lora: Lora):
    arguments = ("train", "recipe.yaml", "--output", "runs/b", "--set", "training.keep_checkpoints=3")
    assert lora(*arguments).code == 0
    newest = Path("runs/b/checkpoints/step-00000004/optimizer.safetensors")
    data = bytearray(newest.read_bytes())
    data[-5] ^= 4
    newest.write_bytes(data)
    result = lora(*arguments, "--resume")
    assert result.code == 0, result.err
    assert "step-00000004 is damaged: optimizer.safetensors has other contents than when it was written" in result.err
    assert "resuming after step 2" in result.err
    name = "adapter/adapter_model.safetensors"
    assert (Path("runs/b") / name).read_bytes() == (trained_run / name).read_bytes()


@pytest.mark.slow
def test_a_run_in_float16_learns_with_a_loss_scale(recipe: WriteRecipe, lora: Lora):
    result = lora("train", recipe({"model.dtype": "float16"}))
    assert result.code == 0, result.err
    assert "verified: the adapter on disk" in result.err
    scale = json.loads(Path("runs/a/manifest.json").read_text())["result"]["loss_scale"]
    assert scale["value"] > 1
    losses = [record["loss"] for record in read_metrics(Path("runs/a/metrics.jsonl")) if "loss" in record]
    assert losses[-1] < losses[0]


FILLED = {"data.max_length": 64, "training.tokens_per_batch": "auto", "training.gradient_accumulation": 3}


def test_batches_take_the_memory_there_is_and_steps_keep_their_tokens(
    recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    runs = {}
    for name, free in (("large", 1 << 40), ("small", 0)):
        monkeypatch.setattr(memory, "available_memory", lambda device, free=free: free)
        recipe({**FILLED, "adapter.dropout": 0.0, "output": f"runs/{name}"})
        result = lora("train", "recipe.yaml")
        assert result.code == 0, result.err
        runs[name] = result.err.splitlines()
    said = "tokens_per_batch: auto: a step of a device is one batch of up to 1"
    for lines in runs.values():
        assert any(line.startswith(said) for line in lines)
    chosen = "memory: every layer is recomputed, batches are run in 3 parts, as a step without it needs about "
    assert [line for line in runs["small"] if line.startswith(chosen)], runs["small"]
    assert not any("parts" in line for line in runs["large"])
    large, small = (metrics(Path("runs") / name) for name in runs)
    for a, b in zip(large, small, strict=True):
        assert {k: v for k, v in a.items() if k in ("step", "tokens", "supervised")} == {
            k: v for k, v in b.items() if k in ("step", "tokens", "supervised")
        }
        assert a.get("loss", 0.0) == pytest.approx(b.get("loss", 0.0), rel=1e-4)
    assert max(record.get("tokens", 0) for record in large) > 64
    adapters = [load_file(Path("runs") / name / "adapter" / "adapter_model.safetensors") for name in runs]
    for name, tensor in adapters[0].items():
        assert torch.allclose(tensor, adapters[1][name], atol=1e-3), name


def test_a_resumed_run_keeps_the_parts_of_its_batches(recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 0)
    recipe({**FILLED, "training.schedule": "constant", "training.warmup": 0})
    lora("train", "recipe.yaml")
    expected = adapter_bytes(Path("runs/a"))
    lora("train", "recipe.yaml", "--output", "runs/b", "--set", "training.max_steps=2")
    monkeypatch.setattr(memory, "available_memory", lambda device: 1 << 40)
    resumed = lora("train", "recipe.yaml", "--output", "runs/b", "--resume")
    assert resumed.code == 0, resumed.err
    assert adapter_bytes(Path("runs/b")) == expected
    refused = lora("train", "recipe.yaml", "--resume", "--set", "training.gradient_accumulation=4")
    assert "training.gradient_accumulation: 3 -> 4" in refused.err.splitlines()
    assert refused.code == 2
    for setting in ("data.max_length=100", "training.tokens_per_batch=64"):
        refused = lora("train", "recipe.yaml", "--resume", "--set", setting)
        assert refused.code == 2, setting
        assert "cannot resume, changed since this checkpoint: training.tokens_per_batch" in refused.last_two[0]
        assert "write training.gradient_accumulation" not in refused.err


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"training.gradient_accumulation": 1}, "training.tokens_per_batch: auto has no batches to join — write "),
        ({"data.packing": False}, "training.tokens_per_batch: has no effect without packing — "),
        ({"training.tokens_per_batch": "most"}, "training.tokens_per_batch: "),
    ],
)
def test_where_there_is_nothing_to_fill_auto_is_refused(
    changes: dict[str, Any], error: str, recipe: WriteRecipe, lora: Lora
):
    recipe({**FILLED, **changes})
    for command in ("train", "check"):
        result = lora(command, "recipe.yaml")
        assert result.code == 2
        assert error in result.err


def test_check_shows_the_memory_of_the_smallest_batches(recipe: WriteRecipe, lora: Lora):
    result = lora("check", recipe(FILLED))
    assert result.code == 0, result.err
    assert re.search(
        r"^  with batches of up to \d+ tokens; tokens_per_batch: auto takes up to 1[89]\d where they fit$",
        result.out,
        re.MULTILINE,
    )
