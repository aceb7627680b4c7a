"""A frozen base whose weights are sharded over the processes of a run (FSDP2, torch's `fully_shard`).

Each process reads its rows of each weight from the checkpoint. A weight that is quantized is read and quantized by all,
one at a time, and each keeps its part of the codes. Each decoder layer is gathered before it computes and freed after,
in the forward and in the backward pass. Adapters, and what they train in full, stay whole on each process: they are
small, and so gradients, optimizer, checkpoints and the saved adapter are those of any run.
"""

from collections.abc import Sequence
from contextlib import suppress
from itertools import takewhile
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import GenerationConfig, PreTrainedModel

from lora_cli.errors import LoraError
from lora_cli.model import fake_quantize, finite
from lora_cli.model.base_model import BaseCheckpoint, LoadedBase
from lora_cli.model.checkpoint_reader import CheckpointReader
from lora_cli.model.conversion import CheckpointMapping
from lora_cli.model.device import resolve_compute_dtype
from lora_cli.model.empty_base import tied_parameters
from lora_cli.model.experts import expert_weights
from lora_cli.model.model_source import local_folder
from lora_cli.model.quantize import BLOCK_SIZE, check_cpu_4bit, prepare_for_kbit_training
from lora_cli.model.safetensors_io import ShardFiles, list_tensors
from lora_cli.model.streamed_weights import Slot, find_slots
from lora_cli.model.weight_memory import text_layers
from lora_cli.recipe.schema import QuantizationSpec


def load_sharded(
    base: BaseCheckpoint,
    device: torch.device,
    *,
    attention: str | None = None,
    quantization: QuantizationSpec | None = None,
    whole: Sequence[str] = (),
) -> LoadedBase:
    """Load the frozen base of a language model, sharded over all processes, which must all call it.

    Args:
        base: a checkpoint in safetensors, not quantized.
        device: of this process.
        attention: attention implementation, by transformers' name; None for its default.
        quantization: 4 bits, or None.
        whole: modules whose weights are not sharded, because they are trained; by the last parts of their names.

    Raises:
        LoraError: the model has no decoder layers that can be sharded, lacks weights, or a weight is not finite.
    """
    model = base.skeleton(buffers=base.dtype)
    if attention is not None:
        model.set_attn_implementation(attention)
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(str(local_folder(base.source, fetch=True)))
    quantized = _quantize_skeleton(model, base, quantization) if quantization is not None else set()
    tied = tied_parameters(model)
    slots = find_slots(model)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    _shard(model, mesh, whole=whole)
    tensors = list_tensors(local_folder(base.source, fetch=True))
    with ShardFiles(writable=False) as files:
        mapping = CheckpointMapping(base.skeleton(), tensors)
        shapes = {name: tuple(slot.value.shape) for name, slot in slots.items() if name not in quantized}
        reader = CheckpointReader(tensors, mapping, files, tied=tied, shapes=shapes, transforms={})
        if missing := [name for name in slots if not reader.has(name)]:
            raise LoraError(
                f"model.path: the checkpoint has no weights for {', '.join(missing[:3])}",
                hint=f"not a complete {type(model).__name__} checkpoint: give another model",
            )
        names = {name: group[0] for group in tied for name in group}
        filled: dict[str, nn.Parameter] = {}  # tied parameters are one
        for name, slot in slots.items():
            first = names.get(name, name)
            if first not in filled:
                filled[first] = _read(
                    name, slot, reader, base, device, mesh, spec=quantization if name in quantized else None
                )
            setattr(slot.module, slot.key, filled[first])
    if quantization is not None:
        check_cpu_4bit(model)
    return LoadedBase(model.requires_grad_(False), (), ())


def _quantize_skeleton(model: PreTrainedModel, base: BaseCheckpoint, spec: QuantizationSpec) -> set[str]:
    """Put 4-bit layers, on the meta device, in place of those that are quantized; return the names of their weights.

    Raises:
        LoraError: the base has experts, whose packed weights cannot be sharded.
    """
    if expert_weights(model):
        raise LoraError(
            "distributed.strategy: the 4-bit weights of experts cannot be sharded",
            hint="write strategy: ddp, or leave quantization out",
        )
    names = set(fake_quantize.quantized_weights(base.skeleton(), spec))
    for name in names:
        path = name.removesuffix(".weight")
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
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


