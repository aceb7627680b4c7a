"""Runs on the device: saved = loaded, resumed = uninterrupted, every tensor on the device, one wait a step."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

from lora_cli.data.pinning import pin_batch
from lora_cli.model import save_adapter
from lora_cli.model.loss import LossFunction
from lora_cli.model.packed_attention import PACKED_ATTENTION
from lora_cli.model.varlen_attention import VARLEN_ATTENTION
from lora_cli.training import checkpoint
from lora_cli.training.checkpoint_folders import newest_checkpoint
from lora_cli.training.loop import Step, fit
from lora_cli.training.optimizer import make_optimizer
from tests.gpu.tiny_runs import SPEC, adapt, error, load_base, make_model, make_plan, train, trained
from tests.model import zoo

BASES: dict[str, dict[str, Any]] = {"plain": {}, "nf4": {"compute_dtype": "bfloat16"}}


def make_on_base(folder: Path, kind: str, device: torch.device, *, dropout: float = 0.0) -> PeftModel:
    """Return a bf16 model, loaded onto `device` as the product does, with variable-length attention and an adapter."""
    zoo.make("llama", dtype=torch.bfloat16).save_pretrained(folder)
    base = load_base(folder, device, dtype=torch.bfloat16, **BASES[kind])
    base.set_attn_implementation(VARLEN_ATTENTION)
    return adapt(base, dropout=dropout)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested dicts, tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (tensor for each in value.values() for tensor in tensors_in(each))
    elif isinstance(value, (tuple, list)):
        yield from (tensor for each in value for tensor in tensors_in(each))


@pytest.mark.parametrize("kernel_dtype", [torch.bfloat16], indirect=True)
@pytest.mark.parametrize("kind", BASES)
def test_every_tensor_of_a_step_is_on_the_device(
    kind: str, kernel_dtype: torch.dtype, tmp_path: Path, device: torch.device, accelerator: Accelerator
):
    model = make_on_base(tmp_path, kind, device)
    assert model.get_base_model().dtype == kernel_dtype
    optimizer = make_optimizer(model, SPEC)
    steps = list(fit(model, make_plan(), spec=SPEC, optimizer=optimizer, accelerator=accelerator, total=1))
    assert len(steps) == 1
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, parameter in model.named_parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            parts = {"absmax": state.absmax, "code": state.code, "offset": state.offset}
            parts |= {f"state2.{key}": getattr(state.state2, key) for key in ("absmax", "code")}
            tensors |= {f"{name}.{key}": value for key, value in parts.items()}
    for number, state in enumerate(optimizer.state.values()):
        tensors |= {f"moment {key} of {number}": value for key, value in state.items()}
    for packing in (True, False):
        for number, tensor in enumerate(
            tensors_in(LossFunction(model).inputs(make_plan(packing=packing).make_batch([0, 1])))
        ):
            tensors[f"input {number}, packing {packing}"] = tensor
    assert {name: str(t.device) for name, t in tensors.items() if t.device != device} == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_adapter_is_the_loaded_one(
    dtype: torch.dtype, tmp_path: Path, device: torch.device, accelerator: Accelerator
):
    model, batch = make_model(device, attention=PACKED_ATTENTION, dtype=dtype), make_plan().make_batch([0, 1, 2])
    before = trained(model)
    train(model, make_plan(), accelerator, total=2)
    assert all(not torch.equal(a, b) for a, b in zip(before, trained(model), strict=True))
    model.eval()
    save_adapter.save_adapter(model, tmp_path, base="org/base", revision=None)
    found = save_adapter.compare_reloaded(model, tmp_path, lambda each: LossFunction(each).logits(batch).float())
    assert found.tensors == 0
    found.check(dtype)


class Interrupted:
    """A model with its optimizer, trained to step 3 of 6, saved there, and trained on."""

    def __init__(self, folder: Path, device: torch.device, accelerator: Accelerator, optimizer: str) -> None:
        self.folder, self.device, self.accelerator, self.optimizer = folder, device, accelerator, optimizer

    def start(self, seed: int) -> tuple[PeftModel, torch.optim.Optimizer]:
        # Rank 64: moments of fewer than 4,096 values would stay in 32 bits.
        model = make_model(self.device, attention=PACKED_ATTENTION, dropout=0.1, rank=64, seed=seed)
        return model, make_optimizer(model, SPEC, name=self.optimizer)

    def steps(self, model: PeftModel, optimizer: torch.optim.Optimizer, start: int) -> Iterator[Step]:
        return fit(
            model, make_plan(), spec=SPEC, optimizer=optimizer, accelerator=self.accelerator, total=6, start=start
        )

    def uninterrupted(self) -> tuple[PeftModel, list[Step]]:
        """Return the model after step 6 and the steps after the checkpoint at step 3."""
        model, optimizer = self.start(seed=0)
        steps = self.steps(model, optimizer, 0)
        list(islice(steps, 3))
        checkpoint.save_checkpoint(
            self.folder,
            model,
            optimizer,
            step=3,
            state={},
            keep=1,
            write_adapter=lambda target: save_adapter.save_adapter(model, target, base="org/base", revision=None),
        )
        return model, list(steps)

    def resumed(self) -> tuple[PeftModel, list[Step]]:
        """Return another model that goes on from the checkpoint, after step 6, and its steps."""
        model, optimizer = self.start(seed=5)
        saved = newest_checkpoint(self.folder)
        assert saved is not None
        checkpoint.load_checkpoint(saved, model, optimizer)
        return model, list(self.steps(model, optimizer, 3))


@pytest.mark.parametrize(
    "optimizer", ["adamw", "adamw-8bit", "paged-adamw-8bit", pytest.param("muon", marks=pytest.mark.slow)]
)
def test_a_resumed_run_is_the_uninterrupted_one(
    optimizer: str, tmp_path: Path, device: torch.device, accelerator: Accelerator
):
    if optimizer.startswith("paged") and device.type == "cpu":
        pytest.skip("paged optimizers need the unified memory of a GPU")
    run = Interrupted(tmp_path, device, accelerator, optimizer)
    (expected, steps), (found, others) = run.uninterrupted(), run.resumed()
    pairs = list(zip(trained(expected), trained(found), strict=True))
    assert [step.number for step in steps] == [step.number for step in others] == [4, 5, 6]
    if device.type == "cpu":
        assert all(torch.equal(a, b) for a, b in pairs)
        assert [(s.loss, s.grad_norm) for s in steps] == [(s.loss, s.grad_norm) for s in others]
        return
    # Sums of a GPU have no fixed order, and Adam divides small gradients by their size.
    assert all(error(b, a) < 1e-3 for a, b in pairs)
    assert [s.loss for s in steps] == pytest.approx([s.loss for s in others], rel=1e-4)


@pytest.mark.parametrize("kernel_dtype", [torch.bfloat16], indirect=True)
@pytest.mark.parametrize("kind", BASES)
def test_a_step_waits_for_the_gpu_once(
    kind: str,
    kernel_dtype: torch.dtype,
    tmp_path: Path,
    gpu: torch.device,
    accelerator: Accelerator,
    monkeypatch: pytest.MonkeyPatch,
):
    """The readback of loss and gradient norm is the one wait; every other one is an error of torch's debug mode."""
    model = make_on_base(tmp_path, kind, gpu, dropout=0.1)
    assert model.get_base_model().dtype == kernel_dtype
    optimizer, waits = make_optimizer(model, SPEC), list[torch.Size]()
    steps = fit(model, make_plan(), spec=SPEC, optimizer=optimizer, accelerator=accelerator, total=4)
    next(steps)  # makes the moments, and loads the kernels
    tolist = Tensor.tolist

    def read_back(tensor: Tensor) -> Any:
        waits.append(tensor.shape)
        torch.cuda.set_sync_debug_mode("default")
        values = tolist(tensor)
        torch.cuda.set_sync_debug_mode("error")
        return values

    monkeypatch.setattr(Tensor, "tolist", read_back)
    torch.cuda.set_sync_debug_mode("error")
    try:
        numbers = [step.number for step in steps]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert numbers == [2, 3, 4]
    assert waits == [torch.Size([2])] * 3


@pytest.mark.parametrize("packing", [True, False])
def test_batches_are_pinned(packing: bool, gpu: torch.device):
    batch = make_plan(packing=packing).largest_batch()
    pairs = list(zip(tensors_in(tuple(pin_batch(batch))), tensors_in(tuple(batch)), strict=True))
    assert pairs
    assert all(found.is_pinned() and torch.equal(found, plain) for found, plain in pairs)
