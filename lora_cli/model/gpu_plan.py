"""What training takes on each of several GPUs, planned without them, for each way to spread a model over GPUs.

- ddp: each GPU has the whole model and its own batches; the gradients of the adapter are summed in one message.
- fsdp: the base is spread over the GPUs in parts of 1/N (FSDP2's `fully_shard`, see `sharded_base.py`), of whole rows
  of each weight: of stacked experts, one expert at least. A layer is whole while it runs, and the next one is fetched
  meanwhile, so that two are whole at a time; embeddings and head are whole for most of a step. Adapter, gradients,
  optimizer and the scales of quantized weights are whole on each GPU.
- hsdp: the same, but the base is spread over the GPUs of each machine.

With `cpu_offload`, the parts of the layers are in host memory, and a GPU has its part of the layer that is fetched.

The bytes of the parts that a GPU needs besides tensors are assumptions, which no GPU was measured for.
"""

from bisect import bisect_right
from functools import partial
from typing import NamedTuple

from lora_cli.model.memory import FP32, PROCESS_BYTES, TrainingMemory
from lora_cli.model.weight_memory import StoredWeights

CONTEXT_BYTES = 512 << 20  # CUDA context with its kernels, and the workspace of cuBLAS
NCCL_BYTES = 256 << 20  # 32 channels with 2 buffers of 4 MiB (NCCL_BUFFSIZE)
WHOLE_LAYERS = 2  # of fsdp: the one that runs, and the one that is fetched
MAX_TOKENS = 1 << 24  # of a batch, for the search of the largest


class GpuParts(NamedTuple):
    """Bytes on each GPU that do not depend on the batch."""

    weights: int  # of the base, as stored
    constants: int  # scales of quantized weights
    adapter: int  # fp32
    gradients: int  # fp32
    optimizer: int  # state
    paged: int  # state that waits in host memory where the GPU is full, and is not in the total
    in_host: int  # fsdp with cpu_offload: its part of the layers, which is in host memory, and is not in the total
    gathered: int  # fsdp: the layers that are whole for a while
    exchanged: int  # the gradients in one message, and its sum, after the activations are freed
    context: int  # of CUDA and NCCL

    def total(self, step: int) -> int:
        """Return the bytes at the peak of a step, whose own tensors take `step` bytes."""
        elsewhere = self.paged + self.in_host
        return sum(self) - elsewhere - self.exchanged + max(step, self.exchanged)


def ddp_parts(memory: TrainingMemory, gpus: int) -> GpuParts:
    """Return the bytes on each of `gpus` GPUs with the whole model; also for one GPU."""
    weights, several = memory.weights.whole, gpus > 1
    gradients = FP32 * memory.trained.total
    return GpuParts(
        weights=weights.stored,
        constants=weights.constants,
        adapter=FP32 * memory.adapter.total,
        gradients=gradients,
        optimizer=0 if memory.paged else memory.optimizer,
        paged=memory.optimizer if memory.paged else 0,
        in_host=0,
        gathered=0,
        exchanged=2 * gradients if several else 0,
        context=CONTEXT_BYTES + (NCCL_BYTES if several else 0),
    )


def fsdp_parts(memory: TrainingMemory, gpus: int, *, cpu_offload: bool = False) -> GpuParts:
    """Return the bytes on each of `gpus` GPUs with a base that is spread over them, or over the host memory of them."""
    outside = memory.weights.outside.stored
    own = [sum(tensor.part(gpus) for tensor in layer) for layer in memory.weights.tensors]
    largest = max(own, default=0)
    # Parts that are filled up are gathered as they are.
    of_all = ddp_parts(memory, gpus)._replace(gathered=WHOLE_LAYERS * gpus * largest)
    if cpu_offload:
        in_host = offloaded_bytes(memory.weights, gpus)
        return of_all._replace(weights=outside, in_host=in_host, gathered=of_all.gathered + largest)
    return of_all._replace(weights=sum(own) + outside)


def offloaded_bytes(weights: StoredWeights, gpus: int) -> int:
    """Return the bytes of host memory of each of `gpus` processes whose layers wait there.

    torch allocates page-locked memory in powers of two (ATen/core/CachingHostAllocator.h), for each part of a weight.
    """
    return sum(1 << (tensor.part(gpus) - 1).bit_length() for layer in weights.tensors for tensor in layer)


