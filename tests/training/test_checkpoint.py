"""Checkpoints are written atomically, contain everything that a resumed run needs, and load only into the same run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lora_cli.errors import LoraError
from lora_cli.model import adalora, save_adapter
from lora_cli.recipe.schema import TrainingSpec
from lora_cli.training import checkpoint
from lora_cli.training.best_step import EvaluationHistory
from lora_cli.training.checkpoint_folders import list_checkpoints, newest_checkpoint
from lora_cli.training.optimizer import averaged_weights, make_optimizer
from tests.model import zoo

STATE = {"total_steps": 9, "data": "abc", "training": {"seed": 1, "epochs": 1.0}, "quantization": None}


def make_model_and_optimizer(
    seed: int = 0, family: str = "llama", *, optimizer: str = "adamw", **spec: object
) -> tuple[PeftModel, torch.optim.Optimizer]:
    model = zoo.adapted(zoo.make(family, hidden_size=128), seed=seed, **spec)
    return model, make_optimizer(model, TrainingSpec(learning_rate=0.01), name=optimizer)


def save(folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer, *, step: int, keep: int = 1) -> Path:
    return checkpoint.save_checkpoint(
        folder,
        model,
        optimizer,
        step=step,
        state=STATE,
        keep=keep,
        write_adapter=lambda target: save_adapter.save_adapter(model, target, base="org/base", revision=None),
        rank_allocator=adalora.rank_allocator(model),
    )


def load(folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint, and return its step."""
    saved = newest_checkpoint(folder)
    assert saved
    checkpoint.load_checkpoint(saved, model, optimizer, rank_allocator=adalora.rank_allocator(model))
    return saved.step


def train(model: PeftModel, optimizer: torch.optim.Optimizer, steps: int, *, seed: int = 0) -> None:
    rank_allocator = adalora.rank_allocator(model)
    for number in range(steps):
        ids = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(seed + number))
        model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss.backward()
        optimizer.step()
        if rank_allocator:
            rank_allocator.update_and_allocate(seed + number + 1)
        optimizer.zero_grad()


def parameters(model: PeftModel) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def assert_resumed_equals_uninterrupted(tmp_path: Path, **spec: object) -> None:
    model, optimizer = make_model_and_optimizer(family="qwen2", **spec)
    train(model, optimizer, 3)
    save(tmp_path, model, optimizer, step=3, keep=2)
    resumed, resumed_optimizer = make_model_and_optimizer(seed=5, family="qwen2", **spec)
    assert load(tmp_path, resumed, resumed_optimizer) == 3
    train(model, optimizer, 3, seed=100)
    train(resumed, resumed_optimizer, 3, seed=100)
    assert all(torch.equal(a, b) for a, b in zip(parameters(model), parameters(resumed), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("method", zoo.METHODS)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, method: str):
    assert_resumed_equals_uninterrupted(tmp_path, method=method)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"method": "dora", "bias": "all"},
        {"freeze_a": True},
        {"modules_to_save": ["lm_head"], "trainable_tokens": ["word"]},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3.0}},
        {"optimizer": "adamw-8bit", "rank": 64},  # matrices of more than 4,096 values: moments in 8 bits
        {"optimizer": "lion-8bit", "rank": 64},
        {"optimizer": "adafactor"},
        {"optimizer": "muon", "method": "dora"},
        {"optimizer": "schedule-free-adamw", "method": "pissa"},
    ],
)
def test_a_resumed_run_with_other_trained_parameters_equals_an_uninterrupted_one(
    tmp_path: Path, options: dict[str, object]
):
    assert_resumed_equals_uninterrupted(tmp_path, **options)


def test_a_checkpoint_of_a_schedule_free_optimizer_has_the_average_as_its_adapter(tmp_path: Path):
    model, optimizer = make_model_and_optimizer(optimizer="schedule-free-adamw")
    train(model, optimizer, 3)
    training_weights = parameters(model)
    folder = save(tmp_path, model, optimizer, step=3)
    assert all(torch.equal(a, b) for a, b in zip(training_weights, parameters(model), strict=True))
    with averaged_weights(optimizer):
        average = parameters(model)
    checkpoint.load_weights(folder, model)
    assert all(torch.equal(a, b) for a, b in zip(average, parameters(model), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(average, training_weights, strict=True))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_checkpoints_are_kept_and_the_newest_is_loaded(tmp_path: Path, keep: int):
    model, optimizer = make_model_and_optimizer()
    train(model, optimizer, 1)
    for step in (2, 9, 10, 100):
        save(tmp_path, model, optimizer, step=step, keep=keep)
    names = [f"step-{step:08d}" for step in (2, 9, 10, 100)][-keep:]
    assert [path.name for path in list_checkpoints(tmp_path)] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert load(tmp_path, *make_model_and_optimizer()) == 100


def test_a_checkpoint_contains_only_safetensors_and_json(tmp_path: Path):
    model, optimizer = make_model_and_optimizer()
    train(model, optimizer, 1)
    folder = save(tmp_path, model, optimizer, step=1)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json", "checksums.json",
    }  # fmt: skip
    state = json.loads((folder / "state.json").read_text())
    assert STATE.items() <= state.items()
    moments = load_file(folder / "optimizer.safetensors")
    count = sum(1 for p in model.parameters() if p.requires_grad)
    assert len(moments) == 3 * count
    assert len(load_file(folder / "adapter_model.safetensors")) == count


def test_a_run_may_have_no_checkpoint(tmp_path: Path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "missing") is None


