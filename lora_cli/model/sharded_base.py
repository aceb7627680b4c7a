"""A frozen base whose weights are sharded over the processes of a run (FSDP2, torch's `fully_shard`).

Each process reads its rows of each weight from the checkpoint. A weight that is quantized is read and quantized by all,
one at a time, and each keeps its part of the codes. Each decoder layer is gathered before it computes and freed after,
in the forward and in the backward pass. Adapters, and what they train in full, stay whole on each process: they are
small, and so gradients, optimizer, checkpoints and the saved adapter are those of any run.
"""

import re
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from itertools import takewhile
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_cli.errors import LoraError
from lora_cli.model import fake_quantize, finite
from lora_cli.model.base_model import BaseCheckpoint, LoadedBase, check_unused_weights
from lora_cli.model.checkpoint_reader import CheckpointReader
from lora_cli.model.conversion import CheckpointMapping
from lora_cli.model.device import resolve_compute_dtype
from lora_cli.model.empty_base import tied_parameters
from lora_cli.model.experts import expert_weights
from lora_cli.model.model_source import local_folder
from lora_cli.model.multimodal import is_inside, outside_text
from lora_cli.model.quantize import BLOCK_SIZE, check_cpu_4bit, prepare_for_kbit_training
from lora_cli.model.safetensors_io import ShardFiles, list_tensors
from lora_cli.model.streamed_weights import Slot, find_slots
from lora_cli.model.weight_memory import text_layers
from lora_cli.recipe.schema import QuantizationSpec


def load_sharded(
    base: BaseCheckpoint,
    device: torch.device,
    mesh: DeviceMesh,
    *,
    attention: str | None = None,
    quantization: QuantizationSpec | None = None,
    whole: Sequence[str] = (),
    cpu_offload: bool = False,
) -> LoadedBase:
    """Load the frozen base of a language model, sharded over the processes of `mesh`, which must all call it.

    Args:
        base: a checkpoint in safetensors, not quantized.
        device: of this process.
        mesh: of one dimension; there may be others, which have the same base.
        attention: attention implementation, by transformers' name; None for its default.
        quantization: 4 bits, or None.
        whole: modules whose weights are not sharded, because they are trained; by full name.
        cpu_offload: whether the decoder layers wait in host memory, page-locked for a GPU, until they are gathered.

    Raises:
        LoraError: the checkpoint lacks weights or has others, a weight is not finite, or a module of `whole` would be
            quantized.
    """
    base.check_files()
    folder = local_folder(base.source, fetch=True)
    model = base.skeleton(buffers=base.dtype)
    if attention is not None:
        model.set_attn_implementation(attention)
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    _keep_in_fp32(model, base.dtype)
    quantized = set() if quantization is None else _quantize_skeleton(model, base, quantization, whole=whole)
    tied = tied_parameters(model)
    slots = find_slots(model)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    _shard(model, mesh, whole=whole, cpu_offload=cpu_offload)
    in_host = set(text_layers(model)) if cpu_offload else set()
    tensors = list_tensors(folder)
    with ShardFiles(writable=False) as files:
        mapping = CheckpointMapping(base.skeleton(), tensors)
        reader = CheckpointReader(tensors, mapping, files, tied=tied, shapes={}, transforms={})
        notes = _check_tensors(model, slots, reader, quantized)
        names = {name: group[0] for group in tied for name in group}
        filled: dict[str, Tensor] = {}  # tied parameters are one
        for name, slot in slots.items():
            first = names.get(name, name)
            if first not in filled:
                spec = quantization if name in quantized else None
                value = _read(name, slot, reader, base, device, mesh, spec=spec)
                filled[first] = _to_host(value) if is_inside(name, in_host) else value
            setattr(slot.module, slot.key, filled[first])
    if quantization is not None:
        check_cpu_4bit(model, device)
    return LoadedBase(model.requires_grad_(False), (), tuple(notes))


