"""Cross-entropy where there is a label, and nowhere else: logits are never computed for unsupervised tokens.

The output head and the loss are one step, a few hundred tokens at a time, so that the [tokens, vocabulary] matrix,
often the largest tensor of a training step, never exists as a whole, and its gradient overwrites it in place.
"""

import inspect
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.data.batches import Batch
from lora_cli.model import attention

CHUNK = 256  # supervised tokens whose logits exist at once


class Score(NamedTuple):
    """What a model makes of one batch."""

    loss: Tensor  # scalar fp32: nats, summed over the supervised tokens
    correct: Tensor  # scalar int64: supervised tokens that were the most likely one
    tokens: int  # supervised tokens


class Scorer:
    """Loss and hits of batches under one model; knows whether the model's head is a plain linear layer.

    Differentiable in the adapter where gradients are enabled. The adapter that is active at the call is the one
    that counts.
    """

    def __init__(self, model: PeftModel | PreTrainedModel) -> None:
        self.base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
        self.device = self.base.get_input_embeddings().weight.device
        self.plain_head = self._has_plain_head()

    def __call__(self, batch: Batch) -> Score:
        """Sums over the supervised tokens of `batch`; all zero if it has none."""
        targets = batch.targets.to(self.device)
        predict = batch.predict.to(self.device)
        inputs = self.inputs(batch)
        if self.plain_head:
            hidden = self.base.base_model(**inputs).last_hidden_state.flatten(0, 1)[predict]
            head = self.base.get_output_embeddings()
            loss, correct = HeadLoss.apply(hidden, head.weight, head.bias, targets)  # type: ignore[no-untyped-call]
            return Score(loss, correct, len(targets))
        # Heads that do more than multiply (caps, scales, adapters of their own) compute the logits themselves.
        logits = kept_logits(self.base, inputs, predict)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        return Score(loss, (logits.argmax(-1) == targets).sum(), len(targets))

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments of the model's forward for `batch`, row boundaries included."""
        return model_inputs(self.base, batch)

    def _has_plain_head(self) -> bool:
        """Whether logits are head(last hidden state) and no more: tried once, exactly, on two tokens."""
        head = self.base.get_output_embeddings()
        if type(head) is not nn.Linear or head.weight.requires_grad or self.base.base_model is self.base:
            return False
        ids = torch.tensor([0, 1])
        probe = Batch(ids[None], ids[None], None, (2,), ids[:0], ids[:0], ())
        inputs = self.inputs(probe)
        training = self.base.training
        self.base.eval()
        try:
            with torch.no_grad():
                logits = self.base(**inputs).logits
                plain = head(self.base.base_model(**inputs).last_hidden_state)
        finally:
            self.base.train(training)
        return torch.equal(logits, plain)


def model_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """Keyword arguments of the forward of `model` for `batch`, row boundaries included."""
    device = model.get_input_embeddings().weight.device
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids.to(device),
        "position_ids": batch.position_ids.to(device),
        "use_cache": False,
    }
    if batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask.to(device)
    elif model.config._attn_implementation == attention.NAME:
        inputs["row_plan"] = attention.plan_rows(batch.lengths)
    return inputs


def kept_logits(model: PreTrainedModel, inputs: dict[str, Any], places: Tensor) -> Tensor:
    """Logits [n, vocabulary] at `places` of the flattened batch, through the head as the model has it.

    The head runs over the columns of the batch that hold a place, where the model's forward can be told so.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        whole: Tensor = model(**inputs).logits.flatten(0, 1)
        return whole[places]
    width = inputs["input_ids"].shape[1]
    columns, column = (places % width).unique(return_inverse=True)
    logits: Tensor = model(**inputs, logits_to_keep=columns).logits
    return logits[places // width, column]


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of a frozen linear head, with d loss/d hidden = (softmax(logits) - onehot)·W per chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """hidden [n, h] and weight [V, h] in the compute dtype, targets int64 [n]; returns fp32 and int64 scalars."""
        precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=precise, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            logits = nn.functional.linear(hidden[part], weight, bias).to(precise)
            wanted = targets[part, None]
            picked = logits.gather(1, wanted)
            top, best = logits.max(dim=1, keepdim=True)
            correct += (best == wanted).sum()
            # One exponential serves both the sum and the gradient: softmax = exp(z - max) / sum.
            weights = logits.sub_(top).exp_()
            total = weights.sum(dim=1, keepdim=True)
            loss += (total.log() + top - picked).sum()
            if grad is not None:
                weights.div_(total)
                weights.scatter_add_(1, wanted, torch.full_like(picked, -1.0))
                grad[part] = weights.to(weight.dtype) @ weight
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """grad_loss is the scalar that the summed loss was multiplied with."""
        (grad,) = ctx.saved_tensors
        # A 0-dim fp32 factor: the product is made in fp32, where a bf16 factor would be off by up to 0.4 %.
        return grad * grad_loss, None, None, None
