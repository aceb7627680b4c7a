"""Initialize adapters: from the base's weights, from activations of training rows, or from the quantization error.

Methods that start from W (PiSSA, OLoRA, CorDA) train W - s·B₀A₀ + s·BA, starting at B = B₀, A = A₀. Here the base stays
unchanged: the layer computes W + s·(BA - B₀A₀), the same function, as one adapter of twice the rank whose second half
is constant. Nothing is rounded in the base, and the saved adapter is plain LoRA.
"""

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_cli.data.batches import BatchPlan
from lora_cli.data.collate import Batch
from lora_cli.errors import LoraError
from lora_cli.model import fp32_weights, target_modules
from lora_cli.model.adapter_context import AdapterContext
from lora_cli.model.loss import LossFunction
from lora_cli.model.sharding import gathered_weight
from lora_cli.recipe.schema import AdapterSpec

ADAPTER_NAME = "default"  # PEFT's name for the one adapter
STATISTICS_BATCHES = 16  # batches of training rows whose activations are used
CORDA_ROWS = 256  # rows of CorDA's statistics: PEFT's recommendation for a hidden size of 4,096


def add_row_scale(model: PeftModel) -> None:
    """Add a trained factor s for each output row, initially 1: W + diag(s)·BA.

    Raises:
        LoraError: an adapted layer is not linear.
    """
    for _, layer in lora_layers(model):
        fp32_weights.parametrize(layer.lora_B[ADAPTER_NAME], "weight", fp32_weights.RowScale(layer.out_features))


def init_pissa(model: PeftModel, spec: AdapterSpec, context: AdapterContext) -> None:
    """Start from the `rank` largest components of W: A₀ = √S·Vᵀ, B₀ = U·√S.

    Meng et al., arXiv:2404.02948, section 3.

    Raises:
        LoraError: an adapted layer is not linear.
    """
    for _, layer in lora_layers(model):
        u, s, vh = torch.linalg.svd(_base_weight(layer), full_matrices=False)
        _start_from(layer, *_scaled_factors(u, s, vh, layer.r[ADAPTER_NAME], layer.scaling[ADAPTER_NAME]))
    _double_ranks(model)


def init_olora(model: PeftModel, spec: AdapterSpec, context: AdapterContext) -> None:
    """Start from W = QR: B₀ = first columns of Q, A₀ = first rows of R (Büyükakyüz, arXiv:2406.01775, section 3).

    Raises:
        LoraError: an adapted layer is not linear.
    """
    for _, layer in lora_layers(model):
        q, r = torch.linalg.qr(_base_weight(layer))
        rank = layer.r[ADAPTER_NAME]
        _start_from(layer, r[:rank], q[:, :rank])
    _double_ranks(model)


def collect_corda_statistics(model: PreTrainedModel, config: LoraConfig, context: AdapterContext) -> None:
    """Have PEFT decompose W·C, with C the covariance of each layer's inputs over training rows.

    Raises:
        LoraError: the rank is larger than the number of a layer's components, or a layer needs inputs of another shape.
    """
    assert context.plan is not None
    batches = list(_single_rows(context.plan))
    loss_fn = _loss_of_whole_batches(model, context)
    corda_config = copy.copy(config)
    corda_config.corda_config = CordaConfig(corda_method="ipm")
    if corda_config.target_modules == target_modules.ALL_LINEAR:  # PEFT's preprocessing would read it as a regex
        corda_config.target_modules = list(target_modules.linear_layers(model, context.heads))
    training = model.training

    def run() -> None:
        for batch in batches:
            loss_fn(batch)

    try:
        preprocess_corda(model, corda_config, run_model=run)
    except ValueError as reason:
        if "rank mismatch" not in str(reason):
            raise
        raise LoraError(
            f"adapter.rank: {config.r} is more than the components that a layer has ({str(reason).partition(',')[0]})",
            hint="lower it, or leave such layers out of adapter.target_modules",
        ) from reason
    except IndexError as reason:
        raise LoraError(
            "adapter.method: corda needs layers with every token as input, but one gets one vector per row: a pooler",
            hint="leave it out: adapter.exclude_modules: [pooler.dense]",
        ) from reason
    model.train(training)


def init_corda(model: PeftModel, spec: AdapterSpec, context: AdapterContext) -> None:
    """Start from the components that matter most to the training rows (Yang et al., arXiv:2406.05223, section 3.2).

    Raises:
        LoraError: an adapted layer is not linear.
    """
    for _, layer in lora_layers(model):
        base = layer.get_base_layer()
        eigens = base.eigens  # set by collect_corda_statistics
        _start_from(
            layer,
            *_scaled_factors(
                eigens.U_WC, eigens.S_WC, eigens.V_WC.T, layer.r[ADAPTER_NAME], layer.scaling[ADAPTER_NAME]
            ),
        )
        del base.eigens
    _double_ranks(model)


