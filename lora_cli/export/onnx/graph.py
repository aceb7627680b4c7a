"""A model as an ONNX graph: what goes in and comes out, traced by torch's exporter, the weights in a file beside it.

The cache is an input and an output, whole in every layer: a layer with a window is given the window by its mask, so
that a graph is right at any length, at the cost of a cache that is not cut. Never traced on a GPU by this project.
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
# What is traced with: sizes that differ, as torch's exporter takes equal ones for one, and 0 and 1 for constants.
SAMPLE_SIZES: Mapping[str, int] = {BATCH: 2, SEQUENCE: 3, PAST: 5, TOTAL: 8}
INNER_PREFIX = "inner"


class GraphValue(NamedTuple):
    """An input or output of the graph."""

    name: str
    shape: tuple[int | str, ...]  # the names are of sizes that vary
    dtype: torch.dtype


class GraphSignature(NamedTuple):
    """All of them, in order; those of the cache last."""

    inputs: tuple[GraphValue, ...]
    outputs: tuple[GraphValue, ...]

    @property
    def cache(self) -> tuple[GraphValue, ...]:
        """The inputs that what was read before is in."""
        return tuple(port for port in self.inputs if PAST in port.shape)


@torch.no_grad()
def graph_signature(model: PreTrainedModel, task: TaskName) -> GraphSignature:
    """What the graph of `model` takes and gives, by the names that onnxruntime's own tools use.

    Raises:
        LoraError: its cache is other than keys and values of what was read.
    """
    decodes = task == "causal-lm"
    ids = torch.zeros(1, 2, dtype=torch.int64)
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids), **({"use_cache": True} if decodes else {}))
    logits = GraphValue("logits", (BATCH, SEQUENCE, found.logits.shape[-1])[-found.logits.ndim :], torch.float32)
    if task == "seq-cls":
        logits = logits._replace(shape=(BATCH, found.logits.shape[-1]))
    takes = inspect.signature(model.forward).parameters
    inputs = [GraphValue("input_ids", (BATCH, SEQUENCE), torch.int64)]
    inputs.append(GraphValue("attention_mask", (BATCH, TOTAL if decodes else SEQUENCE), torch.int64))
    if not decodes:
        # Decoders that classify would take types too, as words of their own.
        if "token_type_ids" in takes and (getattr(model.config, "type_vocab_size", 0) or 0) > 1:
            inputs.append(GraphValue("token_type_ids", (BATCH, SEQUENCE), torch.int64))
        return GraphSignature(tuple(inputs), (logits,))
    if "position_ids" in takes:
        inputs.append(GraphValue("position_ids", (BATCH, SEQUENCE), torch.int64))
    outputs = [logits]
    for number, layer in enumerate(_layers(model, getattr(found, "past_key_values", None))):
        for kind, held in (("key", layer.keys), ("value", layer.values)):
            _, heads, _, width = held.shape
            inputs.append(GraphValue(f"past_key_values.{number}.{kind}", (BATCH, heads, PAST, width), torch.float32))
            outputs.append(GraphValue(f"present.{number}.{kind}", (BATCH, heads, TOTAL, width), torch.float32))
    return GraphSignature(tuple(inputs), tuple(outputs))


def _layers(model: PreTrainedModel, cache: Any) -> list[Any]:
    layers = getattr(cache, "layers", [])
    if not layers or any(not isinstance(layer, DynamicLayer) or layer.keys.ndim != 4 for layer in layers):
        raise LoraError(
            f"--to onnx: the cache of a {model.config.model_type} model is other than keys and values of each layer",
            hint="use --to safetensors",
        )
    return list(layers)


def trace(model: PreTrainedModel, form: GraphSignature, file: Path) -> None:
    """Trace `model` (fp32, on the CPU) and put its graph in `file`, the weights in `file`.data.

    Weights keep their names and values: no pass folds them into others.

    Raises:
        LoraError: torch's exporter cannot.
    """
    given = {port.name: _sample_input(port) for port in form.inputs}
    cache = [given.pop(port.name) for port in form.cache]
    varying = {
        port.name: {i: size for i, size in enumerate(port.shape) if isinstance(size, str)} for port in form.inputs
    }
    shapes = ({name: varying[name] for name in given}, [varying[port.name] for port in form.cache])
    with _no_exporter_output(), torch.no_grad():
        try:
            program = torch.onnx.export(
                FlatCacheModel(model).eval(),
                (given, cache),
                input_names=[port.name for port in form.inputs],
                output_names=[port.name for port in form.outputs],
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
        _simplify(program.model, form)
        program.save(str(file), external_data=True)


class FlatCacheModel(nn.Module):
    """The model with the cache as a list of tensors: key and value of each layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.inner = model

    def forward(self, given: dict[str, Tensor], cache: list[Tensor]) -> tuple[Tensor, ...]:
        """Logits, and the cache with what was read put behind it."""
        if not cache:
            return (self.inner(**given).logits,)
        held = DynamicCache()
        for key, value in zip(cache[::2], cache[1::2], strict=True):
            layer = _DynamicLengthLayer()
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
            held.layers.append(layer)
        logits = self.inner(**given, past_key_values=held, use_cache=True).logits
        return (logits, *(tensor for layer in held.layers for tensor in (layer.keys, layer.values)))


class _DynamicLengthLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """A layer of the cache whose length is a size of the graph, be it 0."""

    def get_seq_length(self) -> int:
        length: int = self.keys.shape[-2]
        return length


def _sample_input(port: GraphValue) -> Tensor:
    shape = [SAMPLE_SIZES[size] if isinstance(size, str) else size for size in port.shape]
    return torch.ones(shape, dtype=port.dtype)


def _simplify(model: onnx_ir.Model, form: GraphSignature) -> None:
    """Fold and merge what is constant but weights, which get the names they have in transformers."""
    optimizer.inline(model)
    for _ in range(2):  # shapes that the first found let the second fold more
        optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=_is_weightless)
        optimizer.remove_unused_nodes(model)
    for each in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
        common.ClearMetadataAndDocStringPass(),  # stacks of the exporter, with paths of this machine
    ):
        each(model)
    for value in list(model.graph.initializers.values()):
        value.name = str(value.name).removeprefix(f"{INNER_PREFIX}.")
    for port, value in zip((*form.inputs, *form.outputs), (*model.graph.inputs, *model.graph.outputs), strict=True):
        value.shape = onnx_ir.Shape(port.shape)


def _is_weightless(node: onnx_ir.Node) -> bool | None:
    """No where a weight goes in; None leaves the choice to the optimizer."""
    takes_weight = any(value is not None and str(value.name).startswith(f"{INNER_PREFIX}.") for value in node.inputs)
    return False if takes_weight else None


@contextlib.contextmanager
def _no_exporter_output() -> Iterator[None]:
    """The exporter's remarks are on its own way of working: nothing that a user could act on."""
    disabled = logging.root.manager.disable
    nowhere = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def _root_cause(error: BaseException) -> str:
    """What went wrong first, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__
