"""`--to peft`: the adapter as a folder that plain PEFT loads onto its base."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lora_cli.data import class_labels
from lora_cli.errors import LoraError
from lora_cli.export.source import Check, ExportOptions, ExportSource
from lora_cli.model import empty_base, save_adapter, trained_on
from lora_cli.model.adapter_files import PREFIX, AdapterFiles, open_adapter
from lora_cli.model.tasks import TASKS
from lora_cli.run.folder import CONFIG_FILE
from lora_cli.run.read_file import read_json_object
from lora_cli.run.redact import redact_path

# Files of an adapter. Other tools' checkpoints also contain optimizer, scheduler and RNG states, which are left out.
ADAPTER_FILES = (
    save_adapter.ADAPTER_WEIGHTS,
    CONFIG_FILE,
    "README.md",
    class_labels.LABELS_FILE,
    trained_on.TRAINED_ON_FILE,
)
AUTO_CLASSES = {
    "causal-lm": "AutoPeftModelForCausalLM",
    "seq2seq-lm": "AutoPeftModelForSeq2SeqLM",
    "seq-cls": "AutoPeftModelForSequenceClassification",
    "token-cls": "AutoPeftModelForTokenClassification",
}


def check_supported(source: ExportSource, options: ExportOptions) -> None:
    """Check that no quantization is requested, and that every tensor of the adapter fits its base.

    Raises:
        LoraError: `--quantize` is set, or the adapter does not fit its base.
    """
    if options.quantize is not None:
        raise LoraError(
            f"--quantize {options.quantize}: an adapter folder is copied unchanged", hint="leave --quantize out"
        )
    attach_to_empty_base(source, adapter_files(source))


def size(source: ExportSource, options: ExportOptions) -> int:
    """Return the bytes of the adapter."""
    return source.adapter_bytes


def write(source: ExportSource, out: Path, options: ExportOptions) -> None:
    """Write the folder `out`."""
    copy_adapter(source, out)


def verify(source: ExportSource, out: Path, options: ExportOptions) -> Iterator[Check]:
    """Yield the checks: tensors read back and compared bit for bit, and the folder loaded by PEFT.

    Raises:
        LoraError: PEFT cannot load the folder onto the base.
    """
    written = open_adapter(out)
    yield check_equal_files(adapter_files(source), written)
    yield check_loaded(source, written)


def usage(source: ExportSource, out: Path, options: ExportOptions) -> list[str]:
    """Return lines of Python that load the adapter, and notes on the base that it needs."""
    config = adapter_files(source).config
    base_path, named = base_argument(source), exported_base_name(source)
    arguments = f", num_labels={len(source.labels.names)}" if source.labels else ""
    arguments += ", trust_remote_code=True" if source.trust_remote_code else ""
    loader = source.base.auto_class.__name__
    if base_path != named or config.task_type is None or loader != TASKS[source.task].auto_class.__name__:
        # PEFT's Auto classes need the task in the adapter's config, a base that is a folder or a hub id, and a model
        # that transformers loads for this task.
        lines = [
            f"from transformers import AutoTokenizer, {loader}",
            "from peft import PeftModel",
            f"base = {loader}.from_pretrained({base_path!r}{arguments})",
            f"model = PeftModel.from_pretrained(base, {str(out)!r})",
        ]
    else:
        lines = [
            "from transformers import AutoTokenizer",
            f"from peft import {AUTO_CLASSES[source.task]}",
            f"model = {AUTO_CLASSES[source.task]}.from_pretrained({str(out)!r}{arguments})",
        ]
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({str(out)!r})")
    if _is_local(source.base.name):
        lines.append(
            f"note: {CONFIG_FILE} names its base by a local path, {named}; before you publish it, export it again with "
            "the base's hub id: --base ORG/NAME"
        )
    lines += quantization_note(source)
    return lines


def base_argument(source: ExportSource) -> str:
    """Return the base as an argument of from_pretrained on this machine: a hub id, or a folder."""
    return str(source.folder) if source.base.name.endswith(".gguf") else source.base.name


def exported_base_name(source: ExportSource) -> str | None:
    """Return the name of the base in the exported adapter_config.json: a hub id, or a path without private folders.

    `--base ORG/NAME` gives an adapter that was trained on a local folder the name of the base on the hub.
    """
    if not _is_local(source.base.name):
        return source.base.name
    named: str | None = adapter_files(source).config.base_model_name_or_path
    return redact_path(named) if named else None


def _is_local(base: str) -> bool:
    return Path(os.path.expanduser(base)).exists()


def adapter_files(source: ExportSource) -> AdapterFiles:
    """Return the adapter, which sources of adapter formats always have."""
    assert source.adapter is not None
    return source.adapter


def quantization_note(source: ExportSource) -> list[str]:
    """Return a line on the base's quantization in training, which PEFT's files do not record; [] if unquantized."""
    record = adapter_files(source).trained_on
    if record is None or record.quantization is None:
        return []
    quant_type = record.quantization.get("type") or "int8"
    return [f"note: trained on a {quant_type} base (bitsandbytes); on other weights its outputs differ slightly"]


def copy_adapter(source: ExportSource, out: Path) -> None:
    """Copy the adapter's files into the folder `out`, and save the source's tokenizer if the adapter has none."""
    folder = adapter_files(source).folder
    out.mkdir(exist_ok=True)
    for name in (*ADAPTER_FILES, *save_adapter.TOKENIZER_FILES):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    write_config(out, {"base_model_name_or_path": exported_base_name(source)})
    if not (out / "tokenizer_config.json").is_file():
        source.tokenizer.save_pretrained(str(out))


def write_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Change keys of adapter_config.json in `folder`; with these values already, the file stays as it is."""
    config = read_json_object(folder / CONFIG_FILE)
    if any(key not in config or config[key] != value for key, value in values.items()):
        text = json.dumps({**config, **values}, indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def attach_to_empty_base(source: ExportSource, adapter: AdapterFiles) -> empty_base.EmptyModel:
    """Load an adapter by PEFT onto the source's base without weights.

    Raises:
        LoraError: adapter and base do not fit.
    """
    model = empty_base.init_empty_weights(source.base.skeleton())
    return empty_base.attach_saved_adapter(model, adapter, base=source.name)


def iterate_tensors(adapter: AdapterFiles) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of each tensor in the adapter file, in its shape and dtype there, sorted by name."""
    with safe_open(adapter.folder / save_adapter.ADAPTER_WEIGHTS, framework="pt") as file:
        for key in sorted(file.keys()):
            yield key, file.get_tensor(key)


def check_equal_files(original: AdapterFiles, exported: AdapterFiles) -> Check:
    """Compare every tensor of the adapters `original` and `exported`."""
    method = exported.config.peft_type.value
    expected, written = dict(iterate_tensors(original)), dict(iterate_tensors(exported))
    mismatched = sorted(expected.keys() ^ written.keys()) + [
        key for key in sorted(expected.keys() & written.keys()) if not bits_equal(expected[key], written[key])
    ]
    text = f"{len(written)} tensors of {method} read back, each equal to the adapter's bit for bit"
    if mismatched:
        text = f"{len(mismatched)} of {len(expected)} tensors differ: {mismatched[0]}"
    return Check("tensors", not mismatched, text, {"tensors": len(written), "strayed": len(mismatched)})


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of any shape and dtype are equal in shape, dtype and bits; a NaN equals itself."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def check_loaded(source: ExportSource, exported: AdapterFiles) -> Check:
    """Load the exported adapter by PEFT onto its base, and compare the loaded tensors with the original's file.

    Raises:
        LoraError: PEFT cannot load it.
    """
    attached = attach_to_empty_base(source, exported)
    loaded = save_adapter.adapter_tensors(attached.model)
    loaded |= {PREFIX + name: attached.model.get_base_model().get_parameter(name) for name in attached.from_adapter}
    mismatched, count = [], 0
    for key, value in iterate_tensors(adapter_files(source)):
        count += 1
        tensor = loaded.pop(key, None)
        if tensor is None or not torch.equal(tensor.float(), value.float()):  # the empty base computes in fp32
            mismatched.append(key)
    mismatched += sorted(loaded)
    text = f"PEFT loads it onto its base, with the values of all {count} tensors"
    if mismatched:
        text = f"loaded by PEFT onto its base, {len(mismatched)} tensors differ: {mismatched[0]}"
    return Check("peft", not mismatched, text, {"tensors": count, "strayed": len(mismatched)})
