"""The base model: one record of its source, config, tokenizer, task, labels and dtype, which loads its weights.

`BaseCheckpoint.load` gives the frozen model, in 16 or 32 bits or quantized; `BaseCheckpoint.skeleton` gives its modules
on the meta device.
"""

import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from transformers import GgufConfig, PretrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.data.class_labels import ClassLabels
from lora_cli.errors import LoraError
from lora_cli.model import finite, gguf_base, prequantized
from lora_cli.model.build_limits import check_parameters, limited_modules, stored_parameters
from lora_cli.model.library_errors import library_errors
from lora_cli.model.mapped_weights import copy_mapped_weights
from lora_cli.model.model_path import CONFIG_FILE
from lora_cli.model.model_source import ModelSource, cached_folder, load_config, restore_hint, stored_tensors
from lora_cli.model.quantize import bnb_config, check_cpu_4bit, is_quantized, prepare_for_kbit_training
from lora_cli.model.safetensors_header import has_safetensors, read_headers
from lora_cli.model.safetensors_io import DTYPES
from lora_cli.model.tasks import TASKS, auto_class
from lora_cli.recipe.schema import QuantizationSpec
from lora_cli.recipe.tasks import TaskName
from lora_cli.run.library_warnings import silence_gpu_kernel_advice

# We print the progress of loading; warnings of transformers still come through.
transformers_logging.disable_progress_bar()

LAYER_NUMBER = re.compile(r"\.\d+\.")
PROBLEM_TYPES = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}


class LoadedBase(NamedTuple):
    """A base model, frozen and on its device."""

    model: PreTrainedModel
    heads: tuple[str, ...]  # modules that the task adds to the base, or whose weights are new: fully trained
    notes: tuple[str, ...]  # remarks on the loading, for the user


