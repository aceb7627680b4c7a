"""Converted numbers: rows and tokens per step, the scale of the adapter, learning rates, defaults of the libraries."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.recipe.schema import Recipe
from lora_cli.training.lr_schedule import learning_rate, warmup_steps
from tests.convert.minimal import convert


def rows_per_step(recipe: Recipe, devices: int = 1) -> int:
    training = recipe.training
    assert training.batch_size is not None
    return training.rows_per_step or training.batch_size * training.gradient_accumulation * devices


BATCHES: list[tuple[str, dict[str, Any], int]] = [
    ("axolotl", {"micro_batch_size": 3, "gradient_accumulation_steps": 5}, 15),
    ("axolotl", {"micro_batch_size": 2, "batch_size": 8}, 8),
    ("axolotl", {}, 1),
    ("llama-factory", {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}, 15),
    ("llama-factory", {}, 8),
    ("trl", {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}, 15),
    ("trl", {}, 8),
    ("torchtune", {"batch_size": 3, "gradient_accumulation_steps": 5}, 15),
    ("litgpt", {"train": {"global_batch_size": 12, "micro_batch_size": 3, "max_seq_length": 512}}, 12),
    ("litgpt", {"train": {"global_batch_size": 6, "micro_batch_size": 4, "max_seq_length": 512}}, 4),
    ("litgpt", {"devices": 2, "train": {"global_batch_size": 12, "micro_batch_size": 3, "max_seq_length": 512}}, 12),
    ("mlx", {"batch_size": 3, "grad_accumulation_steps": 5}, 15),
    ("mlx", {}, 4),
]


@pytest.mark.parametrize(("tool", "keys", "rows"), BATCHES)
def test_rows_per_step(tool: str, keys: dict[str, Any], rows: int):
    assert rows_per_step(convert(tool, **keys)) == rows


PACKED: list[tuple[str, dict[str, Any], int]] = [
    ("axolotl", {"sample_packing": True, "flash_attention": True, "sequence_len": 2048, "micro_batch_size": 2}, 2048),
    ("llama-factory", {"neat_packing": True, "cutoff_len": 1024, "per_device_train_batch_size": 2}, 1024),
    ("trl", {"packing": True, "max_length": 512, "per_device_train_batch_size": 2}, 512),
]


@pytest.mark.parametrize(("tool", "keys", "length"), PACKED)
def test_tokens_per_step(tool: str, keys: dict[str, Any], length: int):
    """A step has 3 batches of 2 packed rows."""
    recipe = convert(tool, **keys, gradient_accumulation_steps=3)
    assert recipe.data.packing is not False
    assert isinstance(recipe.training.tokens_per_batch, int)
    assert recipe.training.tokens_per_batch * recipe.training.gradient_accumulation == 3 * 2 * length


SCALES: list[tuple[str, dict[str, Any], float]] = [
    ("axolotl", {"lora_r": 32, "lora_alpha": 16}, 16 / 32),
    ("axolotl", {"lora_r": 32, "lora_alpha": 16, "peft_use_rslora": True}, 16 / math.sqrt(32)),
    ("llama-factory", {"lora_rank": 4}, 2.0),
    ("llama-factory", {}, 2.0),
    ("llama-factory", {"lora_rank": 4, "lora_alpha": 4}, 1.0),
    ("trl", {"lora_r": 8, "lora_alpha": 4}, 0.5),
    ("trl", {}, 32 / 16),
    ("litgpt", {"lora_r": 32, "lora_alpha": 16}, 0.5),
    ("mlx", {"lora_parameters": {"rank": 4, "scale": 10.0}}, 10.0),
    ("mlx", {}, 20.0),
]


@pytest.mark.parametrize(("tool", "keys", "scale"), SCALES)
def test_scale_of_the_adapter(tool: str, keys: dict[str, Any], scale: float):
    spec = convert(tool, **keys).adapter
    assert spec.rank is not None
    assert spec.alpha is not None
    assert spec.alpha / (math.sqrt(spec.rank) if spec.method == "rslora" else spec.rank) == scale


TOTAL = 40
SCHEDULES: list[dict[str, Any]] = [
    {},
    {"lr_scheduler_type": "linear", "warmup_steps": 7},
    {"lr_scheduler_type": "cosine", "warmup_ratio": 0.1},
    {"lr_scheduler_type": "cosine", "warmup_ratio": 0.11},
    {"lr_scheduler_type": "constant", "warmup_steps": 7},
    {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 7},
    {"lr_scheduler_type": "cosine_with_restarts", "warmup_steps": 4},
    {"lr_scheduler_type": "cosine_with_restarts", "warmup_steps": 4, "lr_scheduler_kwargs": {"num_cycles": 3}},
    {"lr_scheduler_type": "cosine_with_min_lr", "warmup_steps": 4, "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 3e-5}},
    {"lr_scheduler_type": "polynomial", "warmup_steps": 4},
    {
        "lr_scheduler_type": "warmup_stable_decay",
        "warmup_steps": 4,
        "lr_scheduler_kwargs": {"num_decay_steps": 10, "decay_type": "linear"},
    },
    {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 10, "decay_type": "linear", "min_lr_ratio": 0.1},
    },
]


@pytest.mark.parametrize("keys", SCHEDULES, ids=lambda keys: f"{keys}"[:60])
def test_learning_rates_are_those_of_transformers(keys: dict[str, Any], tmp_path: Path):
    """In the decay the same at each step; the warmup there starts at 0, and here one step above it."""
    from transformers import Trainer, TrainingArguments

    theirs_keys = {"warmup_steps" if key == "warmup_ratio" else key: value for key, value in keys.items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=3e-4, report_to="none", use_cpu=True, **theirs_keys
    )
    layer = torch.nn.Linear(1, 1)
    trainer = Trainer(layer, arguments)
    optimizer = torch.optim.SGD(layer.parameters(), lr=3e-4)
    scheduler = trainer.create_scheduler(TOTAL, optimizer)
    theirs = []
    for _ in range(TOTAL):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    spec = convert("trl", learning_rate=3e-4, **keys).training
    ours = [learning_rate(step, spec=spec, total=TOTAL) for step in range(TOTAL)]
    warmup = warmup_steps(spec.warmup, TOTAL)
    assert ours[warmup:] == pytest.approx(theirs[warmup:], rel=1e-9)
    assert ours[: max(0, warmup - 1)] == pytest.approx(theirs[1:warmup], rel=1e-9)


def test_the_minimum_of_the_cosine():
    """litgpt reads min_lr in pretraining only."""
    spec = convert("axolotl", learning_rate=2e-4, cosine_min_lr_ratio=0.1).training
    assert (spec.schedule, spec.min_learning_rate) == ("cosine", 2e-5)
    train = {"global_batch_size": 8, "micro_batch_size": 4, "min_lr": 1e-5, "max_seq_length": 512}
    spec = convert(
        "litgpt", train=train, optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
    ).training
    assert (spec.learning_rate, spec.min_learning_rate, spec.weight_decay) == (1e-3, 0.0, 0.01)


def test_defaults_of_trl_are_those_of_the_installed_version():
    library = pytest.importorskip("trl")
    theirs, model = library.SFTConfig("out", report_to="none", use_cpu=True, bf16=False), library.ModelConfig()
    recipe = convert("trl")
    training, data, adapter = recipe.training, recipe.data, recipe.adapter
    assert training.learning_rate == theirs.learning_rate
    assert training.epochs == theirs.num_train_epochs
    assert training.batch_size == theirs.per_device_train_batch_size
    assert training.gradient_accumulation == theirs.gradient_accumulation_steps
    assert training.schedule == theirs.lr_scheduler_type
    assert training.warmup == theirs.warmup_steps == 0
    assert training.weight_decay == theirs.weight_decay
    assert training.max_grad_norm == theirs.max_grad_norm
    assert (training.adam_beta1, training.adam_beta2) == (theirs.adam_beta1, theirs.adam_beta2)
    assert theirs.adam_epsilon == 1e-8
    assert training.seed == theirs.seed
    assert data.max_length == theirs.max_length
    assert (data.packing, data.overlong) == (theirs.packing, "truncate")
    assert (data.loss_on == "all") is not theirs.assistant_only_loss
    assert (adapter.rank, adapter.alpha, adapter.dropout) == (model.lora_r, model.lora_alpha, model.lora_dropout)
    assert data.eval is None
    assert theirs.eval_strategy == "no"


def test_defaults_of_transformers_are_those_of_the_installed_version(tmp_path: Path):
    from transformers import TrainingArguments

    theirs = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    training = convert("llama-factory").training
    assert training.learning_rate == theirs.learning_rate
    assert training.epochs == theirs.num_train_epochs
    assert training.batch_size == theirs.per_device_train_batch_size
    assert training.schedule == theirs.lr_scheduler_type
    assert training.warmup == 0
    assert str(theirs.optim.value).startswith("adamw_torch")


def test_weight_decay_of_torchtune_is_that_of_torch():
    recipe = convert("torchtune", optimizer={"_component_": "torch.optim.AdamW", "lr": 1e-4})
    default = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).defaults
    assert recipe.training.weight_decay == default["weight_decay"]
    assert (recipe.training.adam_beta1, recipe.training.adam_beta2) == tuple(default["betas"])
