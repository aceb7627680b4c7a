"""The loss where there is a label, and nowhere else: logits of unsupervised tokens are never computed."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.data.collate import Batch
from lora_cli.model import packed_attention, varlen_attention, virtual_tokens
from lora_cli.model.device import to_device
from lora_cli.model.head_loss import (
    ChunkedHeadCrossEntropy,
    ChunkedLinearCrossEntropy,
    chunk_tokens,
    leaves_of,
    logit_functions,
)
from lora_cli.model.packing_support import stateful_layers
from lora_cli.model.sharding import gathered, is_gathered, is_plain_linear
from lora_cli.recipe.tasks import TaskName


class BatchLoss(NamedTuple):
    """The loss of a model on one batch. Its units are supervised tokens, labeled words or rows (`model/tasks.py`)."""

    loss: Tensor  # scalar fp32: nats, or squared error of a regression, summed over the units
    correct: Tensor  # scalar int64: units whose most likely label is the right one; 0 for a regression
    tokens: int  # units


class OutputHead(NamedTuple):
    """The output head of a model, applied to chunks of hidden states."""

    layer: nn.Module
    function: Callable[[Tensor], Tensor]  # what the model does to its logits: a cap, a factor, or nothing
    vocabulary: int  # logits of a token
    plain: bool  # whether it is a frozen linear layer, and nothing is done to its logits
    trained: tuple[Tensor, ...]  # the parameters of the head that are trained

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [n, vocabulary] of hidden states [n, h], in their dtype."""
        layer: Any = self.layer
        if is_gathered(layer):  # a call would free its weight, and gather it again for the next chunk
            return self.function(nn.functional.linear(hidden, layer.weight, layer.bias))
        return self.function(self.layer(hidden))


class LossFunction:
    """Loss and correct predictions of batches under one model.

    Differentiable in the adapter if gradients are enabled. It uses the adapter that is active at the call. It tests
    once, when it is created, what the model does with its head.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        *,
        task: TaskName = "causal-lm",
        label_smoothing: float = 0.0,
        neftune_alpha: float | None = None,
    ) -> None:
        """`label_smoothing` and `neftune_alpha` are for training; with the latter, call `close` at the end."""
        self.base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
        self.task = task
        self.device = self.base.get_input_embeddings().weight.device
        # PEFT's own forward puts virtual tokens before a row; other adapters are part of the base's modules.
        prompted = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
        self._prompted: PeftModel | None = model if prompted and isinstance(model, PeftModel) else None
        self.head = self._find_head() if task == "causal-lm" and not prompted else None
        self._smoothing = label_smoothing
        self._noise = NEFTuneNoise(neftune_alpha, self.base) if neftune_alpha else None

    def close(self) -> None:
        """Remove the hooks from the model."""
        if self._noise:
            self._noise.remove()

    def __call__(self, batch: Batch) -> BatchLoss:
        """Return sums over the units of `batch`; zeros if it has no units."""
        if self._noise:
            self._noise.lengths = batch.lengths
        targets = batch.targets.to(self.device, non_blocking=True)
        if self.head is not None:
            hidden, smoothing = self._hidden(batch), self._smoothing
            # A sharded head is gathered once, whatever the number of chunks; the backward pass does not need it.
            with gathered(self.head.layer):
                if self.head.plain:
                    weight, bias = self.head.layer.weight, self.head.layer.bias
                    loss, correct = ChunkedLinearCrossEntropy.apply(hidden, weight, bias, targets, smoothing)  # type: ignore[no-untyped-call]
                else:
                    # Without gradients, autograd would still ask for those of parameters.
                    trained = self.head.trained if torch.is_grad_enabled() else ()
                    loss, correct = ChunkedHeadCrossEntropy.apply(  # type: ignore[no-untyped-call]
                        hidden, targets, self.head.logits, self.head.vocabulary, smoothing, *trained
                    )
            return BatchLoss(loss, correct, len(targets))
        losses, correct_units = self._loss(self.logits(batch), targets)
        return BatchLoss(losses.sum(), correct_units.sum(), len(targets))

    @torch.no_grad()
    def per_token(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of every unit, fp32 [units], and whether its most likely label is right, bool [units]."""
        targets = batch.targets.to(self.device, non_blocking=True)
        if self.head is None:
            return self._loss(self.logits(batch), targets)
        hidden, head = self._hidden(batch), self.head
        size = chunk_tokens(head.vocabulary, hidden.device)
        chunks = zip(hidden.split(size), targets.split(size), strict=True)
        with gathered(head.layer):
            results = [self._loss(head.logits(part), part_targets) for part, part_targets in chunks]
        losses, correct = zip(*results, strict=True)
        return torch.cat(losses), torch.cat(correct)

    def _loss(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses, fp32 [units], and correctness, bool [units], of `logits` [units, classes]."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if not targets.is_floating_point():
            losses = nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=self._smoothing)
            return losses, logits.argmax(-1) == targets
        if self.base.config.problem_type == "regression":
            return (logits - targets).square().mean(dim=1), torch.zeros_like(targets[:, 0], dtype=torch.bool)
        smooth = targets * (1 - self._smoothing) + self._smoothing / 2
        losses = nn.functional.binary_cross_entropy_with_logits(logits, smooth, reduction="none").mean(dim=1)
        return losses, ((logits > 0) == (targets > 0.5)).all(dim=1)

    def logits(self, batch: Batch) -> Tensor:
        """Return logits [units, vocabulary or labels] of the units of `batch`, in the model's dtype."""
        return unit_logits(self._prompted or self.base, self.inputs(batch), batch, task=self.task)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return the keyword arguments of the model's forward for `batch`, row boundaries included."""
        inputs = model_inputs(self.base, batch, task=self.task)
        if self._prompted is not None:
            inputs.pop("position_ids", None)  # PEFT counts them again, with the virtual tokens
            if inputs.get("attention_mask") is None:
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return inputs

    def _hidden(self, batch: Batch) -> Tensor:
        """Return the last hidden states [units, h] of the units of `batch`, in the compute dtype."""
        label_positions = batch.label_positions.to(self.device, non_blocking=True)
        hidden: Tensor = self.base.base_model(**self.inputs(batch)).last_hidden_state
        assert self.head is not None
        return in_head_dtype(hidden.flatten(0, 1)[label_positions], self.head.layer)

    def _find_head(self) -> OutputHead | None:
        """Return the head, if logits are a known function of head(last hidden state): compared exactly, on two tokens.

        None for a model that does something else: it computes its logits itself, of all units at once.
        """
        layer = self.base.get_output_embeddings()
        if layer is None or self.base.base_model is self.base:
            return None
        ids = torch.tensor([0, 1])
        inputs = self.inputs(Batch(ids[None], ids[None], None, (2,), ids[:0], ids[:0], ()))
        training = self.base.training
        self.base.eval()
        try:
            with torch.no_grad():
                logits = self.base(**inputs).logits
                hidden = in_head_dtype(self.base.base_model(**inputs).last_hidden_state, layer)
                before = layer(hidden)
            with torch.enable_grad():
                trained = leaves_of(layer(hidden.detach()))
        finally:
            self.base.train(training)
        for function in logit_functions(self.base.config):
            if torch.equal(logits, function(before)):
                plain = is_plain_linear(layer) and not trained and torch.equal(logits, before)
                return OutputHead(layer, function, logits.shape[-1], plain, trained)
        return None


