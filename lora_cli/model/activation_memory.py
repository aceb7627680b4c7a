"""Estimate what a forward pass in training saves for its backward pass, in bytes per token, from the model's modules.

Rules, for a decoder layer that is trained through with a frozen base; a test compares them with what autograd saves:

- A layer with LoRA saves its input once, in common with the layers that multiply the same tensor, and x·Aᵀ; on the CPU
  the positions of dropped elements too. A frozen layer saves nothing. Layers that are not fused save copies.
- A norm that computes in fp32 saves its input in fp32, torch's LayerNorm in the dtype of the model.
- Attention saves q, k and v; by matrix products also its probabilities; a flash kernel its output and a log-sum-exp.
- An MLP as one step saves what `fused_mlp.values_kept` says. Otherwise it saves the input and the output of its
  activation function, and the factor that a gate is multiplied with. Each of the k experts of a token saves a copy of
  its input and output, too.

Kernels of liger-kernel save less for norms, and compiled layers may: there the estimate is too large.

Korthikanti et al. (arXiv:2205.05198, section 4.1) count full training in the same way.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PretrainedConfig
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from lora_cli.model.experts import expert_weights
from lora_cli.model.fused_lora import SHARED, is_fusable
from lora_cli.model.fused_mlp import KIND, MlpKind, values_kept
from lora_cli.model.packed_attention import LONG_ROW
from lora_cli.model.weight_memory import text_layers

FP32 = 4  # bytes
INT64 = 8  # bytes of the position of a dropped element
# Values per input that activation functions save: some are written out in Python, and those not listed save one.
ACTIVATION_VALUES: dict[type[nn.Module], int] = {NewGELUActivation: 4, nn.ReLU: 0}


class TrainingSetup(NamedTuple):
    """What decides, besides the model, how much is saved."""

    dtype: torch.dtype  # of activations
    packed: bool  # rows are packed, not padded
    on_cpu: bool
    scores: int  # of `score_width`
    fused: bool = True  # layers with LoRA run as one step: not over int8 weights, or in another dtype than the model's


def score_width(lengths: Iterable[int]) -> int:
    """Return the most keys whose probabilities a token of packed rows saves, from the tokens of each row.

    `packed_attention.py` multiplies the matrices of short rows only.
    """
    return max((int(length) for length in lengths if length <= LONG_ROW), default=0)


class ActivationBytes(NamedTuple):
    """Bytes of saved tensors for each token of a batch."""

    layers: tuple[int, ...]  # of each decoder layer
    layer_input: int  # of the input of a layer, which is all that a recomputed layer saves
    outside: int  # of the parts around the layers
    temporary: int  # of the largest tensors that exist only while one layer runs backward
    fixed: int = 0  # bytes that do not depend on tokens: see `_dense_expert_bytes`

    def saved(self, *, every: int | None = None, offload: bool = False) -> int:
        """Return the bytes per token on the device at the peak.

        That is the begin of the backward pass, or the moment when a layer is computed again: what later layers have
        saved is freed by then.

        Args:
            every: of how many layers one is recomputed; None: none is. transformers recomputes the first of each group.
            offload: the inputs of recomputed layers wait in host memory, all but two that are on their way.
        """
        held = self.outside + (min(2, len(self.layers)) * self.layer_input if offload else 0)
        peak = 0
        for number, layer in enumerate(self.layers):
            recomputed = every is not None and number % every == 0
            peak = max(peak, held + self.layer_input + layer) if recomputed else peak
            held += layer if not recomputed else 0 if offload else self.layer_input
        return max(peak, held)

    def offloaded(self, *, every: int) -> int:
        """Return the bytes per token of the inputs that wait in host memory."""
        return self.layer_input * len(self.layers[::every])


def activation_bytes(model: PeftModel, setup: TrainingSetup) -> ActivationBytes:
    """Estimate the saved tensors of `model`, which may be on the meta device."""
    base = model.get_base_model()
    config: PretrainedConfig = base.config.get_text_config()
    hidden, itemsize = config.hidden_size, setup.dtype.itemsize
    layers = list(text_layers(base).values()) or [base]
    counted = [_Layer(layer, config, setup) for layer in layers]
    head = _attention_sizes(config).key
    return ActivationBytes(
        layers=tuple(each.saved() for each in counted),
        layer_input=itemsize * hidden,
        # Cosine and sine of positions, the input of the last norm, and the gradient of the hidden states.
        outside=2 * itemsize * head + (FP32 + itemsize) * hidden,
        temporary=max(each.temporary() for each in counted),
        fixed=_dense_expert_bytes(base, itemsize),
    )


class _AttentionSizes(NamedTuple):
    """Values of a token in attention."""

    heads: int
    key_heads: int  # as the config has them; k may have fewer values
    key: int  # values of a query or key in each head
    value: int  # values of a value in each head

    @property
    def q(self) -> int:
        return self.heads * self.key


def _number(config: PretrainedConfig, *names: str) -> int:
    """Return the first of these keys of `config` that is set, 0 if none is; of numbers for each layer, the largest."""
    values = (getattr(config, name, None) for name in names)
    return next((int(max(value) if isinstance(value, (list, tuple)) else value) for value in values if value), 0)


def _attention_sizes(config: PretrainedConfig) -> _AttentionSizes:
    heads = _number(config, "num_attention_heads") or 1
    head = _number(config, "head_dim") or config.hidden_size // heads
    if getattr(config, "kv_lora_rank", None):  # multi-head latent attention: each head has its own keys
        return _AttentionSizes(heads, heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim)
    return _AttentionSizes(heads, _number(config, "num_key_value_heads") or heads, head, head)


class _Layer:
    """A decoder layer, of which several counts are taken."""

    def __init__(self, layer: nn.Module, config: PretrainedConfig, setup: TrainingSetup) -> None:
        self._modules, self._config, self._setup = dict(_parts(layer)), config, setup
        self._item, self._hidden = setup.dtype.itemsize, int(config.hidden_size)
        self._sizes = _attention_sizes(config)
        found = ((module, _mlp_layers(module, self._hidden)) for module in self._modules.values())
        self._mlps = [_Mlp(module, layers, setup) for module, layers in found if layers]
        self._has_attention = any(_is_attention(module) for module in self._modules.values())
        self._experts = bool(expert_weights(layer))

    def saved(self) -> int:
        """Return the saved bytes per token."""
        total = self._norms() + sum(mlp.saved() for mlp in self._mlps) - self._shared_inputs()
        total += self._attention() if self._has_attention else self._mixer()
        return total + self._adapters() + self._expert_values() * self._item

    def temporary(self) -> int:
        """Return the bytes per token of what exists in the backward pass of the MLP, or of attention, only."""
        widths = [mlp.width for mlp in self._mlps]
        if self._experts:
            widths.append(self._experts_of_token() * self._expert_width())
        attention = 2 * self._projected()
        if self._by_products():
            attention += 2 * self._sizes.heads * self._setup.scores
        return self._item * (2 * self._hidden + max(4 * max(widths, default=0), attention))

    def _norms(self) -> int:
        total = 0
        for path, module in self._modules.items():
            kind = type(module).__name__
            if not kind.endswith("Norm"):
                continue
            weight = getattr(module, "weight", None)
            size = self._hidden if weight is None else weight.shape[-1]
            name = path.rpartition(".")[2]
            if weight is not None and weight.ndim == 1 and size == self._sizes.key and size != self._hidden:
                size *= self._sizes.heads if name.startswith("q") else self._sizes.key_heads
            # Norms in Python save the centered values too, if they are centered.
            copies = 2 if "LayerNorm" in kind and not isinstance(module, nn.LayerNorm) else 1
            total += size * (self._item if isinstance(module, nn.LayerNorm) else FP32) * copies
        return total

    def _shared_inputs(self) -> int:
        """Return the bytes that are counted twice where attention and MLP run side by side on the same input."""
        parallel = any(getattr(self._config, key, False) for key in ("use_parallel_residual", "parallel_attn"))
        norms = sum(
            type(module).__name__.endswith("Norm") and "." not in path for path, module in self._modules.items()
        )
        return self._item * self._hidden if parallel or norms == 1 else 0

    def _projected(self) -> int:
        """Return the values of q, k and v: the outputs of the layers of attention, without its last one."""
        if getattr(self._config, "kv_lora_rank", None):  # which has more layers than these
            return self._sizes.q + self._sizes.heads * (self._sizes.key + self._sizes.value)
        return max(0, sum(map(_outputs, self._linear(attention=True))) - self._hidden)

    def _attention(self) -> int:
        sizes, item, values = self._sizes, self._item, self._projected()
        output = sizes.heads * sizes.value
        if self._by_products():
            return item * (values + max(sizes.heads * self._setup.scores, output))
        if not self._setup.packed:  # with a mask, torch's function gets as many key heads as query heads
            values = sizes.q + sizes.heads * (sizes.key + sizes.value)
        linear = self._linear(attention=True)
        if any(_outputs(module) == values for module in linear):  # v is a part of a tensor that q and k were parts of
            values += sizes.q + (values - sizes.q) // 2
        # The output is the input of the last layer, and counts there if that has an adapter.
        adapted = (module for module in linear if isinstance(module, BaseTunerLayer))
        counted = any(_inputs(module) == output and _outputs(module) == self._hidden for module in adapted)
        return item * (values + (0 if counted else output)) + FP32 * sizes.heads

    def _by_products(self) -> bool:
        """Whether packed rows are multiplied in groups, see `packed_attention.py`."""
        return self._setup.packed and (self._setup.on_cpu or self._setup.dtype.itemsize == FP32)

    def _mixer(self) -> int:
        """Return a rough count of a layer that mixes tokens in another way, such as a state-space model."""
        return FP32 * 4 * sum(_outputs(module) for module in self._linear(attention=True))

    def _linear(self, *, attention: bool) -> list[nn.Module]:
        """Return the linear layers of attention (or of what is in its place), or those of MLPs."""
        inside = {id(module) for mlp in self._mlps for module in mlp.layers}
        return [m for m in self._modules.values() if _is_linear(m) and (id(m) in inside) is not attention]

    def _adapters(self) -> int:
        setup, item = self._setup, self._item
        last_of_step = {id(mlp.layers[-1]) for mlp in self._mlps if mlp.kept is not None}
        step_of = {id(layer): id(mlp) for mlp in self._mlps if mlp.kept is not None for layer in mlp.layers}
        total, seen = 0, set()
        for module in self._modules.values():
            if not isinstance(module, BaseTunerLayer) or not _is_linear(module):
                continue
            lora: Any = module
            width = _inputs(module)
            if not (setup.fused and is_fusable(module)):
                total += self._unfused(lora)
                continue
            (name,) = lora.active_adapters
            total += item * int(lora.r[name])
            dropout = lora.lora_dropout[name]
            if isinstance(dropout, nn.Dropout) and setup.on_cpu:
                total += int(INT64 * dropout.p * width)
            source = step_of.get(id(module)) or id(module.__dict__.get(SHARED, module))
            if lora.lora_A[name].weight.requires_grad and source not in seen and id(module) not in last_of_step:
                seen.add(source)
                total += item * width
        return total

    def _unfused(self, layer: Any) -> int:
        """Return the bytes of a layer that runs as PEFT has it: its input, and results that a factor is trained for."""
        plain = isinstance(layer, LoraLayer) and not layer.lora_variant
        dropout = any(isinstance(each, nn.Dropout) for each in getattr(layer, "lora_dropout", {}).values())
        values = _inputs(layer) * (2 if dropout else 1) + (0 if plain else 2 * _outputs(layer))
        return self._item * values

    def _expert_values(self) -> int:
        if not self._experts:
            return 0
        return self._experts_of_token() * (2 * self._hidden + 4 * self._expert_width())

    def _experts_of_token(self) -> int:
        return _number(self._config, "num_experts_per_tok", "moe_topk") or 1

    def _expert_width(self) -> int:
        return _number(self._config, "moe_intermediate_size", "intermediate_size")


class _Mlp:
    """An MLP: a module with layers that multiply its input, and one that multiplies what is made of their outputs."""

    def __init__(self, module: nn.Module, layers: list[nn.Module], setup: TrainingSetup) -> None:
        self._module, self._item = module, setup.dtype.itemsize
        self.layers = layers  # the last one multiplies what is made of the outputs of the others
        self.width = _inputs(layers[-1])
        self.kept = values_kept(module) if setup.fused else None

    def saved(self) -> int:
        """Return the saved bytes per token, without the inputs of adapted layers."""
        if self.kept is not None:
            return self._item * self.kept * self.width
        gated = sum(map(_outputs, self.layers[:-1])) >= 2 * self.width
        kinds = map(type, self._module.children())
        activation = next((ACTIVATION_VALUES[kind] for kind in kinds if kind in ACTIVATION_VALUES), 1)
        return self._item * self.width * (activation + (2 if gated else 0))


def _parts(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules inside `module` by path, itself included; those of adapted and of expert layers are not."""
    yield path, module
    if not isinstance(module, BaseTunerLayer) and not _is_linear(module):
        for name, child in module.named_children():
            yield from _parts(child, f"{path}.{name}" if path else name)


