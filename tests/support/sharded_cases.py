"""Compare sharded bases (FSDP2) with whole ones; run by several processes: `torchrun ... sharded_cases.py FOLDER`.

The first process prints one line of JSON: by case, or by base, the largest relative difference of losses and gradients.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from transformers import AutoConfig, PreTrainedTokenizerBase

from lora_cli.data.batches import BatchPlan
from lora_cli.evaluation.likelihood import measure_row_likelihoods
from lora_cli.model.adapter_context import AdapterContext
from lora_cli.model.attach_adapter import attach
from lora_cli.model.base_model import BaseCheckpoint, LoadedBase
from lora_cli.model.fp32_weights import upcast_trainable_params
from lora_cli.model.loss import LossFunction
from lora_cli.model.model_source import ModelSource
from lora_cli.model.select_attention import choose_attention
from lora_cli.model.sharded_base import load_sharded, sharding_problem
from lora_cli.model.sharding import is_sharded
from lora_cli.recipe.methods import METHOD_FACTS
from lora_cli.recipe.schema import AdapterSpec, QuantizationSpec
from lora_cli.training.distributed import all_reduce_gradients, all_reduce_sum, any_process
from lora_cli.training.loop import IdleBatch
from lora_cli.training.process_group import shard_mesh
from tests.model import zoo

BASES = ("untied", "tied", "mixtral")  # folders; "untied" is that of the cases
REFUSED = -1.0  # in place of a difference: the base cannot be sharded
FAMILIES = "families"  # folder of bases whose logits are compared, in place of the cases
LENGTHS = [30, 41, 12, 25, 60, 7, 33, 9, 18]
# A head is applied to 256 labels at a time on the CPU: here not as often in each process. One row has no label.
MANY_LABELS = [1, 400, 30, 20, 10]
UNEVEN = [100, 60, 60]  # in batches of 100 tokens: one more for one of two processes, none for one of four


def cases() -> dict[str, dict[str, Any]]:
    """Return the cases: keys of the adapter section, and of this file.

    `bits`, `whole`, `cpu_offload` and `machines` are of the base, `every` says which layers are recomputed, `packing`
    and `lengths` are of the rows; with `broken`, batches that do not count have no finite loss.
    """
    shardable = [name for name, facts in METHOD_FACTS.items() if facts.shardable]
    by_method: dict[str, dict[str, Any]] = {
        f"method {name}": {"method": name, "packing": METHOD_FACTS[name].supports_packing} for name in shardable
    }
    for name in ("prompt", "p-tuning"):  # PEFT looks up the embeddings of the tokens itself
        by_method[f"method {name}"]["whole"] = ("model.embed_tokens",)
    by_method |= {
        f"4 bits, {name}": {"method": name, "bits": 4}
        for name in shardable
        if 4 in METHOD_FACTS[name].bits and METHOD_FACTS[name].lora_config
    }
    return by_method | {
        "every 2nd layer recomputed": {"every": 2},
        "4 bits, every layer recomputed": {"every": 1, "bits": 4},
        "padded batches": {"packing": False},
        "a different number of chunks of labels": {"lengths": MANY_LABELS},
        "head trained in full": {"modules_to_save": ["lm_head"], "whole": ("lm_head",)},
        "norms trained in full": {
            "modules_to_save": ["input_layernorm"],
            "whole": tuple(f"model.layers.{layer}.input_layernorm" for layer in range(2)),
        },
        "adapter on the head": {"target_modules": ["q_proj", "lm_head"], "whole": ("lm_head",)},
        "adapter on the embeddings": {"target_modules": ["q_proj", "embed_tokens"], "whole": ("model.embed_tokens",)},
        "batches that do not count are not finite": {"broken": True, "lengths": UNEVEN},
        "machines of half the processes": {"machines": 2},
        "machines of half the processes, 4 bits, dora, offloaded": {
            "machines": 2,
            "bits": 4,
            "method": "dora",
            "cpu_offload": True,
        },
        "offloaded": {"cpu_offload": True},
        "offloaded, dora": {"cpu_offload": True, "method": "dora"},
        "offloaded, pissa": {"cpu_offload": True, "method": "pissa"},
        "offloaded, 4 bits, every layer recomputed": {"cpu_offload": True, "bits": 4, "every": 1},
        "offloaded, padded batches": {"cpu_offload": True, "packing": False},
        "offloaded, head trained in full": {
            "cpu_offload": True,
            "modules_to_save": ["lm_head"],
            "whole": ("lm_head",),
        },
    }


OFFLOADED = " offloaded"  # after the name of a base


class Cases:
    """The processes, and the folders of the bases."""

    def __init__(self, folder: Path) -> None:
        self.accelerator = Accelerator(cpu=True)
        self.folder = folder

    def plan(self, *, packing: bool, processes: int, lengths: Sequence[int] = LENGTHS) -> BatchPlan:
        """Return a plan whose only step has fewer batches than 4 processes."""
        size = max(100, *lengths) if packing else 3
        return BatchPlan(
            zoo.rows_of(lengths), packing=packing, size=size, batches_per_step=3, seed=0, processes=processes
        )

    def base(self, name: str) -> BaseCheckpoint:
        path = str(self.folder / name)
        tokenizer: Any = PreTrainedTokenizerBase()
        source = ModelSource(path, trust_remote_code=False)
        return BaseCheckpoint(path, source, AutoConfig.from_pretrained(path), tokenizer, "causal-lm")

    def mesh(self, *, machines: int = 1) -> DeviceMesh:
        """Return the processes that share a base, of all or of one of so many machines."""
        size = self.accelerator.num_processes // machines
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LOCAL_WORLD_SIZE", str(size))
            patch.setenv("LOCAL_RANK", str(self.accelerator.process_index % size))
            mesh = shard_mesh(self.accelerator.device, of_machine=machines > 1)
        assert mesh.size() == size
        return mesh

    def gradients(self, loaded: LoadedBase, spec: dict[str, Any]) -> dict[str, Tensor]:
        """Return the losses of the step and of rows, and the gradients, of all processes if the base is sharded."""
        spec = dict(spec)
        every, packing, lengths = spec.pop("every", None), spec.pop("packing", True), spec.pop("lengths", LENGTHS)
        broken = spec.pop("broken", False)
        base = loaded.model
        sharded = is_sharded(base)
        processes = self.accelerator.num_processes if sharded else 1
        plan = self.plan(packing=packing, processes=processes, lengths=lengths)
        choose_attention(base, "auto", packing=packing, causal=True)
        adapter = AdapterSpec.model_validate({"rank": 4, "alpha": 8, "dropout": 0.0, **spec})
        context = AdapterContext(total_steps=10, plan=plan)
        model = attach(base, adapter, seed=1, context=context)
        upcast_trainable_params(model)
        if every is not None:
            base.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
            base.enable_input_require_grads()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for number, parameter in enumerate(trained.values()):
            generator = torch.Generator().manual_seed(number)
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        model.train()
        loss_fn = LossFunction(model)
        losses = [torch.zeros(())]
        batches = [b for _, b in plan.batches_of_step(0, rank=self.accelerator.process_index if sharded else 0)]
        batches = [batch for batch in batches if len(batch.targets)]
        if sharded:
            idle = IdleBatch(plan, self.accelerator, list(trained.values()))
            passes = idle.count(batches)
            assert any_process(self.accelerator, passes > 0) or not broken
            with not_finite(base) if broken else nullcontext():
                idle.run(loss_fn, passes)
        for batch in batches:
            torch.manual_seed(0)
            loss = loss_fn(batch).loss
            loss.backward()
            losses.append(loss.detach())
        total = torch.stack(losses).sum()
        if sharded:
            all_reduce_gradients(list(trained.values()), self.accelerator, share=1)
            total = all_reduce_sum(self.accelerator, total)
        rows = measure_row_likelihoods(loss_fn, plan, accelerator=self.accelerator if sharded else None)
        return {"loss": total, "rows": torch.from_numpy(rows.loss)} | {
            name: p.grad for name, p in trained.items() if p.grad is not None
        }

    def difference(self, base: str, spec: dict[str, Any]) -> float:
        """Return the largest relative difference between the sharded and the whole base."""
        spec = dict(spec)
        bits, whole, offload = spec.pop("bits", None), spec.pop("whole", ()), spec.pop("cpu_offload", False)
        mesh = self.mesh(machines=spec.pop("machines", 1))
        section = {"bits": bits, "compute_dtype": "float32"}
        quantization = None if bits is None else QuantizationSpec.model_validate(section)
        checkpoint, cpu = self.base(base), torch.device("cpu")
        sharded = load_sharded(checkpoint, cpu, mesh, quantization=quantization, whole=whole, cpu_offload=offload)
        assert offload == any(
            isinstance(group.offload_policy, CPUOffloadPolicy) for group in parameter_groups(sharded.model)
        )
        found = self.gradients(sharded, spec)
        if not self.accelerator.is_main_process:
            return 0.0
        expected = self.gradients(checkpoint.load(cpu, quantization=quantization), spec)
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)

    @torch.no_grad()
    def difference_of_logits(self, family: str) -> float:
        """Return the largest difference of the logits of a sharded and a whole base, relative to the largest logit."""
        checkpoint, cpu, ids = self.base(f"{FAMILIES}/{family}"), torch.device("cpu"), torch.arange(5, 13)[None]
        if sharding_problem(checkpoint, None):
            return REFUSED
        half = checkpoint._replace(dtype=torch.bfloat16)
        mesh = self.mesh()
        halves = (load_sharded(half, cpu, mesh).model, half.load(cpu).model)
        assert dtypes_of(halves[0]) == dtypes_of(halves[1]), family
        models = (load_sharded(checkpoint, cpu, mesh).model, checkpoint.load(cpu).model)
        found, expected = (model.eval()(input_ids=ids, use_cache=False).logits for model in models)
        return float((found - expected).abs().max() / expected.abs().max())


def parameter_groups(model: torch.nn.Module) -> list[Any]:
    """Return what torch keeps of each module whose weights are sharded."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [unit._get_fsdp_state()._fsdp_param_group for unit in units]
    return [group for group in groups if group is not None]