def in_head_dtype(hidden: Tensor, head: nn.Module) -> Tensor:
    """Return hidden states in the dtype of the head, if its weights have 16 bits and they have 32.

    State-space models keep the sum over their layers in fp32, and convert it for the head.
    """
    weight = getattr(head, "weight", None)
    if hidden.dtype == torch.float32 and isinstance(weight, Tensor) and weight.dtype in (torch.bfloat16, torch.float16):
        return hidden.to(weight.dtype)
    return hidden


class NEFTuneNoise:
    """Uniform noise on the embeddings of each row while training (NEFTune, Jain et al., arXiv:2310.05914, section 2).

    The noise is alpha/sqrt(L·d) for a row of L tokens and d dimensions, for each row separately in packed batches.
    """

    def __init__(self, alpha: float, model: PreTrainedModel) -> None:
        self.alpha = alpha
        self.lengths: tuple[int, ...] = ()  # tokens of each row of the next batch
        self._handle = model.get_input_embeddings().register_forward_hook(self._add)

    def remove(self) -> None:
        """Remove the hook from the embeddings."""
        self._handle.remove()

    def _add(self, layer: nn.Module, _: Any, output: Tensor) -> Tensor:
        """Return `output` [rows, length, width] with noise, in its dtype."""
        if not layer.training:
            return output
        sizes = torch.tensor(self.lengths, dtype=torch.float32)
        if output.shape[0] == 1 and output.shape[1] == sum(self.lengths):  # packed
            sizes = sizes.repeat_interleave(sizes.long())[None]
        else:
            sizes = sizes[:, None].expand(output.shape[:2])
        sizes = to_device(sizes, output.device)
        noise = torch.empty_like(output, dtype=torch.float32).uniform_(-1, 1)
        return output + (noise * (self.alpha / math.sqrt(output.shape[-1])) * sizes.rsqrt()[..., None]).to(output.dtype)


