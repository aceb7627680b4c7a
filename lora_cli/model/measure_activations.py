"""Measure what a forward pass in training saves for its backward pass, by running it without weights.

The pass is the run's own (loss, attention, adapter), on the meta device, where a hook of autograd sees each tensor that
is saved. Of layers that are alike, one is run. Batches of two, three and four rows tell apart what does not depend on
tokens, what grows with them, and what grows with their square.

Kernels of liger-kernel save less for norms, and compiled layers may: there the result is too large. So it is for models
whose kernels for GPUs are not installed on this machine, as torch's own code saves more.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_cli.data.collate import (
    Batch,
    Collate,
    collate_packed,
    collate_padded,
    collate_seq2seq,
    collate_sequence_classification,
    collate_token_classification,
)
from lora_cli.data.encoded_rows import Row
from lora_cli.errors import first_line
from lora_cli.model.activation_memory import ActivationBytes, Growth, TrainingSetup, growth_through
from lora_cli.model.experts import expert_weights
from lora_cli.model.falcon_attention import use_attention_interface
from lora_cli.model.fp32_weights import upcast_trainable_params
from lora_cli.model.fused_lora import FusedLora, is_fusable
from lora_cli.model.loss import LossFunction
from lora_cli.model.meta_forward import MetaForward
from lora_cli.model.packed_attention import PACKED_ATTENTION
from lora_cli.model.packing_support import stateful_layers
from lora_cli.model.padded_attention import PADDED_ATTENTION
from lora_cli.model.select_attention import OWN_ATTENTION, set_attention, unsupported_layers
from lora_cli.model.varlen_attention import DTYPES, VARLEN_ATTENTION
from lora_cli.model.weight_memory import text_layers
from lora_cli.recipe.tasks import TaskName
from lora_cli.run.library_warnings import silence_gpu_kernel_advice

FP32 = 4  # bytes
INT64 = 8  # bytes of the position of a dropped element
ROWS = (2, 3, 4)  # of the batches: some models have no mask for a single row
# Tokens of the rows of models that go through a row token by token, for which a long one would take minutes.
LOOP_LENGTHS = (256, 512, 768)
# Tensors of the size of a layer's largest saved one that exist while it runs backward: gradients, and what is computed
# again. And those of the size of its input.
LARGEST_COPIES, INPUT_COPIES = 4, 2
LOGITS_COPIES = 2  # gradients of logits that are not made in chunks
# What a model may raise that asks for values which nothing answers, or that does not support an attention.
NOT_RUNNABLE = (RuntimeError, ValueError, ImportError, TypeError, AttributeError, LookupError)


def activation_bytes(model: PeftModel, setup: TrainingSetup) -> ActivationBytes:
    """Return what training of `model`, which is on the meta device, saves: measured; roughly, if it does not run there.

    With `setup.attention` auto, it is that of the first attention implementation that works; a run tries them on the
    weights, too.
    """
    if setup.on_cpu:
        silence_gpu_kernel_advice()
    copy = _copy_for_training(model, setup)
    base = copy.get_base_model()
    use_attention_interface(base)
    layers = _LayersOfEachKind(list(text_layers(base).values()))
    dropped = [_dropped_bytes(layer, setup) for layer in text_layers(model.get_base_model()).values()]
    dense = dense_expert_bytes(base, setup.dtype.itemsize)
    reason = ""
    for name in _attention_names(base, setup):
        with torch.random.fork_rng(devices=[]), MetaForward(on_cpu=setup.on_cpu):
            try:
                set_attention(base, name)
                measured = _measure(copy, layers, setup)
                growths = zip(measured.layers, dropped, strict=True)
                of_layers = tuple(each._replace(linear=each.linear + more) for each, more in growths)
                return measured._replace(layers=of_layers, dense=dense)
            except NOT_RUNNABLE as error:
                reason = f"{type(error).__name__}: {first_line(error)}"
    return _count_modules(model, setup)._replace(dense=dense, unmeasured=reason)


def _attention_names(model: PreTrainedModel, setup: TrainingSetup) -> list[str]:
    """Return the attention implementations to try, as `select_attention.candidates` does, also for a GPU elsewhere."""
    if setup.attention in ("sdpa", "eager", *OWN_ATTENTION):
        return [setup.attention]
    capped = bool(getattr(model.config.get_text_config(), "attn_logit_softcapping", None))
    if setup.packed and not capped and not unsupported_layers(model) and setup.attention == "auto":
        on_gpu = [VARLEN_ATTENTION] if not setup.on_cpu and setup.dtype in DTYPES else []
        return [*on_gpu, PACKED_ATTENTION, "sdpa", "eager"]
    if not setup.on_cpu:
        return [PADDED_ATTENTION, "sdpa", "eager"]  # it saves what flash and flex attention save
    return ["eager"] if capped else ["sdpa", "eager"]  # torch's kernel has no cap on the scores


def _copy_for_training(model: PeftModel, setup: TrainingSetup) -> PeftModel:
    """Return a copy of `model` on the meta device, in the dtypes that training computes in."""
    tensors: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        is_frozen = parameter.is_floating_point() and not parameter.requires_grad
        empty = torch.empty_like(parameter, dtype=setup.dtype if is_frozen else None, device="meta")
        tensors[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    copy = deepcopy(model, tensors)  # in which these take the place of the model's
    for module in copy.modules():
        if isinstance(module, FusedLora) and setup.unfused is not None:
            module.__class__ = LoraLinear
            module.get_base_layer().compute_dtype = setup.unfused  # which `fp32_weights.py` casts factors to
        elif is_fusable(module):  # whose dropout is another one on each device: see `_dropped_bytes`
            for name in module.lora_dropout:
                module.lora_dropout[name] = nn.Identity()
    upcast_trainable_params(copy)
    return copy.train()


def _dropped_bytes(layer: nn.Module, setup: TrainingSetup) -> float:
    """Return the bytes per token of what dropout zeroes in fused layers: a GPU keeps a seed, see `lora_product.py`."""
    if not setup.on_cpu or setup.unfused is not None:
        return 0
    fused: list[Any] = [module for module in layer.modules() if is_fusable(module)]
    dropouts = ((module.in_features, dropout) for module in fused for dropout in module.lora_dropout.values())
    return sum(float(INT64 * dropout.p * width) for width, dropout in dropouts if isinstance(dropout, nn.Dropout))


class _Kind(NamedTuple):
    """What layers have in common that save the same."""

    modules: tuple[Any, ...]
    input: tuple[int, ...]  # shape
    trained_through: bool  # whether the gradient of the input is needed


class _LayersOfEachKind:
    """Runs one decoder layer of each kind, and has the others pass their input on. A class: it replaces their forward
    functions, and keeps what a pass has seen.
    """

    def __init__(self, layers: list[Any]) -> None:
        self._layers = layers
        self.start()
        for number, layer in enumerate(layers):
            layer.__dict__["forward"] = partial(self._forward, number, layer.forward, _modules_of(layer))

    def start(self) -> None:
        """Forget the last pass."""
        self.running: _Kind | None = None
        self.kinds: list[_Kind | None] = [None] * len(self._layers)  # of each layer that was run
        self.layer_input = 0  # bytes, the largest
        self.given: set[torch.UntypedStorage] = set()  # what layers got besides their input: made outside of them
        self._outputs: dict[_Kind, Any] = {}

    def _forward(self, number: int, own: Any, modules: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        kind = _Kind(modules, tuple(hidden.shape), hidden.requires_grad and torch.is_grad_enabled())
        self.kinds[number] = kind
        if kind in self._outputs:
            output = self._outputs[kind]
            return hidden if isinstance(output, Tensor) else type(output)((hidden, *output[1:]))
        self.layer_input = max(self.layer_input, hidden.nbytes)
        self.given.update(each.untyped_storage() for each in _tensors((*args[1:], *kwargs.values())))
        self.given.discard(hidden.untyped_storage())
        self.running = kind
        output = own(*args, **kwargs)
        self.running = None
        self._outputs[kind] = output
        return output


def _modules_of(layer: nn.Module) -> tuple[Any, ...]:
    """Return what tells apart layers that save different tensors: types, settings and parameters of their modules."""
    found: list[Any] = []
    for name, module in layer.named_modules():
        settings = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str)) and not key.startswith("_") and key != "layer_idx"
        }
        shapes = [(key, p.shape, p.dtype, p.requires_grad) for key, p in module.named_parameters(recurse=False)]
        found.append((name, type(module), tuple(sorted(settings.items())), tuple(shapes)))
    return tuple(found)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)


class _Holder:
    """What autograd keeps in place of a tensor, as long as its node lives."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Pass(NamedTuple):
    """What one forward pass has saved: bytes of each tensor."""

    layers: list[list[int]]  # of each layer; layers of one kind have the same list
    outside: list[int]
    layer_input: int


