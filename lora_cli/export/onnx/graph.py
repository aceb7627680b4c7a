"""Trace a model to an ONNX graph with torch's exporter: inputs, outputs, and the weights in a separate file.

The KV cache is an input and an output, with all positions in every layer. A layer with a sliding window applies it by
its mask. The graph is therefore correct at any length, at the cost of a cache that is not truncated. This project has
never traced a model on a GPU.
"""

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from lora_cli.errors import LoraError
from lora_cli.recipe.tasks import TaskName

BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
# Sizes of the sample inputs. All differ, because torch's exporter treats equal sizes as one, and 0 and 1 as constants.
SAMPLE_SIZES: Mapping[str, int] = {BATCH: 2, SEQUENCE: 3, PAST: 5, TOTAL: 8}
INNER_PREFIX = "inner"


class GraphValue(NamedTuple):
    """One input or output of the graph."""

    name: str
    shape: tuple[int | str, ...]  # a name is a dynamic size
    dtype: torch.dtype


class GraphSignature(NamedTuple):
    """Inputs and outputs of the graph, in order; those of the KV cache come last."""

    inputs: tuple[GraphValue, ...]
    outputs: tuple[GraphValue, ...]

    @property
    def cache(self) -> tuple[GraphValue, ...]:
        """The inputs with the KV cache of the previous tokens."""
        return tuple(value for value in self.inputs if PAST in value.shape)


@torch.no_grad()
def graph_signature(model: PreTrainedModel, task: TaskName) -> GraphSignature:
    """Return the inputs and outputs of the graph of `model`, with the names that onnxruntime's own tools use.

    Raises:
        LoraError: the cache of `model` does not consist of the keys and values of each layer.
    """
    decodes = task == "causal-lm"
    ids = torch.zeros(1, 2, dtype=torch.int64)
    sample = model(input_ids=ids, attention_mask=torch.ones_like(ids), **({"use_cache": True} if decodes else {}))
    logits = GraphValue("logits", (BATCH, SEQUENCE, sample.logits.shape[-1])[-sample.logits.ndim :], torch.float32)
    if task == "seq-cls":
        logits = logits._replace(shape=(BATCH, sample.logits.shape[-1]))
    arguments = inspect.signature(model.forward).parameters
    inputs = [GraphValue("input_ids", (BATCH, SEQUENCE), torch.int64)]
    inputs.append(GraphValue("attention_mask", (BATCH, TOTAL if decodes else SEQUENCE), torch.int64))
    if not decodes:
        # Decoders that classify accept token types too, but embed them as tokens: they get no such input.
        if "token_type_ids" in arguments and (getattr(model.config, "type_vocab_size", 0) or 0) > 1:
            inputs.append(GraphValue("token_type_ids", (BATCH, SEQUENCE), torch.int64))
        return GraphSignature(tuple(inputs), (logits,))
    if "position_ids" in arguments:
        inputs.append(GraphValue("position_ids", (BATCH, SEQUENCE), torch.int64))
    outputs = [logits]
    for number, layer in enumerate(_cache_layers(model, getattr(sample, "past_key_values", None))):
        for kind, tensor in (("key", layer.keys), ("value", layer.values)):
            _, heads, _, head_dim = tensor.shape
            inputs.append(GraphValue(f"past_key_values.{number}.{kind}", (BATCH, heads, PAST, head_dim), torch.float32))
            outputs.append(GraphValue(f"present.{number}.{kind}", (BATCH, heads, TOTAL, head_dim), torch.float32))
    return GraphSignature(tuple(inputs), tuple(outputs))


def _cache_layers(model: PreTrainedModel, cache: Any) -> list[Any]:
    layers = getattr(cache, "layers", [])
    if not layers or any(not isinstance(layer, DynamicLayer) or layer.keys.ndim != 4 for layer in layers):
        raise LoraError(
            f"--to onnx: the cache of a {model.config.model_type} model does not consist of the keys and values of each"
            " layer",
            hint="use --to safetensors",
        )
    return list(layers)