def _is_linear(module: nn.Module) -> bool:
    layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return isinstance(layer, (nn.Linear, Conv1D)) or hasattr(layer, "in_features")


def _inputs(module: nn.Module) -> int:
    layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return int(layer.nx if isinstance(layer, Conv1D) else layer.in_features)


def _outputs(module: nn.Module) -> int:
    layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return int(layer.nf if isinstance(layer, Conv1D) else layer.out_features)


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()


def _mlp_layers(module: nn.Module, hidden: int) -> list[nn.Module]:
    """Return the layers of an MLP, one or two from the hidden states to a width, and last one back; else none."""
    layers = [child for child in module.children() if _is_linear(child)]
    if KIND in module.__dict__:
        kind: MlpKind = module.__dict__[KIND][0]
        return [getattr(module, name) for name in (*kind.wide, kind.last)]
    back = [layer for layer in layers if _inputs(layer) != hidden and _outputs(layer) == hidden]
    if _is_attention(module) or len(layers) not in (2, 3) or len(back) != 1:
        return []
    wide = [layer for layer in layers if layer is not back[0]]
    return [*wide, *back] if all(_inputs(layer) == hidden for layer in wide) else []


def _dense_expert_bytes(model: nn.Module, itemsize: int) -> int:
    """Return the bytes of W + scale·BA in fp32 and in the compute dtype, and of its gradient.

    Only experts with a forward function of their own need them, one layer at a time: see `experts_lora.py`.
    """
    own = [w.shape.numel() for w in expert_weights(model).values() if not hasattr(w.module, "has_gate")]
    return max(own, default=0) * (FP32 + FP32 + 2 * itemsize)