class BaseCheckpoint(NamedTuple):
    """A base model before its weights are loaded. A command creates it once and passes it on."""

    name: str  # the user's name for it
    source: ModelSource
    config: PretrainedConfig  # of the checkpoint; never modified
    tokenizer: PreTrainedTokenizerBase  # of the adapter, where that has its own
    task: TaskName
    labels: ClassLabels | None = None  # of a classification head
    dtype: torch.dtype = torch.float32  # of weights that are not quantized
    vocabulary: int = 0  # rows of the embeddings; if the checkpoint has fewer, new rows are added
    pad_id: int | None = None  # token id of padding, for models that find the end of a row by it

    @property
    def auto_class(self) -> Any:
        """Auto class of transformers that loads the model."""
        return auto_class(self.config, self.task)

    def load(
        self,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        attention: str | None = None,
        quantization: QuantizationSpec | None = None,
        seed: int = 0,
    ) -> LoadedBase:
        """Load the frozen model onto `device`, with the head that the task needs.

        Args:
            device: of all weights.
            dtype: of weights that are not quantized, in place of the record's.
            attention: attention implementation, by transformers' name; None for its default.
            quantization: how the linear layers are quantized while they are loaded.
            seed: of new weights (a new head).

        Raises:
            LoraError: it cannot be loaded, lacks weights that are not the task's own, or does not support `attention`.
        """
        source, dtype = self.source, dtype or self.dtype
        arguments: dict[str, Any] = {"dtype": dtype, **source.arguments}
        if attention is not None:
            arguments["attn_implementation"] = attention
        if quantization is not None:
            arguments["quantization_config"] = bnb_config(quantization, dtype)
        packed = quantization is not None or prequantized.detect_prequantized(self.config) is not None
        if packed or device.type != "cpu":
            # Tensor by tensor onto the device: the memory of the host would have to hold a whole model of each process.
            # Packed weights cannot be moved after loading at all; some would stay on the CPU.
            arguments["device_map"] = {"": device}
        if self.labels is not None:
            arguments |= _head_arguments(self.labels)
        arguments["use_safetensors"] = True  # never a pickle
        path = source.path
        if source.packed:
            assert source.gguf_file is not None
            path = str(source.gguf_file.parent)
            del arguments["use_safetensors"]
            arguments |= {
                "gguf_file": source.gguf_file.name,
                "quantization_config": GgufConfig(),
                "device_map": {"": device},
            }
        if device.type == "cpu":
            silence_gpu_kernel_advice()
        if not source.packed:
            self.check_files()
        torch.manual_seed(seed)
        folder = cached_folder(source)
        hint = restore_hint(source) if folder is not None and has_safetensors(folder) else ""
        with library_errors(source.path, part="its weights", hint=hint, trusted=source.trust_remote_code):
            model: PreTrainedModel
            model, loading_info = self.auto_class.from_pretrained(path, output_loading_info=True, **arguments)
        copy_mapped_weights(model)
        heads, notes = _check_missing_weights(model, loading_info, self.task)
        if not is_quantized(model):
            model.to(device)
        else:
            check_cpu_4bit(model, device)
            prepare_for_kbit_training(model, dtype)
        self._check_finite(model, loading_info["unexpected_keys"])
        gguf_base.make_packed_layers_differentiable(model)
        if self.vocabulary > model.get_input_embeddings().weight.shape[0]:
            _add_embedding_rows(model, self.vocabulary)
        self._set_pad_id(model)
        return LoadedBase(model.requires_grad_(False), heads, notes)

    def check_files(self) -> None:
        """Check the headers of the weights, and that the config describes no far larger model; not of a hub model.

        Raises:
            LoraError: files are missing or damaged, or do not fit the config.
        """
        folder = Path(self.source.path)
        if folder.is_dir():
            hint = restore_hint(self.source)
            quantized = prequantized.detect_prequantized(self.config) is not None
            stored = stored_parameters(read_headers(folder, hint=hint), quantized=quantized)
            check_parameters(self.skeleton(), stored, str(folder), part=CONFIG_FILE, hint=hint)

    def _check_finite(self, model: PreTrainedModel, unused: Iterable[str]) -> None:
        """Check that all weights are finite: those of the loaded model, and the `unused` tensors of its files.

        Raises:
            LoraError: one of them is not.
        """
        path = str(self.source.gguf_file or self.source.path)
        before_quantization: tuple[str, ...] = getattr(getattr(model, "hf_quantizer", None), "not_finite", ())
        weights = chain(finite.stored_weights(model), gguf_base.packed_values(model))
        if (name := next(iter(before_quantization), None) or finite.first_not_finite(weights)) is not None:
            raise finite.not_finite_error(name, path)
        if unused and not self.source.packed:
            stored = stored_tensors(self.source)
            checked = {name: stored[name] for name in sorted(unused) if name in stored and stored[name].dtype in DTYPES}
            finite.check_finite(checked, hint=finite.NOT_FINITE_HINT)

    def skeleton(self, *, buffers: torch.dtype | None = None) -> PreTrainedModel:
        """Return the modules of the unquantized model: names and shapes without weights, on the meta device.

        Args:
            buffers: compute the buffers (rotary frequencies, masks) on the CPU, in this dtype: then the model runs once
                its parameters have values. None leaves them on the meta device too.

        Raises:
            LoraError: its code needs a package that is not installed, or rejects its config.
        """
        config = deepcopy(self.config)
        if self.labels is not None:
            config.id2label = dict(enumerate(self.labels.names))  # num_labels is their number
            config.problem_type = PROBLEM_TYPES[self.labels.kind]
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        empty = torch.device("meta") if buffers is None else init_empty_weights(include_buffers=False)
        source, hint = self.source, restore_hint(self.source)
        with (
            library_errors(source.path, part=CONFIG_FILE, hint=hint, trusted=source.trust_remote_code),
            limited_modules(source.path, hint=hint),
            empty,
        ):
            model: PreTrainedModel = self.auto_class.from_config(
                config,
                trust_remote_code=source.trust_remote_code,
                **({} if buffers is None else {"dtype": buffers}),
            )
            if self.vocabulary > model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(self.vocabulary, mean_resizing=False)
        if buffers is not None:
            model.tie_weights()  # accelerate's context makes each parameter one of its own
            self._set_pad_id(model)
        return model

    def _set_pad_id(self, model: PreTrainedModel) -> None:
        if self.pad_id is not None and getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = self.pad_id

    def at(self, source: ModelSource) -> "BaseCheckpoint":
        """Return the same record with the weights and the config of another source, such as a merged model.

        Raises:
            LoraError: the config of `source` cannot be loaded.
        """
        return self._replace(source=source, config=load_config(source))