def _shard(model: PreTrainedModel, mesh: DeviceMesh, *, whole: Sequence[str]) -> None:
    """Shard decoder layers, embeddings and head; a head that is the embeddings, and trained modules, stay whole.

    Raises:
        LoraError: the model does not say which of its modules are decoder layers.
    """
    layers = text_layers(model)
    if not layers:
        raise LoraError(
            f"distributed.strategy: {model.config.model_type} models cannot be sharded: their decoder layers are not "
            "known",
            hint="write strategy: ddp",
        )
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    kept = [module for name, module in model.named_modules() if any(f".{name}".endswith(f".{part}") for part in whole)]
    if head is None or head.weight is embeddings.weight or type(head) is not nn.Linear:
        kept += [embeddings, *([] if head is None else [head])]
    ignored = {parameter for module in kept for parameter in module.parameters()}
    for layer in layers.values():
        fully_shard(layer, mesh=mesh, ignored_params=ignored)
    if head is not None and head not in kept:
        fully_shard(head, mesh=mesh, reshard_after_forward=True)
    (name,) = (name for name, module in model.named_modules() if module is embeddings)
    fully_shard(_outermost_called(model, _common_path([*layers, name])), mesh=mesh, ignored_params=ignored)


def _common_path(names: Sequence[str]) -> str:
    """Return the path of the innermost module that contains the modules `names`."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(part[0] for part in takewhile(lambda each: len(set(each)) == 1, parts))


class _Called(Exception):
    """Ends a forward pass where a module is called."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


def _outermost_called(model: PreTrainedModel, path: str) -> nn.Module:
    """Return the outermost module within `model` on the way to `path` that a forward pass calls.

    Its forward runs embeddings and layers. OPT calls its decoder past the module around it, and a multimodal model
    looks up the embeddings in the module around the decoder. The model is on the meta device.

    Raises:
        LoraError: the model itself looks up the embeddings, as Llama 4 with its tower does.
    """

    def end(module: nn.Module, _: Any) -> None:
        raise _Called(module)

    parts = path.split(".")
    around = [model.get_submodule(".".join(parts[: count + 1])) for count in range(len(parts))]
    embeddings = model.get_input_embeddings()
    handles = [module.register_forward_pre_hook(end) for module in (*around, embeddings)]
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device="meta"))
    except _Called as called:
        if called.module is not embeddings:
            return called.module
        raise LoraError(
            f"distributed.strategy: {model.config.model_type} models cannot be sharded: they look up their embeddings "
            "outside of the decoder",
            hint="write strategy: ddp",
        ) from None
    finally:
        for handle in handles:
            handle.remove()
    raise AssertionError(f"{type(model).__name__} does not call {path}")


def _read(
    name: str,
    slot: Slot,
    reader: CheckpointReader,
    base: BaseCheckpoint,
    device: torch.device,
    mesh: DeviceMesh,
    *,
    spec: QuantizationSpec | None,
) -> nn.Parameter:
    """Return a parameter with its values, or this process's part of them; with `spec`, of its 4-bit codes.

    Raises:
        LoraError: a value is not finite.
    """
    before = slot.value
    dtype = base.dtype if spec is not None or not before.is_floating_point() else before.dtype

    def check(values: Tensor) -> Tensor:
        if not finite.is_finite(values):
            raise finite.not_finite_error(name, str(base.source.path))
        return values

    if not isinstance(before, DTensor):
        return nn.Parameter(check(reader.read(name)).to(device, dtype), requires_grad=False)
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


def _own_rows(count: int, mesh: DeviceMesh) -> slice:
    """Return the rows of this process: as many each as torch.chunk gives, the last ones fewer or none."""
    size = -(-count // mesh.size())
    start = min(count, size * mesh.get_local_rank())
    return slice(start, min(count, start + size))