def sharding_problem(base: BaseCheckpoint, quantization: QuantizationSpec | None) -> str:
    """Return what keeps a base of a language model from being sharded; empty if nothing does. It reads no weights."""
    model = base.skeleton()
    kind, layers = model.config.model_type, text_layers(model)
    if not layers:
        return f"the decoder layers of {kind} models are not known"
    if quantization is not None and expert_weights(model):
        return "the 4-bit weights of experts cannot be sharded"
    if quantization is not None and any(isinstance(module, Conv1D) for module in model.modules()):
        return f"the 4-bit weights of {kind} models cannot be sharded"
    if _root(model, list(layers)) is None:
        return f"{kind} models look up their embeddings outside of the decoder"
    return ""


def _keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the parameters and buffers that transformers keeps in fp32 this dtype; the values come later."""
    patterns = [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(dtype)]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and any(pattern.search(name) for pattern in patterns):
            tensor.data = tensor.data.float()


def _check_tensors(
    model: PreTrainedModel, slots: Mapping[str, Slot], reader: CheckpointReader, quantized: Set[str]
) -> list[str]:
    """Compare names and shapes of the checkpoint's tensors with the model; return a note on those it does not use.

    Raises:
        LoraError: the checkpoint lacks weights, has layers that the model lacks, or weights of another shape.
    """
    if missing := [name for name in slots if not reader.has(name)]:
        raise LoraError(
            f"model.path: the checkpoint has no weights for {', '.join(missing[:3])}",
            hint=f"not a complete {type(model).__name__} checkpoint: give another model",
        )
    for name, slot in slots.items():
        stored = reader.stored(name)
        if stored is not None and name not in quantized and tuple(stored.shape) != tuple(slot.value.shape):
            raise LoraError(
                f"model.path: {name} has the shape {list(stored.shape)} in the checkpoint, and "
                f"{list(slot.value.shape)} by its config.json",
                hint="restore config.json from its origin, or give another model",
            )
    used = {key for name in slots for key in reader.keys_of(name)}
    return check_unused_weights(model, reader.tensors.keys() - used)


def _quantize_skeleton(
    model: PreTrainedModel, base: BaseCheckpoint, spec: QuantizationSpec, *, whole: Sequence[str]
) -> set[str]:
    """Put 4-bit layers, on the meta device, in place of those that are quantized; return the names of their weights.

    Raises:
        LoraError: a module of `whole` is one of them, or has one.
    """
    names = set(fake_quantize.quantized_weights(base.skeleton(), spec))
    for name in names:
        path = name.removesuffix(".weight")
        if trained := [module for module in whole if is_inside(path, (module,))]:
            raise LoraError(
                f"adapter.modules_to_save: {trained[0]} is quantized, and quantized weights cannot be trained",
                hint="adapt it in target_modules instead",
            )
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear), "sharding_problem"
        packed = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=resolve_compute_dtype(spec, base.dtype),
            compress_statistics=spec.double_quant,
            quant_type=spec.type,
            device="meta",
        )
        codes = torch.empty((layer.weight.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
        packed.weight = nn.Parameter(codes, requires_grad=False)
        packed.bias = layer.bias
        model.set_submodule(path, packed)
    model.is_loaded_in_4bit = True  # PEFT asks for it
    prepare_for_kbit_training(model, base.dtype)
    return names


def _shard(model: PreTrainedModel, mesh: DeviceMesh, *, whole: Sequence[str], cpu_offload: bool) -> None:
    """Shard decoder layers, towers, embeddings and head; a head that is the embeddings, and `whole`, stay whole.

    With `cpu_offload`, decoder layers wait in host memory. Embeddings and head do not: they are whole on each GPU for
    most of a step anyway, and a model is on the device of its embeddings.
    """
    policy = offload_policy(mesh.device_type) if cpu_offload else OffloadPolicy()
    layers = text_layers(model)
    root = _root(model, list(layers))
    assert root is not None, "sharding_problem"
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    kept = [module for name, module in model.named_modules() if is_inside(name, whole)]
    if head is None or head.weight is embeddings.weight or type(head) is not nn.Linear:
        kept += [embeddings, *([] if head is None else [head])]
    ignored = {parameter for module in kept for parameter in module.parameters()}
    for layer in layers.values():
        fully_shard(layer, mesh=mesh, ignored_params=ignored, offload_policy=policy)
    for tower in outside_text(model):  # text does not call it, so that it is never gathered
        fully_shard(model.get_submodule(tower.name), mesh=mesh, ignored_params=ignored)
    if head is not None and head not in kept:
        fully_shard(head, mesh=mesh, reshard_after_forward=True)
    fully_shard(root, mesh=mesh, ignored_params=ignored)


def offload_policy(device: str) -> CPUOffloadPolicy:
    """Return how weights wait in host memory for a type of device: page-locked for a GPU, so that copies overlap."""
    return CPUOffloadPolicy(pin_memory=device == "cuda")


class _Called(Exception):
    """Ends a forward pass where a module is called."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