def head_labels(config: PretrainedConfig, task: TaskName) -> tuple[str, ...]:
    """Return the label names of the checkpoint's own classification head; empty if it has no such head."""
    suffix = {"seq-cls": "ForSequenceClassification", "token-cls": "ForTokenClassification"}.get(task)
    if suffix is None or not any(name.endswith(suffix) for name in config.architectures or ()):
        return ()
    return tuple(config.id2label[number] for number in sorted(config.id2label))


def task_heads(model: PreTrainedModel, task: TaskName) -> tuple[str, ...]:
    """Return the names of a classifier's head modules; the head of a language model is part of its base."""
    if not TASKS[task].is_classification:
        return ()
    modules = [(n, m) for n, m in model.named_children() if n != model.base_model_prefix]
    return tuple(name for name, module in modules if any(True for _ in module.parameters()))


def _head_arguments(labels: ClassLabels) -> dict[str, Any]:
    return {
        "num_labels": len(labels.names),
        "id2label": dict(enumerate(labels.names)),
        "label2id": {name: number for number, name in enumerate(labels.names)},
        "problem_type": PROBLEM_TYPES[labels.kind],
        "ignore_mismatched_sizes": True,  # a head for other labels is replaced by a new one, which a note reports
    }


def _check_missing_weights(
    model: PreTrainedModel, loading_info: dict[str, Any], task: TaskName
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the new and task-specific modules, and notes on tensors that only the checkpoint or only the model has.

    Raises:
        LoraError: weights outside the task's head are missing, so that a part of the model would be random; or the
            checkpoint has layers that the model lacks.
    """
    replaced = {entry[0] for entry in loading_info["mismatched_keys"]}
    missing = set(loading_info["missing_keys"]) | replaced
    heads = task_heads(model, task)
    unexplained = sorted(key for key in missing if not _is_inside(key, heads) and "pooler" not in key)
    if unexplained:
        more = f" and {len(unexplained) - 3} more" if len(unexplained) > 3 else ""
        raise LoraError(
            f"model.path: the checkpoint has no weights for {', '.join(unexplained[:3])}{more}",
            hint=f"not a complete {type(model).__name__} checkpoint: give another model, or choose another task",
        )
    poolers = sorted({key.rpartition(".")[0] for key in missing if not _is_inside(key, heads)})
    notes = []
    if missing:
        parameters = sum(model.get_parameter(key).numel() for key in missing)
        reason = " in place of one for other labels" if replaced else ""
        notes.append(
            f"new head{reason}: {', '.join([*heads, *poolers])}, {parameters:,} randomly initialized parameters"
        )
    return (*heads, *poolers), (*notes, *check_unused_weights(model, loading_info["unexpected_keys"]))


def check_unused_weights(model: PreTrainedModel, unused: Iterable[str]) -> list[str]:
    """Return a note on the tensors of the checkpoint that the model lacks, `unused`.

    Raises:
        LoraError: the checkpoint has layers that the model lacks.
    """
    unused = sorted(unused)
    used_kinds = {LAYER_NUMBER.sub(".#.", name) for name, _ in model.named_parameters()}
    if left_out := [key for key in unused if LAYER_NUMBER.sub(".#.", key) in used_kinds]:
        raise LoraError(
            f"model.path: the checkpoint has more layers than its config.json: {left_out[0]} would not be used",
            hint="restore config.json from its origin, or give another model",
        )
    kinds = sorted({key.partition(".")[0] for key in unused})
    return [f"this task does not use {len(unused)} tensors of the checkpoint: {', '.join(kinds[:4])}"] if unused else []


def _is_inside(key: str, modules: Sequence[str]) -> bool:
    return any(key.startswith(f"{module}.") for module in modules)


@torch.no_grad()
def _add_embedding_rows(model: PreTrainedModel, vocabulary: int) -> None:
    """Add rows for new tokens, each the mean of the existing rows: an untrained token is an average one."""
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            layer.weight[before:] = layer.weight[:before].float().mean(dim=0).to(layer.weight.dtype)
