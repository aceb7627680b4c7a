"""Go on training a saved adapter: check it against recipe and base, and load its tensors into the attached adapter."""

from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor

from lora_cli.errors import LoraError
from lora_cli.model.adapter_files import AdapterFiles
from lora_cli.model.base_model import BaseCheckpoint
from lora_cli.model.model_source import fingerprint
from lora_cli.model.save_adapter import adapter_tensors, saved_names
from lora_cli.recipe.schema import AdapterSpec, QuantizationSpec
from lora_cli.recipe.source_adapter import disagreements, keys_of_config
from lora_cli.run.redact import redact_path

KEY = "adapter.from"
UNSUPPORTED = {
    "adalora": "its ranks were pruned, and AdaLoRA starts from full ranks",
    "p tuning": "its file has the embeddings, and not the network that computes them",
}
# Keys of PEFT's configuration that are compared elsewhere (as tensors, by the recipe's keys), or have no effect on what
# a saved adapter computes. Every other key must be equal.
NOT_COMPARED = {
    *("base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_version"),
    *("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "feedforward_modules"),
    *("layers_to_transform", "layers_pattern", "fan_in_fan_out", "trainable_token_indices", "bias"),
    *("lora_dropout", "rank_dropout", "module_dropout", "vera_dropout", "boft_dropout"),
    *("init_lora_weights", "init_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    *(
        "runtime_config",
        "megatron_config",
        "megatron_core",
        "ensure_weight_tying",
        "init_ia3_weights",
        "save_projection",
    ),
}


def check_source(spec: AdapterSpec, source: AdapterFiles) -> None:
    """Compare the adapter that `spec` goes on from with the other keys of `spec`.

    Raises:
        LoraError: its method cannot be continued, or a key of the recipe disagrees with it: `details` has a line for
            each if there are several.
    """
    folder, config = source.folder, source.config
    _check_kind(source)
    keys = keys_of_config({**config.to_dict(), "peft_type": config.peft_type.value})
    differing = disagreements(spec.model_dump(), keys)
    lines = [
        f"adapter.{key}: {_show(ours)}, but the adapter in {folder} has {_show(theirs)}"
        for key, ours, theirs in differing
    ]
    if spec.init_text is not None:
        lines.append(f"adapter.init_text: no effect, because the virtual tokens are those of {folder}")
    if lines:
        hint = "remove the key, which is then read from the adapter, or write its value"
        if len(lines) == 1:
            raise LoraError(lines[0], hint=hint)
        raise LoraError(f"{KEY}: {len(lines)} keys disagree with {folder}", hint=hint, details=lines)


def _show(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _check_kind(source: AdapterFiles) -> None:
    """Raise if the adapter's method cannot be continued."""
    name = source.method
    if not keys_of_config({"peft_type": source.config.peft_type.value}):
        reason = UNSUPPORTED.get(name, "it is not one of the methods of `lora methods`")
        raise LoraError(
            f"{KEY}: {source.folder} is {name}, which cannot be trained on: {reason}", hint="train a new adapter"
        )


def check_base(source: AdapterFiles, base: BaseCheckpoint, *, quantization: QuantizationSpec | None) -> list[str]:
    """Compare base, task and labels with those that the adapter was trained on; return notes for the user.

    Raises:
        LoraError: they differ, so that the adapter would compute something else than it was trained to.
    """
    folder, config = source.folder, source.config
    trained_on, name = source.trained_on, config.base_model_name_or_path or "(not at all)"
    notes = []
    if trained_on is None:
        if name not in (base.name, redact_path(base.name)):
            notes.append(f"note: {folder} names its base {name}, and is now trained on {base.name}")
    elif (own := fingerprint(base.source)) != trained_on.fingerprint:
        raise LoraError(
            f"{KEY}: {folder} was trained on {name}, {trained_on.architecture} (fingerprint "
            f"{trained_on.fingerprint[:12]}), not on {base.name} (fingerprint {own[:12]})",
            hint="write its base as model.path; if this is the same model in another form, remove trained_on.json "
            "and checksums.json from a copy of the adapter",
        )
    else:
        before, now = trained_on.quantization, quantization.model_dump(mode="json") if quantization else None
        if before != now:
            notes.append(f"note: {folder} was trained on a base {_bits(before)}, and is trained on one {_bits(now)}")
    labels = source.labels
    if labels is not None and base.labels is not None and labels != base.labels:
        raise LoraError(
            f"{KEY}: the head of {folder} has {labels.describe()}; the rows have {base.labels.describe()}",
            hint=f"write data.labels: [{', '.join(labels.names)}]",
        )
    if source.chat_template not in (None, base.tokenizer.chat_template or ""):
        notes.append(f"note: the chat template of this run differs from that of {folder}: it was prompted otherwise")
    return notes


def _bits(quantization: dict[str, Any] | None) -> str:
    return f"in {quantization['bits']} bits" if quantization else "that is not quantized"


def check_fits(model: PeftModel, source: AdapterFiles) -> dict[str, Tensor]:
    """Compare configuration, names and shapes with the adapter attached to `model`; return the tensors of the file.

    Raises:
        LoraError: the adapter has an option that no recipe has, or other tensors.
    """
    folder = source.folder
    ours, theirs = model.active_peft_config.to_dict(), source.config.to_dict()
    if theirs.get("task_type") not in (None, ours.get("task_type")):
        raise LoraError(
            f"{KEY}: {folder} has task_type: {_text(theirs['task_type'])}, this recipe {_text(ours['task_type'])}",
            hint="write the task that it was trained for",
        )
    for key in sorted(theirs.keys() - NOT_COMPARED):
        if _text(theirs[key]) != _text(ours.get(key)):
            raise LoraError(
                f"{KEY}: {folder} has {key}: {_text(theirs[key])}, this recipe's adapter has {_text(ours.get(key))}",
                hint="such an adapter cannot be trained on; train a new one",
            )
    # A row of the file belongs to the id in the same place, so their order counts.
    before, now = (config.get("trainable_token_indices") or None for config in (theirs, ours))
    if before != now:
        raise LoraError(
            f"{KEY}: the trained token ids of {folder} are {_describe_ids(before)}, of this recipe "
            f"{_describe_ids(now)}",
            hint="list the same tokens in adapter.trainable_tokens, in the same order",
        )
    tensors, expected = source.load(), adapter_tensors(model)
    base = {f"base_model.model.{name}": p for name, p in model.get_base_model().named_parameters()}
    for name in sorted(tensors.keys() - expected.keys()):
        # PEFT writes embeddings too where it is not sure that the base has them.
        if name not in base or not _is_equal(tensors[name], base[name]):
            raise LoraError(f"{KEY}: {folder} has {name}, which this recipe does not train", hint=_targets_hint(source))
        del tensors[name]
    for name, tensor in expected.items():
        if name not in tensors:
            raise LoraError(f"{KEY}: {folder} lacks {name}, which this recipe trains", hint=_targets_hint(source))
        if tensors[name].shape != tensor.shape:
            shapes = (" x ".join(map(str, t.shape)) for t in (tensors[name], tensor))
            raise LoraError(
                f"{KEY}: {name} of {folder} is {next(shapes)}, on this base it is {next(shapes)}",
                hint="write the base that it was trained on as model.path",
            )
    return tensors


def _describe_ids(ids: list[int] | dict[str, list[int]] | None) -> str:
    if isinstance(ids, dict):
        return "; ".join(f"{', '.join(map(str, ids[name]))} of {name}" for name in sorted(ids))
    return ", ".join(map(str, ids or ())) or "none"


def _is_equal(tensor: Tensor, parameter: Tensor) -> bool:
    return tensor.shape == parameter.shape and (
        parameter.is_meta or bool(torch.equal(tensor.to(parameter.device, parameter.dtype), parameter))
    )


def _targets_hint(source: AdapterFiles) -> str:
    named = f" ({source.config.base_model_name_or_path})" if source.config.base_model_name_or_path else ""
    return f"write its base as model.path{named}, and leave target_modules out: they are read from the adapter"


def _text(value: object) -> str:
    """Return a value of a configuration for comparison and messages; empty ones are equal."""
    if value in (None, [], {}, ()):
        return "null"
    if isinstance(value, float):
        return f"{value:g}"  # 4.0 and 4 are equal
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_text(each)}' for key, each in sorted(value.items()))}}}"
    return str(getattr(value, "value", sorted(value) if isinstance(value, (set, list)) else value))


def load_source_tensors(model: PeftModel, tensors: dict[str, Tensor]) -> None:
    """Load the tensors of the file into a freshly attached adapter, by PEFT."""
    set_peft_model_state_dict(model, tensors, adapter_name="default")


@torch.no_grad()
def load_exact_tensors(model: PeftModel, source: AdapterFiles, tensors: dict[str, Tensor]) -> None:
    """Load the tensors once more, when trained parameters are fp32: PEFT rounds some to the base's dtype.

    Raises:
        LoraError: a tensor of the file is not in the model.
    """
    parameters = dict(model.named_parameters())
    for name, saved_name in saved_names(model).items():
        if saved_name is not None:
            parameters[name].copy_(tensors[saved_name])
    loaded = adapter_tensors(model)
    for name, tensor in tensors.items():
        if not torch.equal(tensor.to(loaded[name].device, loaded[name].dtype), loaded[name]):
            raise LoraError(f"{KEY}: {name} of {source.folder} cannot be loaded into this model", exit_code=1)
