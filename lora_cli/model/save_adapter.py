"""Save the adapter as a plain PEFT folder, then reload the folder and compare it with the trained model."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from lora_cli.errors import LoraError
from lora_cli.model import adalora, experts, fp32_weights, sharding
from lora_cli.model.fused_lora import register_custom_layers
from lora_cli.run.redact import redact_path

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Files of a tokenizer, also those that only other tools write next to an adapter.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """Return the tensors of the PEFT adapter file by PEFT's names: detached, in the shape and dtype that is saved."""
    # Embeddings are saved if they carry an adapter. PEFT's default would also query the hub for the base, to check
    # whether the vocabulary was resized; here new tokens are saved as trained tokens.
    tensors = get_peft_model_state_dict(
        model, state_dict=fp32_weights.saved_state_dict(model), save_embedding_layers=False
    )
    return {name: tensor.detach() for name, tensor in tensors.items()}


def save_adapter(model: PeftModel, folder: Path, *, base: str, revision: str | None) -> None:
    """Write the adapter into `folder` by PEFT, with the base's name in the recipe, but no folder of this machine.

    `saved_adapter.base_path` finds the base of a run again.
    """
    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path = redact_path(base)
    config.revision = revision
    with sets_in_order(config):
        model.save_pretrained(str(folder), state_dict=fp32_weights.saved_state_dict(model), save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's model card is an empty template


@contextmanager
def sets_in_order(config: PeftConfig) -> Iterator[None]:
    """Make sets in `config`, such as target_modules, sorted lists within the block, in which PEFT saves it.

    PEFT saves a set in its own order, which is another one in each process: equal adapters would have unequal files.
    """
    sets = {name: value for name, value in vars(config).items() if isinstance(value, set)}
    for name, value in sets.items():
        setattr(config, name, sorted(value))
    try:
        yield
    finally:
        for name, value in sets.items():
            setattr(config, name, value)


def saved_names(model: PeftModel) -> dict[str, str | None]:
    """Return the adapter's parameters with their names in the adapter file; None where the file lacks the tensor.

    The file lacks factors that were multiplied into another tensor, and pruned components. Frozen parameters are listed
    only if the file contains them.
    """
    files = {(t.data_ptr(), t.shape, t.dtype): name for name, t in adapter_tensors(model).items() if t.numel()}
    names = {name: (files.get((p.data_ptr(), p.shape, p.dtype)), p) for name, p in model.named_parameters()}
    return {name: saved for name, (saved, p) in names.items() if saved is not None or p.requires_grad}


class ReloadDifference(NamedTuple):
    """Difference between the trained model and plain PEFT's model of the saved folder."""

    tensors: float  # largest, over the adapter's tensors as written and as loaded; infinite if one is missing
    logits: float  # largest, relative to the largest logit

    def check(self, dtype: torch.dtype) -> None:
        """Check that the tensors are equal, and the logits equal within rounding in `dtype`.

        Logits are equal to the bit, except for models whose kernels sum in an order that depends on memory alignment.

        Raises:
            LoraError: they are not.
        """
        if self.tensors == 0 and self.logits <= (1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5):
            return
        raise LoraError(
            "the written adapter differs from the trained one: "
            f"its tensors by {self.tensors:.3g}, logits by {self.logits:.3g} of their size",
            hint="no adapter was put in place; the last checkpoint contains the trained tensors",
            exit_code=1,
        )


@torch.no_grad()
def compare_reloaded(model: PeftModel, folder: Path, logits: Callable[[PeftModel], Tensor]) -> ReloadDifference:
    """Load `folder` by PEFT onto the base, and compare tensors and logits with those of the trained model.

    The trained adapter is destroyed: its tensors are overwritten with NaN before the folder is loaded, so that a tensor
    that the folder lacks is detected.

    Args:
        model: the trained model.
        folder: that `save_adapter` wrote.
        logits: returns the logits of some rows for a model, in any shape and floating dtype.

    Raises:
        LoraError: the folder's configuration differs from the trained adapter's.
    """
    trained, saved = (
        model.peft_config[model.active_adapter].to_dict(),
        PeftConfig.from_pretrained(str(folder)).to_dict(),
    )
    # inference_mode is set while saving, and has no effect on the weights.
    differing = [k for k in trained if k != "inference_mode" and _json_value(trained[k]) != _json_value(saved.get(k))]
    if differing:
        raise LoraError(f"{folder}: adapter_config.json differs in {', '.join(differing)}", exit_code=1)
    expected = {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
    as_written = _max_difference(expected, load_file(folder / ADAPTER_WEIGHTS))
    reference = logits(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.fill_(math.nan)
    config = PeftConfig.from_pretrained(str(folder))
    if isinstance(config, LoraConfig):
        register_custom_layers(config)
    base = _unwrap_base(model)
    with experts.placeholders(base):
        if sharding.is_sharded(base):
            # The two parts of `from_pretrained`: loading tensors needs the sharded weights in place.
            config.base_model_name_or_path = base.name_or_path  # PEFT warns where it changes the path
            with sharding.placeholders(base):
                reloaded = get_peft_model(base, config)
            reloaded.load_adapter(str(folder), reloaded.active_adapter)
        else:
            reloaded = PeftModel.from_pretrained(base, str(folder), config=config)
    adalora.restore_fp32_tensors(reloaded, load_file(folder / ADAPTER_WEIGHTS))
    fp32_weights.upcast_trainable_params(reloaded)
    loaded = adapter_tensors(reloaded)
    # Fully trained modules are loaded in the base's dtype, in which they were computed.
    as_loaded = _max_difference(
        {name: t.to(loaded[name].dtype) for name, t in expected.items() if name in loaded}, loaded
    )
    size = reference.abs().max()
    in_logits = _max_difference({"": reference / size.clamp_min(1e-12)}, {"": logits(reloaded) / size})
    return ReloadDifference(max(as_written, as_loaded), in_logits)


def _max_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    if ours.keys() != theirs.keys():
        return math.inf
    pairs = [(tensor, theirs[name].to(tensor.device)) for name, tensor in ours.items()]
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
        return math.inf
    # max() would ignore a NaN.
    return max(
        (math.inf if (a - b).isnan().any() else float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0
    )


def _unwrap_base(model: PeftModel) -> PreTrainedModel:
    """Return the base without the adapter; PEFT's `unload` rejects virtual tokens, and some methods if quantized."""
    fp32_weights.remove_parametrizations(model)
    base: PreTrainedModel = model.get_base_model()
    done: list[str] = []  # wrappers contain wrappers: the outermost is replaced
    for name, module in list(base.named_modules()):
        if any(name.startswith(f"{outer}.") for outer in done):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
            base.set_submodule(name, inner)
            done.append(name)
    vars(base).pop("peft_config", None)  # virtual tokens set none
    return base


def _json_value(value: Any) -> Any:
    """Return the value as JSON stores it: lists for sets and tuples, here sorted."""
    return sorted(value, key=str) if isinstance(value, (set, list, tuple)) else value
