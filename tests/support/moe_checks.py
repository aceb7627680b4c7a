"""Checks that transformers, PEFT and bitsandbytes treat stacked expert weights as `lora_cli` needs."""

from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import transformers_weight_conversion
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import Bnb4bitQuantize, Bnb8bitQuantize
from transformers.quantizers import auto, quantizer_bnb_4bit, quantizer_bnb_8bit

from lora_cli.model.quantize_experts import ExpertsQuantizer, Int8Quantizer
from tests.model import zoo

NAMES = [f"model.layers.0.mlp.experts.{last}" for last in ("down_proj", "gate_up_proj")]


def qwen_moe() -> Any:
    options = {"num_experts": 2, "moe_intermediate_size": 32, "head_dim": 16, "num_experts_per_tok": 2}
    config = AutoConfig.for_model("qwen3_moe", **{**zoo.COMMON, **options, "num_hidden_layers": 1})
    return AutoModelForCausalLM.from_config(config)


def names_read_as_experts() -> None:
    tables = transformers_weight_conversion
    kind = tables._MODEL_TO_CONVERSION_PATTERN["deepseek_v3"]
    assert kind == tables._MODEL_TO_CONVERSION_PATTERN["qwen3_moe"]
    assert "qwen2_moe" not in tables._MODEL_TO_CONVERSION_PATTERN
    assert tables._MOE_TARGET_MODULE_MAPPING[kind]["up_proj"] == "gate_up_proj"
    assert "gate_up_proj" in tables._MOE_FUSED_TARGETS[kind]


def parameter_layer() -> None:
    """The first parameter of a module is the inner layer, and its factors stack those of the experts."""
    model = qwen_moe()
    config = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=NAMES)
    base = get_peft_model(model, config).get_base_model()
    outer = base.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(outer, ParamWrapper)
    assert (outer.parameter_name, outer.base_layer.parameter_name) == ("down_proj", "gate_up_proj")
    assert type(outer).__name__ == "ParamWrapper"  # compared as a string by PEFT and by lora_cli
    assert outer.num_experts == 2
    assert outer._did_swap_in_out_features is True
    for factor in (outer.lora_A, outer.lora_B):
        torch.nn.init.normal_(factor["default"].weight)
    a = outer.lora_A["default"].weight.reshape(2, 3, 32)
    b = outer.lora_B["default"].weight.reshape(64, 3, 2)
    expected = outer.scaling["default"] * torch.stack([b[:, :, e] @ a[e] for e in range(2)])
    assert torch.allclose(outer.get_delta_weight("default"), expected, atol=1e-5)
    entered = []
    outer._activate_lora = lambda adapters: entered.append(adapters) or torch.no_grad()
    model(torch.arange(3, 9)[None])
    assert entered == [["default"]]


def experts_module() -> None:
    """The decorator of experts sets the facts that their forward function needs."""
    experts = qwen_moe().model.layers[0].mlp.experts
    assert (experts.has_gate, experts.has_bias, experts.is_transposed, experts.num_experts) == (True, False, False, 2)
    gate_up = torch.randn(3, 64)
    assert torch.equal(experts._apply_gate(gate_up), experts.act_fn(gate_up[:, :32]) * gate_up[:, 32:])
    gpt_oss = zoo.make("gpt-oss", num_hidden_layers=1).model.layers[0].mlp.experts
    assert (gpt_oss.has_gate, gpt_oss.has_bias, gpt_oss.is_transposed) == (True, True, True)
    assert gpt_oss.gate_up_proj_bias.shape == (4, 256)


def four_bit_loader() -> None:
    """4-bit models are loaded by the quantizer in the table, whose operation gets parameters by their full names."""
    assert issubclass(ExpertsQuantizer, quantizer_bnb_4bit.Bnb4BitHfQuantizer)
    for method in (
        "_process_model_before_weight_loading", "_process_model_after_weight_loading", "get_quantize_ops",
        "param_needs_quantization",
    ):  # fmt: skip
        assert callable(getattr(quantizer_bnb_4bit.Bnb4BitHfQuantizer, method))
    assert callable(Bnb4bitQuantize.convert)
    previous = auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    try:
        auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = ExpertsQuantizer
        quantizer = auto.AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True))
    finally:
        auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = previous
    assert isinstance(quantizer, ExpertsQuantizer)
    assert quantizer.pre_quantized is True
    assert quantizer.quantization_config.bnb_4bit_quant_storage == torch.uint8


def eight_bit_loader() -> None:
    """8-bit models are loaded by the quantizer in the table, whose operation gets parameters by their full names."""
    assert issubclass(Int8Quantizer, quantizer_bnb_8bit.Bnb8BitHfQuantizer)
    assert callable(quantizer_bnb_8bit.Bnb8BitHfQuantizer.get_quantize_ops)
    assert callable(Bnb8bitQuantize.convert)
    assert "bitsandbytes_8bit" in auto.AUTO_QUANTIZER_MAPPING


def four_bit_parts() -> None:
    """A part of the codes and scales of a flattened weight is that part of the weight."""
    weight = torch.randn(4 * 64 * 2)
    for double in (True, False):
        codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
        scales = state.absmax
        if state.nested:
            scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
        part = bnb.functional.QuantState(
            absmax=scales[2:4].float(), shape=torch.Size((128,)), code=state.code, blocksize=state.blocksize,
            quant_type=state.quant_type, dtype=torch.float32,
        )  # fmt: skip
        full = bnb.functional.dequantize_4bit(codes, state).flatten()
        assert torch.equal(bnb.functional.dequantize_4bit(codes.view(-1, 1)[64:128], part).flatten(), full[128:256])


def product_of_experts() -> None:
    """The documented function calls it, so that a mode for functions of torch sees it."""
    called = []

    class Calls(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func)
            return func(*args, **(kwargs or {}))

    x, weights = torch.ones(3, 8), torch.ones(2, 8, 4)
    with Calls():
        product = torch.nn.functional.grouped_mm(x, weights, offs=torch.tensor([1, 3], dtype=torch.int32))
    assert torch._grouped_mm in called
    assert torch.equal(product, x @ weights[0])