class _Batches(NamedTuple):
    """The batches of the passes."""

    rows: tuple[int, ...]
    lengths: tuple[int, ...]  # tokens of each row
    row: int  # tokens of a row that the growth is for

    def growth(self, values: Iterable[float]) -> Growth:
        """Return how bytes grow that have `values` in these batches."""
        if len(set(self.lengths)) == 1:
            return growth_through([(n * self.row, value) for n, value in zip(self.rows, values, strict=True)])
        of_row = growth_through(list(zip(self.lengths, values, strict=True)))
        return Growth(of_row.fixed, (of_row.linear + of_row.square * self.row) / self.rows[0])

    def growths(self, sizes: Sequence[list[int]]) -> set[Growth]:
        """Return the growth of each tensor of which `sizes` has the bytes in each batch."""
        if len({len(each) for each in sizes}) > 1:  # code that saves tensors token by token
            sizes = [sorted(each, reverse=True) for each in sizes]
        return {self.growth(each) for each in zip(*sizes, strict=False)}


def _measure(model: PeftModel, layers: _LayersOfEachKind, setup: TrainingSetup) -> ActivationBytes:
    loss = LossFunction(model, task=setup.task)
    chunked = loss.head is not None
    weights = {each.untyped_storage() for each in (*model.parameters(), *model.buffers())}

    def run(batches: _Batches) -> list[_Pass]:
        shapes = zip(batches.rows, batches.lengths, strict=True)
        return [_run(loss, layers, _batch(loss.base, setup, rows, length), weights) for rows, length in shapes]

    batches, passes = _Batches(ROWS, (setup.row,) * 3, setup.row), []
    if not setup.packed and setup.row > LOOP_LENGTHS[-1] and stateful_layers(loss.base.config):
        shorter = _Batches(ROWS[:1] * 3, LOOP_LENGTHS, setup.row)
        tried = run(shorter)
        if max(map(len, (*tried[0].layers, tried[0].outside))) > LOOP_LENGTHS[0]:  # at least a tensor for each token
            batches, passes = shorter, tried
    passes = passes or run(batches)
    of_layers = list(zip(*(each.layers for each in passes), strict=True))
    of_kinds = list({id(sizes[0]): sizes for sizes in of_layers}.values())
    of_outside = tuple(each.outside for each in passes)
    growths = {id(sizes[0]): batches.growth(map(sum, sizes)) for sizes in of_kinds}
    layer_input = -(-passes[0].layer_input // (batches.rows[0] * batches.lengths[0]))
    largest = {each for sizes in of_kinds or [of_outside] for each in batches.growths(sizes)}
    temporary = [_times(LARGEST_COPIES, each, INPUT_COPIES * layer_input) for each in largest]
    if not chunked:
        temporary += [_times(LOGITS_COPIES, each, 0) for each in batches.growths(of_outside)]
    return ActivationBytes(
        layers=tuple(growths[id(sizes[0])] for sizes in of_layers),
        layer_input=layer_input,
        outside=batches.growth(map(sum, of_outside)),
        temporary=tuple(temporary),
        chunked=chunked,
    )


def _times(factor: float, growth: Growth, linear: float) -> Growth:
    return Growth(factor * growth.fixed, factor * growth.linear + linear, factor * growth.square)


def _run(loss: LossFunction, layers: _LayersOfEachKind, batch: Batch, weights: set[torch.UntypedStorage]) -> _Pass:
    """Return what is still saved at the end of a forward pass, each storage once, but for `weights`."""
    saved: list[tuple[weakref.ref[_Holder], _Kind | None]] = []

    def pack(tensor: Tensor) -> _Holder:
        holder = _Holder(tensor)
        saved.append((weakref.ref(holder), layers.running))
        return holder

    layers.start()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        result = loss(batch)  # keeps the graph
    counted = set(weights)
    of_kinds: dict[_Kind | None, list[int]] = {None: []}
    for reference, kind in saved:
        holder = reference()
        if holder is not None and (storage := holder.tensor.untyped_storage()) not in counted:
            counted.add(storage)
            of_kinds.setdefault(None if storage in layers.given else kind, []).append(storage.nbytes())
    del result
    sizes = [of_kinds.setdefault(kind, []) if kind is not None else [] for kind in layers.kinds]
    return _Pass(sizes, of_kinds[None], layers.layer_input)


def _batch(model: PreTrainedModel, setup: TrainingSetup, rows: int, length: int) -> Batch:
    """Return a batch of `rows` rows of `length` tokens, each of which has a label."""
    ids = np.zeros(length, np.int32)
    classes = np.zeros(model.config.num_labels, np.float32) if _has_values(model) else np.zeros(1, np.int32)
    labels: dict[TaskName, Any] = {"seq-cls": classes, "seq2seq-lm": np.zeros(setup.target or length)}
    row = Row(ids, labels.get(setup.task, ids), "")
    collates: dict[TaskName, Collate] = {
        "causal-lm": collate_packed if setup.packed else collate_padded,
        "seq-cls": collate_sequence_classification,
        "token-cls": collate_token_classification,
        "seq2seq-lm": partial(collate_seq2seq, start_id=0),
    }
    batch = collates[setup.task]([row] * rows, range(rows), 0)
    # Rows of different lengths have a mask of padding.
    return batch if setup.packed else batch._replace(lengths=(*batch.lengths, length - 1))


def _has_values(model: PreTrainedModel) -> bool:
    """Return whether a row has a value for each label: of several classes, or of a regression."""
    return getattr(model.config, "problem_type", None) in ("multi_label_classification", "regression")


def dense_expert_bytes(model: nn.Module, itemsize: int) -> int:
    """Return the bytes of W + scale·BA in fp32 and in the compute dtype, and of its gradient.

    Only experts with a forward function of their own need them, one layer at a time: see `experts_lora.py`.
    """
    own = [w.shape.numel() for w in expert_weights(model).values() if not hasattr(w.module, "has_gate")]
    return max(own, default=0) * (FP32 + FP32 + 2 * itemsize)


def _count_modules(model: PeftModel, setup: TrainingSetup) -> ActivationBytes:
    """Return a rough count for a model that does not run without weights: of inputs and outputs of layers."""
    base = model.get_base_model()
    config, itemsize = base.config.get_text_config(), setup.dtype.itemsize
    layers = list(text_layers(base).values()) or [base]
    widths = [[sum(m.weight.shape) for m in each.modules() if isinstance(m, (nn.Linear, Conv1D))] for each in layers]
    scores = setup.row * int(getattr(config, "num_attention_heads", None) or 1)
    growths = tuple(Growth(linear=itemsize * (sum(each) + 2 * scores)) for each in widths)
    largest = LARGEST_COPIES * itemsize * max((width for each in widths for width in each), default=0)
    hidden = base.get_input_embeddings().weight.shape[-1]
    return ActivationBytes(growths, itemsize * hidden, Growth(linear=2 * FP32 * hidden), (Growth(linear=largest),))
