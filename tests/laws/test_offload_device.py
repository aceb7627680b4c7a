"""With cpu_offload on a device that is not the CPU, the layers alone are on the CPU, and only until they are gathered.

The meta device plays the part of the GPU, and torch's fake process group that of NCCL. What this cannot show is whether
values arrive (`test_sharding.py` compares them, from the CPU to the CPU), and that page-locked memory is allocated.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from lora_cli.data.batches import BatchPlan
from lora_cli.evaluation.likelihood import measure_likelihood
from lora_cli.model import sharded_base, sharding, varlen_attention
from lora_cli.model.adapter_context import AdapterContext
from lora_cli.model.attach_adapter import attach
from lora_cli.model.base_model import BaseCheckpoint
from lora_cli.model.fp32_weights import upcast_trainable_params
from lora_cli.model.loss import LossFunction
from lora_cli.model.model_source import ModelSource
from lora_cli.model.save_adapter import save_adapter
from lora_cli.recipe.schema import AdapterSpec, QuantizationSpec
from lora_cli.recipe.training_section import TrainingSpec
from lora_cli.training import optimizer as optimizers
from lora_cli.training.checkpoint import load_checkpoint, save_checkpoint
from lora_cli.training.checkpoint_folders import newest_checkpoint
from lora_cli.training.loop import fit
from tests.laws.test_meta_device import mixing_kernel
from tests.model import zoo
from tests.support.meta_device import META, GpuPart
from tests.support.meta_group import meta_group

# One of two processes, which exchanges nothing with the other one.
ACCELERATOR: Any = SimpleNamespace(
    num_processes=1, process_index=0, device=META, reduce=lambda value, reduction: value, is_main_process=True
)
OWN_POLICY = sharded_base.offload_policy
SIZE = {"hidden_size": 128, "intermediate_size": 256, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseCheckpoint:
    folder = tmp_path_factory.mktemp("base")
    zoo.make("llama", dtype=torch.bfloat16, **SIZE).save_pretrained(folder)
    tokenizer: Any = PreTrainedTokenizerBase()
    source = ModelSource(str(folder), trust_remote_code=False)
    return BaseCheckpoint(str(folder), source, AutoConfig.from_pretrained(folder), tokenizer, "causal-lm")


@pytest.fixture(autouse=True)
def of_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(varlen_attention, "varlen_attn", mixing_kernel)
    own = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, fused, **options: own(groups, foreach=True, **options))
    monkeypatch.setattr(sharded_base, "offload_policy", lambda _: OWN_POLICY("cuda"))
    with meta_group(size=2):
        yield


def plan_of(rows: int = 6) -> BatchPlan:
    return BatchPlan(zoo.rows_of([12] * rows), packing=True, size=24, batches_per_step=1, seed=0)


def make(
    base: BaseCheckpoint, *, bits: int | None = None, whole: Any = (), every: int | None = None, **spec: Any
) -> Any:
    """Return an adapted model whose base is sharded, and whose layers wait on the CPU."""
    quantization = None if bits is None else QuantizationSpec.model_validate({"bits": bits})
    half = base._replace(dtype=torch.bfloat16)
    mesh = init_device_mesh("meta", (2,))
    loaded = sharded_base.load_sharded(half, META, mesh, quantization=quantization, whole=whole, cpu_offload=True).model
    adapter = AdapterSpec.model_validate({"rank": 4, "alpha": 8, "dropout": 0.0, **spec})
    model = attach(loaded, adapter, seed=1, context=AdapterContext(total_steps=10, plan=plan_of()))
    upcast_trainable_params(model)
    loaded.set_attn_implementation(varlen_attention.VARLEN_ATTENTION)
    if every is not None:
        loaded.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
        loaded.enable_input_require_grads()
    return model


def test_the_layers_alone_are_on_the_cpu(base: BaseCheckpoint):
    with GpuPart():
        model = make(base)
    on_cpu = {name for name, p in model.named_parameters() if p.device.type == "cpu"}
    layers = {name for name, p in model.named_parameters() if ".layers." in name and isinstance(p, DTensor)}
    assert on_cpu == layers != set()
    assert all(buffer.is_meta for buffer in model.buffers())
    assert sharding.is_offloaded(model)
    assert model.get_base_model().device == META == model.get_base_model().get_input_embeddings().weight.device


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "dora"},
        {"method": "pissa"},
        {"method": "prompt", "whole": ("model.embed_tokens",)},
        {"bits": 4},
        {"bits": 4, "every": 1},
        {"modules_to_save": ["lm_head"], "whole": ("lm_head",)},
        {"target_modules": ["q_proj", "embed_tokens"], "whole": ("model.embed_tokens",)},
    ],
    ids=str,
)
def test_steps_and_evaluations_find_everything_on_the_device(options: dict[str, Any], base: BaseCheckpoint):
    """An operation on tensors of both devices would raise, and so would the fake GPUs' gathering on the CPU."""
    with GpuPart() as part:
        model = make(base, **options)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.is_meta for p in trained)
        spec = TrainingSpec(warmup=0, schedule="constant")
        optimizer = optimizers.make_optimizer(model, spec)
        taken = fit(model, plan_of(), spec=spec, optimizer=optimizer, accelerator=ACCELERATOR, total=3)
        next(taken)
        part.clear()
        assert [step.number for step in taken] == [2, 3]
        assert sum(part.waits.values()) == 2, part.waits  # one a step
        assert not part.slow_copies, part.slow_copies
        assert all(value.is_meta for state in optimizer.state.values() for value in state.values() if value.ndim)
        measure_likelihood(LossFunction(model), plan_of())
    assert sharding.is_offloaded(model)