def model_inputs(model: PreTrainedModel, batch: Batch, *, task: TaskName = "causal-lm") -> dict[str, Any]:
    """Return the keyword arguments of the forward of `model` for `batch`, row boundaries included, on its device."""
    device = model.get_input_embeddings().weight.device
    inputs: dict[str, Any] = {"input_ids": batch.input_ids.to(device, non_blocking=True)}
    inputs |= {name: tensor.to(device, non_blocking=True) for name, tensor in batch.extra.items()}
    if task == "causal-lm":
        inputs["position_ids"] = batch.position_ids.to(device, non_blocking=True)
    if task in ("causal-lm", "seq2seq-lm"):
        inputs["use_cache"] = False
    if batch.attention_mask is not None and (task == "causal-lm" or len(set(batch.lengths)) > 1):
        # Without padding, the models of other tasks need no mask, and do not read it to know that.
        mask = batch.attention_mask.to(device, non_blocking=True)
        inputs["attention_mask"] = mask if task == "causal-lm" else mask.long()
    elif task == "causal-lm":
        inputs |= _row_borders(model, batch.lengths, device)
    return inputs


def _row_borders(model: PreTrainedModel, lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Return what the attention and the stateful layers of `model` need to keep packed rows of `lengths` apart.

    Flash attention of transformers and the kernels of state-space, linear-attention and convolution layers get
    `cu_seq_lens_q` and `cu_seq_lens_k`, int32 [rows + 1], and the largest length as a Python int: without them, every
    layer would find the rows anew, and wait for the device. `seq_idx` is int32 [1, tokens], the number of each token's
    row.
    """
    attention = model.config._attn_implementation
    if attention == packed_attention.PACKED_ATTENTION:
        return {"row_plan": packed_attention.plan_rows(lengths, device), **_borders_of_states(model, lengths, device)}
    if attention == varlen_attention.VARLEN_ATTENTION:
        bounds = varlen_attention.row_bounds(lengths, device)
        return {"row_bounds": bounds, **_borders_of_states(model, lengths, device)}
    flash = len(lengths) > 1 and varlen_attention.is_flash(attention)
    borders = _flash_borders(lengths, device) if flash else {}
    return borders | _borders_of_states(model, lengths, device)


def _borders_of_states(model: PreTrainedModel, lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    if len(lengths) == 1 or not stateful_layers(model.config):
        return {}
    rows = torch.tensor(lengths)
    numbers = torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32), rows)[None]
    return {"seq_idx": to_device(numbers, device), **_flash_borders(lengths, device)}


def _flash_borders(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    starts, longest = varlen_attention.row_bounds(lengths, device)
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def unit_logits(model: PeftModel | PreTrainedModel, inputs: dict[str, Any], batch: Batch, *, task: TaskName) -> Tensor:
    """Return logits [units, vocabulary or labels] of the units of `batch`, in the model's dtype.

    Args:
        model: the base, with or without an adapter in its modules; a PeftModel only if it adds virtual tokens.
        inputs: keyword arguments of its forward, on its device.
        batch: with the positions of the units.
        task: of the model.
    """
    if task == "causal-lm" and not isinstance(model, PeftModel):
        return logits_at(model, inputs, batch.label_positions)
    positions = to_device(batch.label_positions, inputs["input_ids"].device)
    output = virtual_tokens.forward(model, inputs) if isinstance(model, PeftModel) else model(**inputs)
    logits: Tensor = output.logits
    if task == "seq-cls":
        return logits
    # Virtual tokens before the row have outputs too: they are cut off.
    tokens = inputs.get("decoder_input_ids", inputs["input_ids"])
    return logits[:, -tokens.shape[1] :].flatten(0, 1)[positions]


def logits_at(model: PreTrainedModel, inputs: dict[str, Any], positions: Tensor) -> Tensor:
    """Return logits [n, vocabulary], in the model's dtype, at positions of the flattened batch: int64 [n], on the CPU.

    The model's own head computes them, only for the columns of the batch with a position if the model's forward
    supports that.
    """
    device = inputs["input_ids"].device
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        logits: Tensor = model(**inputs).logits.flatten(0, 1)
        return logits[to_device(positions, device)]
    width = inputs["input_ids"].shape[1]
    # On the CPU: a GPU does not know the number of columns without a wait.
    columns, column = (positions % width).unique(return_inverse=True)
    kept: Tensor = model(**inputs, logits_to_keep=to_device(columns, device)).logits
    return kept[to_device(positions // width, device), to_device(column, device)]