def init_eva(model: PeftModel, spec: AdapterSpec, context: AdapterContext) -> None:
    """Start A from the principal components of each layer's inputs (Paischer et al., arXiv:2410.07170), by PEFT.

    Ranks are distributed among the layers by the variance they explain; their sum does not change.

    Raises:
        LoraError: the batches or a layer's inputs have too few vectors for the rank.
    """
    assert context.plan is not None
    assert spec.rank is not None
    config = model.peft_config[ADAPTER_NAME]
    needed = round(spec.rank * config.eva_config.rho)  # components that PEFT computes in a layer
    batches = [batch for batch in _batches(context.plan) if batch.tokens >= needed]
    if not batches:
        raise LoraError(
            f"adapter.method: eva needs batches of at least {needed} tokens, twice the rank; all batches have fewer",
            hint="lower adapter.rank, or raise data.max_length, training.tokens_per_batch or batch_size",
        )
    loss_fn = _loss_of_whole_batches(model, context)
    _check_enough_vectors(model, loss_fn, batches[0], min_vectors=needed)
    base, training = model.get_base_model(), model.get_base_model().training
    initialize_lora_eva_weights(
        model,
        dataloader=[_EvaBatch(batch) for batch in batches],
        forward_fn=lambda _, feed: loss_fn(feed.batch),
        prepare_model_inputs_fn=lambda feed, _: feed.real,
        prepare_layer_inputs_fn=_real_tokens,
        gather_distributed_inputs=False,  # every process reads the same rows
        show_progress_bar=False,
    )
    base.train(training)


def _loss_of_whole_batches(model: PeftModel, context: AdapterContext) -> LossFunction:
    """Return a loss in which every adapted layer gets all vectors of a batch at once, also an adapted head."""
    loss_fn = LossFunction(model, task=context.task)
    if loss_fn.head is not None and not loss_fn.head.plain:
        loss_fn.head = None
    return loss_fn


