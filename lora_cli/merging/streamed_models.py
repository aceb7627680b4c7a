"""The models that verification runs, with streamed weights: base and adapter, the merged model, the quantized base."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from transformers import PreTrainedModel

from lora_cli.model import empty_base, fake_quantize, safetensors_io
from lora_cli.model.base_model import BaseCheckpoint
from lora_cli.model.checkpoint_reader import CheckpointReader, Transforms
from lora_cli.model.conversion import CheckpointMapping
from lora_cli.model.empty_base import EmptyModel
from lora_cli.model.fp32_weights import upcast_trainable_params
from lora_cli.model.model_source import ModelSource, local_folder
from lora_cli.model.quantize import prepare_for_kbit_training
from lora_cli.model.safetensors_io import ShardFiles
from lora_cli.model.saved_adapter import SavedAdapter
from lora_cli.model.streamed_weights import Slot, find_slots, stream_weights
from lora_cli.recipe.schema import QuantizationSpec


class Streams(NamedTuple):
    """What streamed models share."""

    files: ShardFiles  # opens checkpoints for reading
    pool: ThreadPoolExecutor  # threads for products, which compute on one core each


class AdaptedModel(NamedTuple):
    """Base and adapter, in eval mode."""

    empty: EmptyModel
    reader: CheckpointReader  # of the base's weights

    @property
    def model(self) -> PeftModel:
        """The model that runs."""
        return self.empty.model


class MergedModel(NamedTuple):
    """A merged model, in fp32 and eval mode."""

    model: PreTrainedModel
    reader: CheckpointReader


def open_adapted(adapter: SavedAdapter, transforms: Transforms, streams: Streams) -> AdaptedModel:
    """Return base and adapter in fp32; `transforms` change the base's weights.

    Raises:
        LoraError: adapter and base do not fit.
    """
    return _attach(adapter, _skeleton(adapter.base, torch.float32), transforms, streams, dtypes={})


def open_trained(adapter: SavedAdapter, spec: QuantizationSpec, streams: Streams) -> AdaptedModel:
    """Return the adapter on its base as in training: quantized by `spec`, computed in the base's dtype.

    Raises:
        LoraError: adapter and base do not fit.
    """
    base = adapter.base
    model = prepare_for_kbit_training(_skeleton(base, base.dtype), base.dtype)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}
    transforms = {}
    quantized = fake_quantize.quantized_weights(base.skeleton(), spec)
    for name in quantized.keys() & dtypes.keys():  # of Llama 4, also names that experts have only while they are loaded
        transforms[name] = fake_quantize.quantize_dequantize(spec, base.dtype, transposed=quantized[name], exact=True)
        if name.endswith(".weight"):  # of a linear layer, not of experts
            layer = model.get_submodule(name.removesuffix(".weight"))
            computed = fake_quantize.compute_as_quantized(layer, spec, base.dtype)
            dtypes |= {f"{name.removesuffix('.weight')}.{key}": computed for key, _ in layer.named_parameters()}
    adapted = _attach(adapter, model, transforms, streams, dtypes=dtypes)
    upcast_trainable_params(adapted.model)
    return adapted


def _skeleton(base: BaseCheckpoint, dtype: torch.dtype) -> PreTrainedModel:
    model = base.skeleton(buffers=dtype)
    model.set_experts_implementation("eager")  # one expert after the other, and only those that have tokens
    return model


def _attach(
    adapter: SavedAdapter,
    skeleton: PreTrainedModel,
    transforms: Transforms,
    streams: Streams,
    *,
    dtypes: Mapping[str, torch.dtype],
) -> AdaptedModel:
    """Attach the adapter to the base; `dtypes` are those of the base's parameters, by name, where they are not fp32."""
    tensors = safetensors_io.list_tensors(local_folder(adapter.base.source, fetch=True))
    model = empty_base.init_empty_weights(skeleton)
    slots = find_slots(model)
    mapping = CheckpointMapping(model, tensors)
    empty = empty_base.attach_saved_adapter(model, adapter.files, base=adapter.base.name)
    reader = CheckpointReader(
        tensors, mapping, streams.files, tied=empty.tied, shapes=empty.shapes, transforms=transforms
    )
    wrappers = [module for module in empty.model.modules() if isinstance(module, ModulesToSaveWrapper)]
    # Of a fully trained module, PEFT keeps the base's and trains a copy; other values of the adapter are in the base.
    originals = {part for wrapper in wrappers for part in wrapper.original_module.modules()}
    trained = [name for name in empty.from_adapter if slots[name].module not in originals]
    if dtypes:
        _cast_trained(empty, [slots[name] for name in trained], adapter.base.dtype)
    base_slots = {name: slot for name, slot in slots.items() if name not in trained}
    stream_weights(base_slots, reader, pool=streams.pool, dtypes=dtypes)
    empty.model.eval()
    return AdaptedModel(empty, reader)


def _cast_trained(empty: EmptyModel, trained: Iterable[Slot], dtype: torch.dtype) -> None:
    """Cast what the adapter trained of the base itself, as loading the adapter onto a base in `dtype` does."""
    for module in empty.model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.to(dtype)
    for slot in trained:
        slot.value.data = slot.value.data.to(dtype)


def open_merged(adapter: SavedAdapter, folder: Path, streams: Streams) -> MergedModel:
    """Return the merged model in `folder`, with the task and the labels of the adapter.

    Raises:
        LoraError: its config or its files cannot be read.
    """
    source = ModelSource(str(folder), adapter.base.source.trust_remote_code)
    model = empty_base.init_empty_weights(_skeleton(adapter.base.at(source), torch.float32))
    tensors = safetensors_io.list_tensors(folder)
    reader = CheckpointReader(
        tensors,
        CheckpointMapping(model, tensors),
        streams.files,
        tied=empty_base.tied_parameters(model),
        shapes={},
        transforms={},
    )
    stream_weights(find_slots(model), reader, pool=streams.pool, dtypes={})
    return MergedModel(model.eval(), reader)
