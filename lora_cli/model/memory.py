"""Estimate the peak memory of a training step, part by part, from the model's shapes alone.

Weights and adapter are exact (`weight_memory.py`); activations are those of a forward pass without weights
(`measure_activations.py`).
"""

from typing import NamedTuple

import psutil
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_cli.model.activation_memory import ActivationBytes, TrainingSetup
from lora_cli.model.head_loss import chunk_tokens
from lora_cli.model.measure_activations import activation_bytes
from lora_cli.model.weight_memory import StoredWeights, text_layers

FP32 = 4  # bytes
PROCESS_BYTES = 700 << 20  # resident memory of Python, torch and transformers (measured on Linux)
LOGITS_COPIES = 3  # of a chunk of logits, fp32: see model/head_loss.py


class MemoryPlan(NamedTuple):
    """Bytes of each part at the peak of a training step on one device."""

    weights: int  # as stored
    constants: int  # of quantized weights: their scales
    adapter: int  # weights, fp32
    gradients: int  # fp32
    optimizer: int  # its state
    activations: int  # saved for the backward pass
    temporary: int  # that exist only while one layer runs backward
    logits: int
    process: int  # Python and its libraries; 0 on a GPU

    @property
    def total(self) -> int:
        """Return the sum of all parts, in bytes."""
        return sum(self)

    @property
    def loaded(self) -> int:
        """Return the bytes that are in memory as soon as the base is loaded."""
        return self.weights + self.constants + self.process


class AdapterValues(NamedTuple):
    """Numbers of values, by place."""

    layers: int  # in decoder layers
    outside: int

    @property
    def total(self) -> int:
        """Return the sum."""
        return self.layers + self.outside


class TrainingMemory(NamedTuple):
    """What a model takes in training, in parts that a plan for a number of tokens is made of."""

    weights: StoredWeights
    adapter: AdapterValues  # all, frozen ones included
    trained: AdapterValues
    optimizer: int  # bytes of its state
    activations: ActivationBytes
    dense: int  # bytes of one quantized layer's weights in the compute dtype, which it is multiplied in
    vocabulary: int
    on_cpu: bool
    paged: bool = False  # whether the state of the optimizer can move to the host when the GPU is full

    def plan(self, tokens: int, *, every: int | None = None, offload: bool = False) -> MemoryPlan:
        """Return the bytes of each part for a batch of `tokens`, in a form of the memory ladder.

        Args:
            tokens: in one batch, padding included.
            every: of how many layers one is recomputed; None: none is.
            offload: whether the inputs of recomputed layers wait in host memory.
        """
        weights = self.weights.whole
        chunk = min(tokens, chunk_tokens(self.vocabulary, torch.device("cpu" if self.on_cpu else "cuda")))
        return MemoryPlan(
            weights=weights.plain + weights.codes,
            constants=weights.constants,
            adapter=FP32 * self.adapter.total,
            gradients=FP32 * self.trained.total,
            optimizer=self.optimizer,
            activations=self.activations.saved(tokens, every=every, offload=offload),
            temporary=self.activations.temporary_at(tokens) + self.dense,
            logits=self.vocabulary * chunk * LOGITS_COPIES * FP32 if self.activations.chunked else 0,
            process=PROCESS_BYTES if self.on_cpu else 0,
        )


def training_memory(
    model: PeftModel, setup: TrainingSetup, *, weights: StoredWeights, optimizer_bytes: int, paged: bool = False
) -> TrainingMemory:
    """Count what `model` takes in training.

    Args:
        model: with the adapter, on the meta device.
        setup: of the run.
        weights: of the base.
        optimizer_bytes: state of the optimizer.
        paged: whether it can move to the host.
    """
    inside = {id(p) for layer in text_layers(model.get_base_model()).values() for p in layer.parameters()}
    added = {
        id(p)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for name, p in module.named_parameters()
        if "base_layer." not in f".{name}"
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad and id(p) in added]

    def values(parameters: list[nn.Parameter]) -> AdapterValues:
        total, layers = (
            sum(p.numel() for p in each) for each in (parameters, [p for p in parameters if id(p) in inside])
        )
        return AdapterValues(layers, total - layers)

    return TrainingMemory(
        weights=weights,
        adapter=values([*trained, *frozen]),
        trained=values(trained),
        optimizer=optimizer_bytes,
        activations=activation_bytes(model, setup),
        dense=setup.dtype.itemsize * weights.largest,
        vocabulary=model.get_base_model().get_input_embeddings().weight.shape[0],
        on_cpu=setup.on_cpu,
        paged=paged,
    )


def available_memory(device: torch.device) -> int:
    """Return the bytes that are free on `device` now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def free_for_process(device: torch.device, processes: int) -> int:
    """Return the bytes that each of `processes` of this machine may take: all see the same free host memory."""
    return available_memory(device) // (processes if device.type == "cpu" else 1)


def fits_in_memory(parameters: int) -> bool:
    """Return whether two models of `parameters` parameters each fit into memory in fp32, with room for computing."""
    return 2 * 4 * parameters * 1.2 + PROCESS_BYTES < available_memory(torch.device("cpu"))