def trace(model: PreTrainedModel, signature: GraphSignature, file: Path) -> None:
    """Trace `model` (fp32, on the CPU); write its graph to `file` and the weights to `file`.data.

    Weights keep their names and values: no optimization folds them into other constants.

    Raises:
        LoraError: torch's exporter cannot trace the model.
    """
    inputs = {value.name: _sample_input(value) for value in signature.inputs}
    cache = [inputs.pop(value.name) for value in signature.cache]
    dynamic_axes = {
        value.name: {i: size for i, size in enumerate(value.shape) if isinstance(size, str)}
        for value in signature.inputs
    }
    shapes = ({name: dynamic_axes[name] for name in inputs}, [dynamic_axes[value.name] for value in signature.cache])
    with _no_exporter_output(), torch.no_grad():
        try:
            program = torch.onnx.export(
                FlatCacheModel(model).eval(),
                (inputs, cache),
                input_names=[value.name for value in signature.inputs],
                output_names=[value.name for value in signature.outputs],
                dynamic_shapes=shapes,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as reason:
            raise LoraError(
                f"--to onnx: torch's exporter cannot trace this {model.config.model_type} model: {_root_cause(reason)}",
                hint="use --to safetensors, or --to gguf for a language model",
                exit_code=1,
            ) from reason
        assert program is not None
        _optimize(program.model, signature)
        program.save(str(file), external_data=True)


class FlatCacheModel(nn.Module):
    """The model with its KV cache as a flat list of tensors: key and value of each layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.inner = model

    # torch's exporter derives the graph's internal names from `given`: renaming it changes the bytes of the file.
    def forward(self, given: dict[str, Tensor], cache: list[Tensor]) -> tuple[Tensor, ...]:
        """Run the model.

        Args:
            given: `[batch, seq]` int64 by name; the attention mask covers the cached positions too.
            cache: `[batch, heads, past, head_dim]` fp32: key and value of each layer. Empty for a classifier.

        Returns:
            The logits (fp32: `[batch, seq, vocab]` of a decoder, `[batch, labels]` or `[batch, seq, labels]` of a
            classifier), then the cache with the new positions appended.
        """
        if not cache:
            return (self.inner(**given).logits,)
        kv_cache = DynamicCache()
        for key, value in zip(cache[::2], cache[1::2], strict=True):
            layer = _DynamicLengthLayer()
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
            kv_cache.layers.append(layer)
        logits = self.inner(**given, past_key_values=kv_cache, use_cache=True).logits
        return (logits, *(tensor for layer in kv_cache.layers for tensor in (layer.keys, layer.values)))


class _DynamicLengthLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """A layer of the cache whose length is a dynamic size of the graph, and may be 0."""

    def get_seq_length(self) -> int:
        length: int = self.keys.shape[-2]
        return length


def _sample_input(value: GraphValue) -> Tensor:
    shape = [SAMPLE_SIZES[size] if isinstance(size, str) else size for size in value.shape]
    return torch.ones(shape, dtype=value.dtype)


def _optimize(model: onnx_ir.Model, signature: GraphSignature) -> None:
    """Fold and merge constants other than weights, and give weights their names in transformers."""
    optimizer.inline(model)
    for _ in range(2):  # the second round folds more, by shapes that the first inferred
        optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=_may_fold)
        optimizer.remove_unused_nodes(model)
    for optimization in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
        common.ClearMetadataAndDocStringPass(),  # stack traces of the exporter, which contain local paths
    ):
        optimization(model)
    for value in list(model.graph.initializers.values()):
        value.name = str(value.name).removeprefix(f"{INNER_PREFIX}.")
    expected = (*signature.inputs, *signature.outputs)
    for graph_value, value in zip(expected, (*model.graph.inputs, *model.graph.outputs), strict=True):
        value.shape = onnx_ir.Shape(graph_value.shape)


def _may_fold(node: onnx_ir.Node) -> bool | None:
    """Return False if a weight is an input of `node`; None leaves the choice to the optimizer."""
    has_weight = any(value is not None and str(value.name).startswith(f"{INNER_PREFIX}.") for value in node.inputs)
    return False if has_weight else None


@contextlib.contextmanager
def _no_exporter_output() -> Iterator[None]:
    """Suppress output of torch's exporter: it is about the exporter's internals, and users cannot act on it."""
    disabled = logging.root.manager.disable
    discarded = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(discarded), contextlib.redirect_stderr(discarded):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def _root_cause(error: BaseException) -> str:
    """Return the message of the innermost cause, in one line of at most 300 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__