class Form(NamedTuple):
    """A form of running a batch, of the memory ladder."""

    name: str
    every: int | None  # of how many layers one is recomputed; None: none is
    offload: bool  # the inputs of recomputed layers wait in host memory
    tokens: int  # that run at a time: of a batch, or of a part of it


class FormPlan(NamedTuple):
    """What a form takes on each GPU."""

    form: Form
    total: int  # bytes
    fits: bool
    largest: int  # tokens of the largest batch that fits, run at a time; 0 if none does


class StrategyPlan(NamedTuple):
    """A way to spread a model over GPUs, and what it takes."""

    name: str
    parts: GpuParts
    forms: list[FormPlan]  # the fastest first

    @property
    def best(self) -> FormPlan | None:
        """Return the fastest form that fits; None if none does."""
        return next((form for form in self.forms if form.fits), None)

    @property
    def largest(self) -> int:
        """Return the most tokens that any form can run at a time; 0 if none can."""
        return max(form.largest for form in self.forms)


class Sharding(NamedTuple):
    """How a base is sharded, where it is."""

    cpu_offload: bool = False  # whether the layers wait in host memory
    of_machine: int | None = None  # hsdp: GPUs of a machine, over which it is sharded; None: fsdp, over all


FSDP = Sharding()


def plan_strategies(
    memory: TrainingMemory, forms: list[Form], *, gpus: int, budget: int, sharding: Sharding = FSDP
) -> list[StrategyPlan]:
    """Plan each way to spread a model over `gpus` GPUs of `budget` bytes each; on one GPU there is one way.

    Args:
        memory: of the model in training.
        forms: of running a batch, the fastest first.
        gpus: processes, one on each GPU.
        budget: bytes of memory of each GPU.
        sharding: of the strategy that shards the base.
    """
    parts = {"ddp": ddp_parts(memory, gpus)}
    if gpus > 1:
        name, shards = ("fsdp", gpus) if sharding.of_machine is None else ("hsdp", min(gpus, sharding.of_machine))
        parts[name] = fsdp_parts(memory, shards, cpu_offload=sharding.cpu_offload)
    return [_plan_strategy(name, each, memory, forms, budget=budget) for name, each in parts.items()]


def _plan_strategy(
    name: str, parts: GpuParts, memory: TrainingMemory, forms: list[Form], *, budget: int
) -> StrategyPlan:

    def total(form: Form, tokens: int) -> int:
        return parts.total(step_bytes(memory, form, tokens))

    plans = []
    for form in forms:
        taken = total(form, form.tokens)
        largest = bisect_right(range(MAX_TOKENS), budget, lo=1, key=partial(total, form)) - 1
        plans.append(FormPlan(form, taken, taken <= budget, largest))
    return StrategyPlan(name, parts, plans)


def step_bytes(memory: TrainingMemory, form: Form, tokens: int) -> int:
    """Return the bytes of the tensors of one step, of a batch of `tokens`, without weights, gradients and optimizer."""
    plan = memory.plan(tokens, every=form.every, offload=form.offload)
    return plan.activations + plan.temporary + plan.logits


def full_model_bytes(memory: TrainingMemory, form: Form, *, processes: int) -> int:
    """Return the bytes of a full model and a step in `form` in each of `processes`, without what CUDA takes."""
    parts = ddp_parts(memory, processes)
    of_process = PROCESS_BYTES if memory.on_cpu else 0
    return parts.total(step_bytes(memory, form, form.tokens)) - parts.context + of_process


def fewest_gpus(
    memory: TrainingMemory, form: Form, *, budget: int, most: int = 1024, cpu_offload: bool = False
) -> int | None:
    """Return the smallest power of two of GPUs that `form` fits on with fsdp; None if `most` are too few."""
    counts = (2**power for power in range(1, most.bit_length()))
    step = step_bytes(memory, form, form.tokens)
    parts = ((gpus, fsdp_parts(memory, gpus, cpu_offload=cpu_offload)) for gpus in counts)
    return next((gpus for gpus, each in parts if each.total(step) <= budget), None)