def test_a_checkpoint_is_saved_and_loaded(base: BaseCheckpoint, tmp_path: Path):
    spec = TrainingSpec()
    with GpuPart():
        model, other = make(base), make(base)
        optimizer, other_optimizer = (optimizers.make_optimizer(each, spec) for each in (model, other))
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()

        def write(folder: Path) -> None:
            save_adapter(model, folder, base="org/base", revision=None)

        save_checkpoint(tmp_path, model, optimizer, step=1, state={}, keep=1, write_adapter=write)
        saved = newest_checkpoint(tmp_path)
        assert saved
        load_checkpoint(saved, other, other_optimizer)
        other_optimizer.step()
        assert all(p.is_meta for p in other.parameters() if p.requires_grad)


def test_layers_wait_in_page_locked_memory_of_a_gpu_only(base: BaseCheckpoint, monkeypatch: pytest.MonkeyPatch):
    policies_of_devices = [OWN_POLICY(device) for device in ("cuda", "cpu")]
    assert policies_of_devices == [CPUOffloadPolicy(pin_memory=pinned) for pinned in (True, False)]
    policies = []
    own = sharded_base.fully_shard

    def record(module: Any, **options: Any) -> Any:
        policies.append(options.get("offload_policy"))
        return own(module, **options)

    monkeypatch.setattr(sharded_base, "fully_shard", record)
    with GpuPart():
        make(base)
    assert policies.count(CPUOffloadPolicy(pin_memory=True)) == base.config.num_hidden_layers
    assert policies.count(None) == 2  # embeddings and head stay on the device


@pytest.mark.parametrize("slow", [False, True])
def test_copies_of_layers_are_not_waited_for(slow: bool, base: BaseCheckpoint, monkeypatch: pytest.MonkeyPatch):
    """Where torch did not ask for a copy without a wait, each weight of each layer would be counted."""
    own = torch.Tensor.to

    def wait(tensor: Any, *args: Any, non_blocking: bool = False, **options: Any) -> Any:
        return own(tensor, *args, **options)

    with GpuPart() as part:
        loss_fn = LossFunction(make(base))
        part.clear()
        if slow:
            monkeypatch.setattr(torch.Tensor, "to", wait)
        measure_likelihood(loss_fn, plan_of())
    assert bool(part.slow_copies) is slow


def test_the_fake_gpus_gather_nothing_on_the_cpu(base: BaseCheckpoint, monkeypatch: pytest.MonkeyPatch):
    """The tests above can fail: without the copy to the device, DoRA's magnitudes would be gathered on the CPU."""
    monkeypatch.setattr(sharding, "_device", lambda _: torch.device("cpu"))
    with GpuPart(), pytest.raises(RuntimeError, match="tensors on two devices"):
        LossFunction(make(base, method="dora"))
