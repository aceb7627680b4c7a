"""Quantize experts while transformers loads a checkpoint: each stacked weight is packed in 4 bits when it is read.

transformers' own bitsandbytes quantizer replaces linear layers only, and of these not Falcon's, which have a class of
their own. This one also packs the stacked weights of experts, one parameter at a time: a weight in 16 bits is freed
before the next one is read. The quantizers for 4 and 8 bits also note weights that are not finite, which their codes no
longer show, and leave the heads of classifiers as they are.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.bitsandbytes import Bnb4bitQuantize, Bnb8bitQuantize
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from lora_cli.model import experts, experts_lora
from lora_cli.model.finite import is_finite


class ExpertsQuantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]  # no types
    """transformers' 4-bit quantizer, which packs the stacked weights of experts too."""

    packable: frozenset[str] = frozenset()  # full names of the expert weights to pack
    not_finite: tuple[str, ...] = ()  # full names of the weights that are NaN or infinite in the checkpoint

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Return whether a parameter of the model is quantized when it is read."""
        return param_name in self.packable or bool(super().param_needs_quantization(model, param_name, **kwargs))

    def _process_model_before_weight_loading(self, model: PreTrainedModel, device_map: Any, **kwargs: Any) -> None:
        as_plain_layers(model)
        if not self.pre_quantized:
            self.quantization_config.llm_int8_skip_modules = unquantized_modules(model)
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        if not self.pre_quantized:
            self.packable = frozenset(packable_weights(model))

    def get_quantize_ops(self) -> "PackOnLoad":
        """Return the operation that quantizes one parameter."""
        return PackOnLoad(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        experts.remove_placeholders(model)
        for weight in experts.expert_weights(model).values():
            if weight.packed:
                experts_lora.run_with_factors(weight.module)
        loaded: PreTrainedModel = super()._process_model_after_weight_loading(model, **kwargs)
        return loaded


class PackOnLoad(Bnb4bitQuantize):  # type: ignore[misc]  # no types
    """Operation of transformers' loader: quantize a linear layer as it does, and pack a stacked expert weight."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        """Return the quantized parameters of `input_dict`, by full name; of a packed one, its placeholder."""
        model: nn.Module = kwargs["model"]
        config = self.hf_quantizer.quantization_config
        linear, converted = {}, {}
        for name, value in input_dict.items():
            weight: Tensor = value[0] if isinstance(value, list) else value
            _note_not_finite(self.hf_quantizer, name, weight)
            if name not in self.hf_quantizer.packable:
                linear[name] = value
                continue
            owner, _, parameter = name.rpartition(".")
            module = model.get_submodule(owner)
            packed = experts.PackedWeight(
                weight,
                quant_type=config.bnb_4bit_quant_type,
                double_quant=config.bnb_4bit_use_double_quant,
                compute_dtype=config.bnb_4bit_compute_dtype,
                storage=config.bnb_4bit_quant_storage,
            )
            experts.pack(module, parameter, packed)
            converted[name] = module._parameters[parameter]
        return {**converted, **super().convert(linear, **kwargs)}


class Int8Quantizer(Bnb8BitHfQuantizer):  # type: ignore[misc]  # no types
    """transformers' 8-bit quantizer, which notes weights that are not finite."""

    not_finite: tuple[str, ...] = ()  # as in `ExpertsQuantizer`

    def _process_model_before_weight_loading(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        as_plain_layers(model)
        if not self.pre_quantized:
            self.quantization_config.llm_int8_skip_modules = unquantized_modules(model)
        super()._process_model_before_weight_loading(model, *args, **kwargs)

    def get_quantize_ops(self) -> "Int8OnLoad":
        """Return the operation that quantizes one parameter."""
        return Int8OnLoad(self)


class Int8OnLoad(Bnb8bitQuantize):  # type: ignore[misc]  # no types
    """Operation of transformers' loader: quantize a linear layer to 8 bits."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        """Return the quantized parameters of `input_dict`, by full name."""
        for name, value in input_dict.items():
            _note_not_finite(self.hf_quantizer, name, value[0] if isinstance(value, list) else value)
        quantized: dict[str, Tensor] = super().convert(input_dict, **kwargs)
        return quantized


def unquantized_modules(model: PreTrainedModel) -> list[str]:
    """Return the modules that stay as they are: the output head, tied weights, and a classifier's head and pooler.

    transformers leaves out the last layer of a classifier alone, or none if that has a bias. The others are new where
    the checkpoint is of a language model: there are no weights to quantize, and they are trained in full.
    """
    names: list[str] = get_keys_to_not_convert(model)
    if model.get_output_embeddings() is None:
        names += [name for name, _ in model.named_children() if name != model.base_model_prefix]
        names += [name for name, _ in model.named_modules() if name.endswith(".pooler")]
    return names


def as_plain_layers(model: nn.Module) -> None:
    """Make Falcon's linear layers plain ones: they differ in rounding, and transformers quantizes plain ones only."""
    for module in model.modules():
        if type(module) is FalconLinear:
            module.__class__ = nn.Linear


def _note_not_finite(quantizer: Any, name: str, weight: Tensor) -> None:
    # transformers catches what an operation raises, and loads the next parameter.
    if not is_finite(weight):
        quantizer.not_finite = (*quantizer.not_finite, name)


def packable_weights(model: nn.Module) -> list[str]:
    """Return the full names of the stacked expert weights that 4-bit loading packs."""
    return [name for name, weight in experts.expert_weights(model).items() if experts.is_packable(weight.shape)]


def register_quantizers() -> None:
    """Have transformers load 4-bit models with `ExpertsQuantizer`, and 8-bit models with `Int8Quantizer`."""
    AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = ExpertsQuantizer
    AUTO_QUANTIZER_MAPPING["bitsandbytes_8bit"] = Int8Quantizer