@torch.no_grad()
def _check_enough_vectors(model: PeftModel, loss_fn: LossFunction, batch: Batch, *, min_vectors: int) -> None:
    """Raise if a layer gets fewer than `min_vectors` input vectors in a batch: PEFT's loop would never end."""
    counts: dict[str, int] = {}

    def counter(name: str) -> Any:
        def count(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            counts[name] = inputs[0].numel() // inputs[0].shape[-1]

        return count

    hooks = [layer.register_forward_pre_hook(counter(name)) for name, layer in lora_layers(model)]
    try:
        loss_fn(batch)
    finally:
        for hook in hooks:
            hook.remove()
    few = {name: count for name, count in counts.items() if count < min_vectors}
    if few:
        name, count = next(iter(few.items()))
        raise LoraError(
            f"adapter.method: eva needs {min_vectors} vectors of a batch, twice the rank, but {name} gets {count}",
            hint=f"leave it out: adapter.exclude_modules: [{'.'.join(name.split('.')[-2:])}], or raise "
            "training.batch_size",
        )


class _EvaBatch:
    """A batch for PEFT's EVA loop, which calls `to(device)` on it; `real` is bool [positions], False at padding."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        mask = batch.attention_mask
        self.real = torch.ones(batch.input_ids.numel(), dtype=torch.bool) if mask is None else mask.flatten().bool()

    def to(self, device: torch.device) -> "_EvaBatch":
        return self


def _real_tokens(layer_inputs: Any, real: Tensor, name: str) -> Tensor:
    """Return the input vectors of a layer without those of padding, [tokens, in] fp32."""
    inputs: Tensor = layer_inputs[0] if isinstance(layer_inputs, tuple) else layer_inputs
    flat = inputs.flatten(0, -2).float().contiguous()  # a pooler's input is a slice
    return flat[real.to(flat.device)] if len(flat) == len(real) else flat


def init_loftq(model: PeftModel, spec: AdapterSpec, context: AdapterContext) -> None:
    """Start A and B as the best rank-r fit of W - Q: one step of LoftQ over bitsandbytes' codes (arXiv:2310.08659).

    Raises:
        LoraError: an adapted layer is not linear.
    """
    assert context.unquantized_weights is not None
    weights = context.unquantized_weights()
    for name, layer in lora_layers(model):
        original = weights[f"{name}.weight"].to(layer.lora_A[ADAPTER_NAME].weight.device, torch.float32)
        u, s, vh = torch.linalg.svd(original - _base_weight(layer), full_matrices=False)
        a, b = _scaled_factors(u, s, vh, layer.r[ADAPTER_NAME], layer.scaling[ADAPTER_NAME])
        layer.lora_A[ADAPTER_NAME].weight.data.copy_(a)
        layer.lora_B[ADAPTER_NAME].weight.data.copy_(b)


def init_prompt(model: PeftModel, spec: AdapterSpec, context: AdapterContext) -> None:
    """Start virtual tokens as the embeddings of `init_text`, repeated or cut to their number.

    Raises:
        LoraError: `init_text` has no token.
    """
    if spec.init_text is None:
        return
    assert context.encode is not None
    ids = context.encode(spec.init_text)
    if not ids:
        raise LoraError("adapter.init_text: it has no token", hint="write a text, or remove the key")
    weight = model.prompt_encoder[ADAPTER_NAME].embedding.weight
    rows = torch.tensor([ids[i % len(ids)] for i in range(len(weight))], device=weight.device)
    embeddings = model.get_base_model().get_input_embeddings()
    with torch.no_grad():
        weight.copy_(embeddings.weight[rows].to(weight.dtype))


def lora_layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """Yield every adapted linear layer: its name in the base, and PEFT's LoRA layer.

    Raises:
        LoraError: an adapted layer is not linear, so that nothing can be initialized from its weights.
    """
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if ADAPTER_NAME not in module.lora_A or type(module).__name__ == "ParamWrapper":
            raise LoraError(
                f"adapter.target_modules: {name} is not a linear layer, which this adapter.method needs",
                hint="name linear layers only, or choose another adapter.method",
            )
        yield name, module


def _base_weight(layer: Any) -> Tensor:
    """Return the base's weight [out, in] in fp32, dequantized if it is quantized."""
    base: nn.Module = layer.get_base_layer()
    weight = gathered_weight(base)
    weight = (dequantize_module_weight(base) if weight is None else weight).detach().float()
    return weight.T if isinstance(base, Conv1D) else weight


def _scaled_factors(u: Tensor, s: Tensor, vh: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A [r, in] and B [out, r] such that scale·BA is the first `rank` components of u·diag(s)·vh."""
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def _start_from(layer: Any, a: Tensor, b: Tensor) -> None:
    """Have `layer` train A and B from `a` [r, in] and `b` [out, r], and compute BA - ba."""
    for part, value, constant, dim in ((layer.lora_A[ADAPTER_NAME], a, a, 0), (layer.lora_B[ADAPTER_NAME], b, -b, 1)):
        weight = cast(nn.Parameter, part.weight)
        value = value.to(weight.device, weight.dtype).contiguous()
        weight.data = value
        fp32_weights.parametrize(
            part, "weight", fp32_weights.ConcatFrozen(constant.to(value.device, value.dtype).clone(), dim=dim)
        )
    layer.r[ADAPTER_NAME] *= 2
    layer.lora_alpha[ADAPTER_NAME] *= 2  # alpha/rank, the scale, does not change


def _double_ranks(model: PeftModel) -> None:
    """Set the ranks and alphas of the doubled layers in adapter_config.json."""
    config = model.peft_config[ADAPTER_NAME]
    config.r *= 2
    config.lora_alpha *= 2
    config.rank_pattern = {key: 2 * value for key, value in config.rank_pattern.items()}
    # A rank pattern without an alpha pattern uses the common alpha, which is doubled above.
    config.alpha_pattern = {key: 2 * value for key, value in config.alpha_pattern.items()}


def init_dora_magnitudes(model: PeftModel) -> None:
    """Set DoRA's magnitudes in fp32, each the norm of a row of W (Liu et al., arXiv:2402.09353, equation 5).

    With B = 0 the layer is then the base's. PEFT computes them in the base's dtype, with an error of 0.4 % in bf16.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and ADAPTER_NAME in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[ADAPTER_NAME]
            if type(magnitude) is DoraLinearLayer:
                magnitude.weight.data = torch.linalg.norm(_base_weight(layer), dim=1)


def _batches(plan: BatchPlan) -> list[Batch]:
    return [plan.make_batch(indices) for indices in plan.epoch(0)[:STATISTICS_BATCHES]]


def _single_rows(plan: BatchPlan) -> Iterator[Batch]:
    """Return the rows of the first batches as batches of one row: CorDA's statistics are over single sequences."""
    rows = [index for indices in plan.epoch(0) for index in indices][:CORDA_ROWS]
    return (plan.make_batch([index]) for index in rows)