@contextmanager
def not_finite(model: Any) -> Iterator[None]:
    """Within the block, the embeddings of all tokens are infinite."""
    handle = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output * math.inf)
    try:
        yield
    finally:
        handle.remove()


def dtypes_of(model: torch.nn.Module) -> dict[str, torch.dtype]:
    """Return the dtypes of the weights by name: some stay in fp32."""
    return {name: weight.dtype for name, weight in model.state_dict().items()}


def main() -> None:
    """Run the cases, or those whose names are given."""
    torch.set_num_threads(1)
    folder, *names = sys.argv[1:]
    run = Cases(Path(folder))
    found = {}
    for path in sorted((run.folder / FAMILIES).iterdir()) if names == [FAMILIES] else ():
        found[path.name] = run.difference_of_logits(path.name)
    for name, spec in cases().items():
        if not names or name in names:
            found[name] = run.difference("untied", spec)
    for base in BASES[1:]:
        if not names or base in names:
            found[base] = run.difference(base, {})
    for base in BASES[1:]:
        if not names or base + OFFLOADED in names:
            found[base + OFFLOADED] = run.difference(base, {"cpu_offload": True})
    if run.accelerator.is_main_process:
        print(json.dumps(found))
    run.accelerator.end_training()
    # A thread of gloo may still free tensors, and be stopped in C++ code when Python ends, which aborts the process.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