def _root(model: PreTrainedModel, layers: Sequence[str]) -> nn.Module | None:
    """Return the outermost module within `model` that a forward pass calls and that runs embeddings and `layers`.

    OPT calls its decoder past the module around it, and a multimodal model looks up the embeddings in the module around
    the decoder. None if the model itself looks them up, as Llama 4 with its tower does. It is on the meta device.
    """

    def end(module: nn.Module, _: Any) -> None:
        raise _Called(module)

    embeddings = model.get_input_embeddings()
    (name,) = (name for name, module in model.named_modules() if module is embeddings)
    shared = takewhile(
        lambda each: len(set(each)) == 1, zip(*(path.split(".") for path in (*layers, name)), strict=False)
    )
    parts = [part[0] for part in shared]
    around = [model.get_submodule(".".join(parts[: count + 1])) for count in range(len(parts))]
    handles = [module.register_forward_pre_hook(end) for module in (*around, embeddings)]
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device="meta"))
    except _Called as called:
        return None if called.module is embeddings else called.module
    finally:
        for handle in handles:
            handle.remove()
    raise AssertionError(f"{type(model).__name__} does not call its embeddings")


def _read(
    name: str,
    slot: Slot,
    reader: CheckpointReader,
    base: BaseCheckpoint,
    device: torch.device,
    mesh: DeviceMesh,
    *,
    spec: QuantizationSpec | None,
) -> Tensor:
    """Return a parameter or buffer with its values, or this process's part of them; with `spec`, of its 4-bit codes.

    Raises:
        LoraError: a value is not finite.
    """
    before = slot.value
    dtype = base.dtype if spec is not None else before.dtype

    def check(values: Tensor) -> Tensor:
        if not finite.is_finite(values):
            raise finite.not_finite_error(name, str(base.source.path))
        return values

    if not isinstance(before, DTensor):
        values = check(reader.read(name)).to(device, dtype)
        return nn.Parameter(values, requires_grad=False) if isinstance(before, nn.Parameter) else values
    rows = _own_rows(before.shape[0], mesh)
    if spec is not None:
        dense = check(reader.read(name)).to(device, dtype).contiguous()
        codes, state = quantize_4bit(
            dense, blocksize=BLOCK_SIZE, compress_statistics=spec.double_quant, quant_type=spec.type
        )
        module: Any = slot.module
        module.quant_state = state
        local = codes[rows].clone()
    elif reader.stored(name) is not None:
        local = check(reader.read_rows(name, rows.start, rows.stop)).to(device, dtype)
    else:
        local = check(reader.read(name)[rows]).to(device, dtype).clone()
    shape, stride = before.shape, before.stride()
    sharded = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
    return nn.Parameter(sharded, requires_grad=False)


def _to_host(value: Tensor) -> Tensor:
    """Return a sharded weight in host memory, with a GPU's mesh; other values as they are."""
    # One weight at a time passes through the GPU: torch makes a sharded weight from a tensor of the mesh's device.
    return nn.Parameter(value.cpu(), requires_grad=False) if isinstance(value, DTensor) else value


def _own_rows(count: int, mesh: DeviceMesh) -> slice:
    """Return the rows of this process: as many each as torch.chunk gives, the last ones fewer or none."""
    size = -(-count // mesh.size())
    start = min(count, size * mesh.get_local_rank())
    return slice(start, min(count, start + size))