def test_the_checkpoint_of_the_best_step_is_kept_beside_the_newest(tmp_path: Path):
    model, optimizer = make_model_and_optimizer()
    train(model, optimizer, 1)
    history = EvaluationHistory(start_is_candidate=False)
    for step, loss in ((0, 3.0), (2, 1.0), (4, 2.0), (6, 2.0), (8, 2.0)):
        history.add(step, loss)
        checkpoint.save_checkpoint(
            tmp_path,
            model,
            optimizer,
            step=step,
            state=STATE,
            keep=1,
            write_adapter=lambda target: save_adapter.save_adapter(model, target, base="org/base", revision=None),
            history=history,
            keep_best=True,
        )
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000008"]
    restored = EvaluationHistory(start_is_candidate=False)
    saved = newest_checkpoint(tmp_path)
    assert saved
    assert saved.step == 8
    checkpoint.load_checkpoint(saved, model, optimizer, history=restored)
    assert restored.evaluations == history.evaluations


def test_an_adapter_with_other_tensors_is_an_error(tmp_path: Path):
    model, optimizer = make_model_and_optimizer()
    train(model, optimizer, 1)
    save(tmp_path, model, optimizer, step=1)
    with pytest.raises(LoraError, match="its adapter has other tensors"):
        load(tmp_path, *make_model_and_optimizer(target_modules=["q_proj"]))


def make_a_moment_nan(model: PeftModel, optimizer: torch.optim.Optimizer) -> str:
    name, parameter = next((name, p) for name, p in model.named_parameters() if ".lora_B." in name)
    optimizer.state[parameter]["exp_avg_sq"][1, 1] = torch.nan
    return f"exp_avg_sq of {name} has NaN"


def make_a_weight_infinite(model: PeftModel, optimizer: torch.optim.Optimizer) -> str:
    name, parameter = next((name, p) for name, p in model.named_parameters() if ".lora_A." in name)
    parameter.data[0, 0] = -torch.inf
    return f"{name} has an infinity"


@pytest.mark.parametrize("damage", [make_a_moment_nan, make_a_weight_infinite])
@pytest.mark.parametrize("earlier", [True, False])
def test_what_is_not_finite_is_never_saved(
    tmp_path: Path, damage: Callable[[PeftModel, torch.optim.Optimizer], str], earlier: bool
):
    model, optimizer = make_model_and_optimizer()
    train(model, optimizer, 1)
    if earlier:
        save(tmp_path, model, optimizer, step=1)
    saved = parameters(model)
    train(model, optimizer, 1)
    found = damage(model, optimizer)
    with pytest.raises(LoraError) as caught:
        save(tmp_path, model, optimizer, step=2)
    assert caught.value.message == f"step 2 is not saved: {found}"
    assert caught.value.exit_code == 1
    assert caught.value.hint
    assert (f"{tmp_path}/step-00000001 is from before it" in caught.value.hint) == earlier
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"] * earlier
    if earlier:
        other, other_optimizer = make_model_and_optimizer(seed=5)
        assert load(tmp_path, other, other_optimizer) == 1
        assert all(torch.equal(a, b) for a, b in zip(saved, parameters(other), strict=True))


@pytest.mark.parametrize("file", ["optimizer.safetensors", "adapter_model.safetensors"])
def test_a_checkpoint_that_is_not_finite_is_not_loaded(tmp_path: Path, file: str):
    model, optimizer = make_model_and_optimizer()
    train(model, optimizer, 1)
    folder = save(tmp_path, model, optimizer, step=1)
    tensors = load_file(folder / file)
    next(value for value in tensors.values() if value.ndim)[0, 0] = torch.nan
    save_file(tensors, folder / file)
    with pytest.raises(LoraError, match=f"{folder}: .* has NaN"):
        load(tmp_path, *make_model_and_optimizer(seed=5))


@pytest.mark.parametrize("optimizer", ["adamw-8bit", "lion-8bit", "adafactor", "muon", "schedule-free-adamw"])
def test_the_state_of_every_kind_of_optimizer_is_checked(tmp_path: Path, optimizer: str):
    model, own = make_model_and_optimizer(optimizer=optimizer, rank=64)
    train(model, own, 1)
    save(tmp_path, model, own, step=1)
    parts = [own.part_of(p) for p in model.parameters() if p.requires_grad] if optimizer == "muon" else [own]
    state = next(iter(parts[0].state.values()))
    key = next(
        k
        for k, v in state.items()
        if isinstance(v, torch.Tensor) and v.is_floating_point() and v.ndim and k[:4] != "qmap"
    )
    state[key].view(-1)[0] = torch.nan
    with pytest.raises(LoraError, match=r"step 2 is not saved: .* has NaN"):
        save(tmp_path, model, own, step=2)


@pytest.mark.parametrize("file", ["optimizer.safetensors", "state.json"])
def test_a_failed_save_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str):
    model, optimizer = make_model_and_optimizer()
    train(model, optimizer, 1)
    save(tmp_path, model, optimizer, step=1)
    saved = parameters(model)
    train(model, optimizer, 1)

    class WriteError(Exception):
        """An error while writing, such as a full disk."""

    def failing_save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if path.name == file:
            raise WriteError
        save_file(tensors, path)

    def failing_write_text(path: Path, *_: object, **__: object) -> None:
        raise WriteError

    monkeypatch.setattr(checkpoint, "save_file", failing_save_file)
    if file == "state.json":
        monkeypatch.setattr(Path, "write_text", failing_write_text)
    with pytest.raises(WriteError):
        save(tmp_path, model, optimizer, step=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    other, other_optimizer = make_model_and_optimizer(seed=5)
    assert load(tmp_path, other, other_optimizer) == 1
    assert all(torch.equal(a, b) for a, b in zip(saved, parameters(other), strict=True))
