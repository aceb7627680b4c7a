"""The loss where there is a label, and nowhere else: logits are never computed for unsupervised tokens.

The output head and the loss are one step, a few hundred tokens at a time, so that the [tokens, vocabulary] matrix,
often the largest tensor of a training step, never exists as a whole, and its gradient overwrites it in place.
"""

import inspect
import math
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.data.collate import Batch
from lora_cli.model import packed_attention
from lora_cli.recipe.tasks import TaskName

CHUNK_TOKENS = 256  # supervised tokens whose logits exist at once


class BatchLoss(NamedTuple):
    """What a model makes of one batch; its units are supervised tokens, labelled words or rows (`model/tasks.py`)."""

    loss: Tensor  # scalar fp32: nats, or squared error of a regression, summed over the units
    correct: Tensor  # scalar int64: units whose most likely label was the right one; none of a regression
    tokens: int  # units


class LossFunction:
    """Loss and hits of batches under one model; knows whether the model's head is a plain linear layer.

    Differentiable in the adapter where gradients are enabled. The adapter that is active at the call is the one
    that counts.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        *,
        task: TaskName = "causal-lm",
        label_smoothing: float = 0.0,
        neftune_alpha: float | None = None,
    ) -> None:
        """`label_smoothing` and `neftune_alpha` are for the steps of training alone."""
        self.base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
        self.task = task
        self.device = self.base.get_input_embeddings().weight.device
        # Virtual tokens are put before a row by PEFT's own forward; other adapters are part of the base's.
        prompted = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
        self._prompted: PeftModel | None = model if prompted and isinstance(model, PeftModel) else None
        self.plain_head = task == "causal-lm" and not prompted and self._has_plain_head()
        self._smoothing = label_smoothing
        self._noise = NEFTuneNoise(neftune_alpha, self.base) if neftune_alpha else None

    def __call__(self, batch: Batch) -> BatchLoss:
        """Sums over the units of `batch`; all zero if it has none."""
        if self._noise:
            self._noise.lengths = batch.lengths
        targets = batch.targets.to(self.device)
        if self.plain_head:
            predict, inputs = batch.label_positions.to(self.device), self.inputs(batch)
            hidden = self.base.base_model(**inputs).last_hidden_state.flatten(0, 1)[predict]
            head = self.base.get_output_embeddings()
            loss, correct = ChunkedLinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
                hidden, head.weight, head.bias, targets, self._smoothing
            )
            return BatchLoss(loss, correct, len(targets))
        # Heads that do more than multiply (caps, scales, adapters of their own) compute the logits themselves.
        losses, hits = self._loss(self.logits(batch), targets)
        return BatchLoss(losses.sum(), hits.sum(), len(targets))

    @torch.no_grad()
    def per_token(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss, fp32 [units], and whether the most likely label was the right one, bool [units], of every unit."""
        targets = batch.targets.to(self.device)
        if not self.plain_head:
            return self._loss(self.logits(batch), targets)
        predict, inputs = batch.label_positions.to(self.device), self.inputs(batch)
        hidden = self.base.base_model(**inputs).last_hidden_state.flatten(0, 1)[predict]
        head = self.base.get_output_embeddings()
        parts = zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
        judged = [self._loss(head(some), wanted) for some, wanted in parts]
        losses, hits = zip(*judged, strict=True)
        return torch.cat(losses), torch.cat(hits)

    def _loss(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
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
        """Logits [units, vocabulary or labels] at the units of `batch`, in the model's dtype."""
        predict, inputs = batch.label_positions.to(self.device), self.inputs(batch)
        if self.task == "causal-lm" and self._prompted is None:
            return logits_at(self.base, inputs, predict)
        found: Tensor = (self._prompted or self.base)(**inputs).logits
        if self.task == "seq-cls":
            return found
        # Of what stands before the row, virtual tokens have outputs too.
        read = inputs.get("decoder_input_ids", inputs["input_ids"])
        return found[:, -read.shape[1] :].flatten(0, 1)[predict]

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments of the model's forward for `batch`, row boundaries included."""
        inputs = model_inputs(self.base, batch, task=self.task)
        if self._prompted is not None:
            inputs.pop("position_ids", None)  # PEFT counts them anew
            if inputs.get("attention_mask") is None:
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return inputs

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


class NEFTuneNoise:
    """Uniform noise on the embeddings of each row while training (NEFTune, Jain et al., arXiv:2310.05914, section 2).

    Its size is alpha/sqrt(L·d) for a row of L tokens and d dimensions, of each row by itself where rows are packed.
    """

    def __init__(self, alpha: float, model: PreTrainedModel) -> None:
        self.alpha = alpha
        self.lengths: tuple[int, ...] = ()  # tokens of each row of the batch that comes
        model.get_input_embeddings().register_forward_hook(self._add)

    def _add(self, layer: nn.Module, _: Any, output: Tensor) -> Tensor:
        if not layer.training:
            return output
        sizes = torch.tensor(self.lengths, dtype=torch.float32, device=output.device)
        if output.shape[0] == 1 and output.shape[1] == sum(self.lengths):  # packed
            sizes = sizes.repeat_interleave(sizes.long())[None]
        else:
            sizes = sizes[:, None].expand(output.shape[:2])
        noise = torch.empty_like(output, dtype=torch.float32).uniform_(-1, 1)
        return output + (noise * (self.alpha / math.sqrt(output.shape[-1])) * sizes.rsqrt()[..., None]).to(output.dtype)


def model_inputs(model: PreTrainedModel, batch: Batch, *, task: TaskName = "causal-lm") -> dict[str, Any]:
    """Keyword arguments of the forward of `model` for `batch`, row boundaries included."""
    device = model.get_input_embeddings().weight.device
    inputs: dict[str, Any] = {"input_ids": batch.input_ids.to(device)}
    inputs |= {name: tensor.to(device) for name, tensor in batch.extra.items()}
    if task == "causal-lm":
        inputs["position_ids"] = batch.position_ids.to(device)
    if task in ("causal-lm", "seq2seq-lm"):
        inputs["use_cache"] = False
    if batch.attention_mask is not None:
        mask = batch.attention_mask.to(device)
        inputs["attention_mask"] = mask if task == "causal-lm" else mask.long()
    elif model.config._attn_implementation == packed_attention.PACKED_ATTENTION:
        inputs["row_plan"] = packed_attention.plan_rows(batch.lengths)
    return inputs


def logits_at(model: PreTrainedModel, inputs: dict[str, Any], places: Tensor) -> Tensor:
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


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of a frozen linear head, with d loss/d hidden = (softmax(logits) - wanted)·W per chunk.

    `wanted` is one-hot; with label smoothing e, (1 - e)·onehot + e/V (Szegedy et al., arXiv:1512.00567, section 7).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """hidden [n, h] and weight [V, h] in the compute dtype, targets int64 [n]; returns fp32 and int64 scalars."""
        precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=precise, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits = nn.functional.linear(hidden[part], weight, bias).to(precise)
            wanted = targets[part, None]
            picked = logits.gather(1, wanted)
            top, best = logits.max(dim=1, keepdim=True)
            correct += (best == wanted).sum()
            # The logit that is wanted on average, of which the loss is log-sum-exp less.
            aim = picked if not smoothing else (1 - smoothing) * picked + smoothing * logits.mean(dim=1, keepdim=True)
            # One exponential serves both the sum and the gradient: softmax = exp(z - max) / sum.
            weights = logits.sub_(top).exp_()
            total = weights.sum(dim=1, keepdim=True)
            loss += (total.log() + top - aim).sum()
            if grad is not None:
                weights.div_(total)
                if smoothing:
                    weights.sub_(smoothing / weights.shape[1])
                weights.scatter_add_(1, wanted, torch.full_like(picked, smoothing - 1.0))
                grad[part] = weights.to(weight.dtype) @ weight
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """grad_loss is the scalar that the summed loss was multiplied with."""
        (grad,) = ctx.saved_tensors
        # A 0-dim fp32 factor: the product is made in fp32, where a bf16 factor would be off by up to 0.4 %.
        return grad * grad_loss, None, None, None, None
