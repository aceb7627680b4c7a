"""Models of random weights, plain or in NF4, and random rows, for the measurements: without a download."""

import numpy as np
import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tests.gpu.cases import Base, Shape
from tests.model import zoo

SPREAD = 0.7  # of the logarithm of the lengths of rows: many short ones, few long ones
STD = 0.02  # of random weights


def config_of(shape: Shape) -> PretrainedConfig:
    """Return the configuration of the model, without that of a tokenizer."""
    config: PretrainedConfig = AutoConfig.for_model(shape.model_type, **shape.config)
    return config


def rows_of(shape: Shape, *, steps: int) -> zoo.MemoryRows:
    """Return random rows that fill about `steps` packed batches."""
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < steps * shape.tokens:
        fixed = shape.median == shape.tokens
        drawn = shape.median if fixed else int(rng.lognormal(np.log(shape.median), SPREAD))
        lengths.append(min(max(drawn, 4), shape.tokens))
    return zoo.rows_of(lengths, vocabulary=config_of(shape).vocab_size)


def matrix_parameters(shape: Shape) -> tuple[int, int]:
    """Return the weights of the linear layers that every token passes, and those of the output head."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config_of(shape))
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return sum(layer.weight.numel() for layer in layers), head.weight.numel()


def make_base(shape: Shape, base: Base, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return a frozen model of random weights on `device`, with its layers in NF4 for the base `nf4`."""
    config = config_of(shape)
    torch.manual_seed(0)
    if base == "nf4":
        return _random_nf4(config, device, dtype)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False)


def _random_nf4(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Make the weights layer by layer: the 16-bit model would need four times the memory."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            model.set_submodule(name, _random_linear4bit(module, device, dtype))
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type == "meta":
            path, _, own = name.rpartition(".")
            # Scales of norms are 1: they are the only vectors without which a random model has no output of its size.
            value = torch.ones if parameter.ndim == 1 else torch.randn
            scale = 1.0 if parameter.ndim == 1 else STD
            tensor = value(parameter.shape, device=device, dtype=dtype) * scale
            setattr(model.get_submodule(path), own, nn.Parameter(tensor, requires_grad=False))
    model.tie_weights()
    model.is_loaded_in_4bit = True  # what PEFT and bitsandbytes' preparation look for
    return model.to(device).requires_grad_(False)


def _random_linear4bit(layer: nn.Linear, device: torch.device, dtype: torch.dtype) -> Linear4bit:
    made = Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=dtype, quant_type="nf4",
        device="meta",
    )  # fmt: skip
    values = torch.randn(layer.out_features, layer.in_features, device=device, dtype=dtype) * STD
    made.weight = Params4bit(values, requires_grad=False, quant_type="nf4", module=made).to(device)
    return made
