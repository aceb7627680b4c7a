"""`lora train`: the best step, early stopping, answers during training, and going on from an adapter."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from lora_cli.run import console
from lora_cli.setup import evaluations
from lora_cli.setup.evaluations import describe_choice
from lora_cli.training.best_step import EvaluationHistory, RowLosses
from tests.commands.conftest import CommandResult, Lora, WriteRecipe, remove_checksums
from tests.model import zoo

# The learning rate grows with every step: the loss falls at first, and then rises far above that of the base.
RISING = {
    "training.max_steps": 40,
    "training.eval_every": 1,
    "training.save_every": 100,
    "training.learning_rate": 1.0,
    "training.warmup": 40,
    "training.keep": "best",
    "training.stop_after": 3,
}


def records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "peak_memory")} for line in lines]


def eval_losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["eval_loss"] for record in records(run) if "eval_loss" in record}


def result_of(run: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "manifest.json").read_text())["result"]
    return result


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def trained_on(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "trained_on.json").read_text())
    return record


def train_rising(recipe: WriteRecipe, lora: Lora, output: str = "runs/a", *options: str) -> CommandResult:
    return lora("train", recipe(RISING), "--output", output, *options)


@pytest.mark.slow
def test_the_best_step_is_kept_the_run_stops_early_and_resumes_to_the_same_result(
    recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    result, run = train_rising(recipe, lora), Path("runs/a")
    assert result.code == 0, result.err
    losses = eval_losses(run)
    best = min((step for step in losses if step), key=lambda step: losses[step])
    last = max(losses)
    assert last == best + 3 < 40  # three evaluations without a lower loss
    assert f"stopped early after step {last} of 40: 3 evaluations without a loss below" in result.err
    assert "the learning rate followed the schedule of 40 steps" in result.err
    assert f"kept: the adapter of step {best}, the best of {last} evaluations: loss {losses[best]:.4f}" in result.err
    assert f"  versus the last step ({last}): loss " in result.err
    assert "  versus the base: loss " in result.err
    assert f"eval loss {losses[0]:.4f} -> {losses[best]:.4f}" in result.err
    assert weights(run / "adapter") == weights(run / "checkpoints" / f"step-{best:08d}")
    assert trained_on(run / "adapter")["step"] == best
    assert f"The adapter is that of step {best} of {last}," in (run / "adapter" / "README.md").read_text()
    expected = {"steps_done": last, "stopped_early": True, "adapter_step": best, "keep": "best"}
    assert expected.items() <= result_of(run).items()
    assert f"step-{best:08d}" in os.listdir(run / "checkpoints")

    before = records(run)
    finished = train_rising(recipe, lora, "runs/a", "--resume")
    assert finished.code == 0
    assert f"this run is finished: it stopped early after step {last}; to go on, raise or remove" in finished.err
    assert records(run) == before
    assert trained_on(run / "adapter")["step"] == best

    show_step = console.StepProgress.step

    def signal_after_the_best(
        progress: console.StepProgress, number: int, values: dict[str, str], *, loss: float
    ) -> None:
        show_step(progress, number, values, loss=loss)
        if number == best + 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(console.StepProgress, "step", signal_after_the_best)
        assert train_rising(recipe, lora, "runs/b").code == 130
    resumed = train_rising(recipe, lora, "runs/b", "--resume")
    assert resumed.code == 0
    assert records(Path("runs/b")) == before
    assert result_of(Path("runs/b")) == result_of(run)
    assert weights(Path("runs/b/adapter")) == weights(run / "adapter")
    assert [line for line in resumed.err.splitlines() if "versus" in line] == [
        line for line in result.err.splitlines() if "versus" in line
    ]
    checkpoint = run / "checkpoints" / f"step-{best:08d}"
    (checkpoint / "adapter_model.safetensors").write_bytes(b"damaged")
    damaged = train_rising(recipe, lora, "runs/a", "--resume")
    assert damaged.code == 2
    assert "which has the adapter of the best step, is damaged: adapter_model.safetensors" in damaged.last_two[0]
    shutil.rmtree(checkpoint)
    missing = train_rising(recipe, lora, "runs/a", "--resume")
    assert missing.code == 2
    assert missing.last_two[0].endswith(f"step-{best:08d} is missing: it has the adapter of the best step")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["measure_likelihood", "generate_answers"])
@pytest.mark.parametrize("call", [2, 3])  # after step 2, and after the last one
def test_a_signal_stops_an_evaluation_which_the_resumed_run_makes_again(
    place: str, call: int, recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    recipe({"training.answer_every": 2})
    assert lora("train", "recipe.yaml").code == 0
    function, calls = getattr(evaluations, place), []

    def send_signal(*arguments: Any, **options: Any) -> Any:
        calls.append(place)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluations, place, send_signal)
        stopped = lora("train", "recipe.yaml", "--output", "runs/b")
    step = 2 * (call - 1)
    assert stopped.code == 143
    assert stopped.err.splitlines()[-1].startswith(f"stopped after step {step}, which is saved")
    assert step not in (eval_losses(Path("runs/b")) if place == "measure_likelihood" else answered(Path("runs/b")))
    resumed = lora("train", "recipe.yaml", "--output", "runs/b", "--resume")
    assert resumed.code == 0, resumed.err
    assert records(Path("runs/b")) == records(Path("runs/a"))
    assert Path("runs/b/answers.jsonl").read_text() == Path("runs/a/answers.jsonl").read_text()
    assert weights(Path("runs/b/adapter")) == weights(Path("runs/a/adapter"))
    assert lora("train", "recipe.yaml", "--output", "runs/b", "--resume").code == 0
    assert records(Path("runs/b")) == records(Path("runs/a"))


def answered(run: Path) -> set[int]:
    return {json.loads(line)["step"] for line in (run / "answers.jsonl").read_text().splitlines()}


def test_a_base_that_is_better_than_every_step_is_told_loudly():
    history = EvaluationHistory(start_is_candidate=False)
    for step, loss in ((0, 2.0), (5, 2.5), (10, 3.0)):
        history.add(step, loss, RowLosses(np.full(8, loss), np.ones(8, dtype=np.int64)))
    assert describe_choice(history, step=10, source=None) == [
        "kept: the adapter of step 5, the best of 2 evaluations: loss 2.5000",
        "  versus the last step (10): loss better by 0.5000 ± 0.0000 (95% interval over 8 rows, paired)",
        "  versus the base: loss worse by 0.5000 ± 0.0000 (95% interval over 8 rows, paired)",
        "warning: the base without adapter is better than every evaluated step: loss 2.0000. The adapter of step 5 is "
        "written, because an untrained one is the base, but do not use it: try a lower training.learning_rate",
    ]


def test_one_evaluation_is_too_few_to_choose_from(recipe: WriteRecipe, lora: Lora):
    recipe({"training.keep": "best", "training.eval_every": 4})
    for command in ("check", "train"):
        result = lora(command, "recipe.yaml")
        assert result.code == 2
        assert result.last_two == [
            "error: training.keep: best chooses between evaluations, but this run of 4 steps has only one, after the "
            "last step: eval_every is 4",
            "hint: write training.eval_every: 1, or keep: last",
        ]


def test_an_optimizer_or_adapter_that_cannot_be_used_is_refused_before_the_rows_are_read(
    recipe: WriteRecipe, lora: Lora
):
    Path("broken.jsonl").write_text("no row")
    for changes in ({"training.optimizer": "paged-lion"}, {"adapter": {"from": "nowhere"}}):
        recipe({**changes, "data.train": "broken.jsonl"})
        for command in ("check", "train"):
            line = lora(command, "recipe.yaml").last_two[0]
            assert line.startswith(("error: training.optimizer: paged-lion pages", "error: adapter.from: nowhere"))


def test_answers_do_not_change_the_run_and_are_kept(trained_run: Path, recipe: WriteRecipe, lora: Lora):
    changes = {"training.answer_every": 3, "training.answer_prompts": 2}
    result, run = lora("train", recipe(changes), "--output", "runs/b"), Path("runs/b")
    assert result.code == 0, result.err
    assert records(run) == records(trained_run)
    assert weights(run / "adapter") == weights(trained_run / "adapter")
    lines = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 0, 3, 3, 4, 4]
    assert lines[0].keys() == {"step", "where", "prompt", "references", "answer", "finished"}
    assert lines[0]["prompt"].startswith("<|im_start|>user\n")
    assert lines[0]["where"] == lines[2]["where"] != lines[1]["where"]
    assert f"answer at step 4 to {lines[0]['where']}: " in result.err
    resumed = lora("train", "recipe.yaml", "--output", "runs/b", "--resume")
    assert resumed.code == 0
    assert [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()] == lines


def test_training_goes_on_from_a_run_with_its_keys_and_its_loss(trained_run: Path, recipe: WriteRecipe, lora: Lora):
    recipe({"training.max_steps": 2, "adapter": {"from": "runs/a"}})
    result, run = lora("train", "recipe.yaml", "--output", "runs/b"), Path("runs/b")
    assert result.code == 0, result.err
    assert "measuring the base with the adapter in runs/a on " in result.err
    assert re.search(r"^adapter: goes on from runs/a/adapter, step 4, 1 in its chain", result.err, re.MULTILINE)
    assert eval_losses(run)[0] == eval_losses(trained_run)[4]
    assert "| before |" in (run / "adapter" / "README.md").read_text()
    before, after = (json.loads((f / "adapter/adapter_config.json").read_text()) for f in (trained_run, run))
    assert (after["r"], after["lora_alpha"], after["lora_dropout"]) == (4, 8, 0.1)
    assert sorted(after["target_modules"]) == sorted(before["target_modules"])
    (origin,) = trained_on(run / "adapter")["origins"]
    assert (origin["adapter"], origin["step"], len(origin["digest"])) == ("runs/a", 4, 64)
    assert json.loads((run / "manifest.json").read_text())["origins"] == [origin]

    recipe({"training.max_steps": 2, "adapter": {"from": "runs/b/adapter", "method": "lora+"}, "training.keep": "best"})
    third = lora("train", "recipe.yaml", "--output", "runs/c", "--set", "training.eval_every=1")
    assert third.code == 0, third.err
    chain = trained_on(Path("runs/c/adapter"))["origins"]
    assert chain[0] == origin
    assert [entry["adapter"] for entry in chain] == ["runs/a", "runs/b/adapter"]
    # The resolved recipe has all keys, so that the run can be evaluated when its source is gone.
    shutil.rmtree(trained_run)
    shutil.rmtree(run)
    assert lora("eval", "runs/c").code == 0
    assert lora("check", "recipe.yaml", "--set", "output=runs/d").last_two == [
        "error: adapter.from: runs/b/adapter does not exist",
        "hint: give a run of lora train, or an adapter folder",
    ]


@pytest.mark.slow
def test_an_adapter_that_training_makes_worse_is_kept_as_it_was(recipe: WriteRecipe, lora: Lora):
    recipe({"training.max_steps": 40, "training.eval_every": None})
    assert lora("train", "recipe.yaml").code == 0
    destroying = {"training.learning_rate": 10.0, "training.warmup": 0, "training.eval_every": 1}
    recipe({**destroying, "training.keep": "best", "adapter": {"from": "runs/a"}})
    result = lora("train", "recipe.yaml", "--output", "runs/b")
    assert result.code == 0, result.err
    assert "warning: no step is better than the adapter in runs/a, which is kept as it was" in result.err
    source, kept = (load_file(Path(run) / "adapter/adapter_model.safetensors") for run in ("runs/a", "runs/b"))
    assert all(kept[name].equal(tensor) for name, tensor in source.items())
    assert trained_on(Path("runs/b/adapter"))["step"] == 0


REMOVE = "hint: remove the key, which is then read from the adapter, or write its value"


@pytest.mark.parametrize(
    ("adapter", "lines"),
    [
        ({"rank": 8}, ["error: adapter.rank: 8, but the adapter in runs/a/adapter has 4", REMOVE]),
        ({"method": "dora"}, ["error: adapter.method: dora, but the adapter in runs/a/adapter has lora", REMOVE]),
        ({"method": "pissa"}, ["error: adapter.method: pissa, but the adapter in runs/a/adapter has lora", REMOVE]),
        ({"rank": 8, "bias": "all", "alpha": 3}, ["error: adapter.from: 3 keys disagree with runs/a/adapter", REMOVE]),
        (
            {"trainable_tokens": ["<|im_end|>"]},
            [
                "error: adapter.from: the trained token ids of runs/a/adapter are none, of this recipe ID of lm_head; "
                "ID of model.embed_tokens",
                "hint: list the same tokens in adapter.trainable_tokens, in the same order",
            ],
        ),
    ],
)
def test_keys_that_disagree_with_the_adapter_are_refused(
    adapter: dict[str, Any], lines: list[str], trained_run: Path, recipe: WriteRecipe, lora: Lora
):
    recipe({"adapter": {"from": "runs/a", **adapter}, "output": "runs/b"})
    for command in ("check", "train"):
        result = lora(command, "recipe.yaml")
        assert result.code == 2
        assert [re.sub(r"\d+ of (lm|model)", r"ID of \1", line) for line in result.last_two] == lines
    if "alpha" in adapter:
        assert result.err.splitlines()[-5:-2] == [
            "adapter.rank: 8, but the adapter in runs/a/adapter has 4",
            "adapter.alpha: 3, but the adapter in runs/a/adapter has 8",
            "adapter.bias: all, but the adapter in runs/a/adapter has none",
        ]


def test_another_base_a_missing_folder_and_what_no_recipe_can_train_are_refused(
    trained_run: Path, recipe: WriteRecipe, lora: Lora, tiny_folder: Path
):
    def refused(**adapter: Any) -> list[str]:
        recipe({"adapter": adapter, "output": "runs/b"})
        result = lora("check", "recipe.yaml")
        assert result.code == 2
        return result.last_two

    assert refused(**{"from": "nowhere"})[0] == "error: adapter.from: nowhere does not exist"
    assert refused(**{"from": "base"})[0] == "error: adapter.from: base is a model, not an adapter"
    shutil.copytree(trained_run, "unfinished")
    shutil.rmtree("unfinished/adapter")
    assert refused(**{"from": "unfinished"}) == [
        "error: adapter.from: unfinished has no adapter: its training did not finish",
        "hint: continue it with lora train unfinished/recipe.yaml --resume, or use its newest checkpoint, "
        "unfinished/checkpoints/step-00000004",
    ]
    for output in ("runs/a", "runs"):
        recipe({"adapter": {"from": "runs/a/adapter"}, "output": output})
        result = lora("train", "recipe.yaml", "--fresh")
        assert result.code == 2
        assert f"output: '{output}' contains adapter.from, runs/a/adapter, which this run would replace" in result.err
    assert (trained_run / "adapter").is_dir()
    folder = remove_checksums(trained_run / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())

    def change(**values: Any) -> None:
        (folder / "adapter_config.json").write_text(json.dumps({**config, **values}))

    change(task_type="SEQ_CLS")
    assert "has task_type: SEQ_CLS, this recipe CAUSAL_LM" in refused(**{"from": "runs/a"})[0]
    change(target_modules=["q_proj"])
    assert "down_proj is not among the target_modules" in refused(**{"from": "runs/a"})[0]
    change()
    record = trained_on(folder)
    (folder / "trained_on.json").write_text(json.dumps({**record, "fingerprint": "ab" * 32}))
    assert re.match(
        r"error: adapter.from: runs/a/adapter was trained on base, LlamaForCausalLM \(fingerprint abababababab\), "
        r"not on base \(fingerprint [0-9a-f]{12}\)$",
        refused(**{"from": "runs/a"})[0],
    )


def test_an_adapter_of_peft_alone_is_continued(recipe: WriteRecipe, lora: Lora, tiny_folder: Path):
    vocabulary = json.loads((tiny_folder / "config.json").read_text())["vocab_size"]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["v_proj", "q_proj"], use_rslora=True, task_type="CAUSAL_LM")
    get_peft_model(zoo.make("llama", vocab_size=vocabulary), config).save_pretrained("theirs")
    recipe({"training.max_steps": 2, "adapter": {"from": "theirs"}})
    result = lora("train", "recipe.yaml")
    assert result.code == 0, result.err
    assert "note: theirs names its base " in result.err
    assert re.search(r"^adapter: goes on from theirs, 1 in its chain", result.err, re.MULTILINE)
    saved = json.loads(Path("runs/a/adapter/adapter_config.json").read_text())
    assert (saved["r"], saved["use_rslora"], sorted(saved["target_modules"])) == (2, True, ["q_proj", "v_proj"])
