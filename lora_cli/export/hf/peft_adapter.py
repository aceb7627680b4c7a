"""`--to peft`: the adapter as a folder that PEFT loads onto its base, by itself."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors import safe_open
from torch import Tensor

from lora_cli.data import class_labels
from lora_cli.errors import LoraError
from lora_cli.export.source import Check, ExportOptions, ExportSource
from lora_cli.model import empty_base, save_adapter, trained_on
from lora_cli.model.load_adapter import PREFIX
from lora_cli.model.tasks import TASKS

CONFIG_FILE = "adapter_config.json"
# What belongs to an adapter; optimizers, schedules and random states of other tools' checkpoints do not.
ADAPTER_FILES = (
    save_adapter.ADAPTER_WEIGHTS,
    CONFIG_FILE,
    "README.md",
    class_labels.LABELS_FILE,
    trained_on.TRAINED_ON_FILE,
)
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
AUTO_CLASSES = {
    "causal-lm": "AutoPeftModelForCausalLM",
    "seq2seq-lm": "AutoPeftModelForSeq2SeqLM",
    "seq-cls": "AutoPeftModelForSequenceClassification",
    "token-cls": "AutoPeftModelForTokenClassification",
}


def refuse(subject: ExportSource, options: ExportOptions) -> None:
    """A form there is none of, and an adapter that does not fit its base to the last tensor.

    Raises:
        LoraError: one of these.
    """
    if options.quantize is not None:
        raise LoraError(
            f"--quantize {options.quantize}: an adapter folder is copied as it is", hint="leave --quantize out"
        )
    folder = adapter_folder(subject)
    if not (folder / save_adapter.ADAPTER_WEIGHTS).is_file():
        held = sorted(path.name for path in folder.glob("adapter_model*"))
        raise LoraError(
            f"{folder} has no {save_adapter.ADAPTER_WEIGHTS}" + (f", only {held[0]}" if held else ""),
            hint="load it with PEFT once and save it: its save_pretrained writes safetensors",
        )
    attach_to_empty_base(subject, folder)


def write(subject: ExportSource, out: Path, options: ExportOptions) -> None:
    """The folder `out`."""
    copy_adapter(subject, out)


def prove(subject: ExportSource, out: Path, options: ExportOptions) -> Iterator[Check]:
    """Read back, bit for bit, and loaded by PEFT."""
    yield check_equal_files(adapter_folder(subject), out)
    yield check_loaded(subject, out)


def usage(subject: ExportSource, out: Path, options: ExportOptions) -> list[str]:
    """The lines of Python that load it, and what they need of the base."""
    config = PeftConfig.from_pretrained(str(adapter_folder(subject)))
    path = str(config.base_model_name_or_path)
    more = f", num_labels={len(subject.labels.names)}" if subject.labels else ""
    more += ", trust_remote_code=True" if subject.trust_remote_code else ""
    if path.endswith(".gguf") or config.task_type is None:
        # PEFT's Auto classes know the base by its folder or hub id alone, and the task by the adapter's word.
        loader = TASKS[subject.task].auto_class.__name__
        where = str(subject.folder) if path.endswith(".gguf") else path
        lines = [
            f"from transformers import AutoTokenizer, {loader}",
            "from peft import PeftModel",
            f"base = {loader}.from_pretrained({where!r}{more})",
            f"model = PeftModel.from_pretrained(base, {str(out)!r})",
        ]
    else:
        lines = [
            "from transformers import AutoTokenizer",
            f"from peft import {AUTO_CLASSES[subject.task]}",
            f"model = {AUTO_CLASSES[subject.task]}.from_pretrained({str(out)!r}{more})",
        ]
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({str(out)!r})")
    if Path(path).expanduser().exists():
        lines.append(
            f"note: {CONFIG_FILE} names its base by a path of this machine, {path}: elsewhere, change it there"
        )
    lines += quantization_note(subject)
    return lines


def adapter_folder(subject: ExportSource) -> Path:
    """The folder of the adapter, which formats of adapters always have."""
    assert subject.adapter is not None
    return subject.adapter


def quantization_note(subject: ExportSource) -> list[str]:
    """A line on the base's quantisation in training, which no file of PEFT's tells of; none where it had none."""
    found = trained_on.read_trained_on(adapter_folder(subject))
    if found is None or found.quantization is None:
        return []
    kind = found.quantization.get("type") or "int8"
    return [
        f"note: it was trained over its base in {kind} (bitsandbytes); over other weights it answers slightly otherwise"
    ]


def copy_adapter(subject: ExportSource, out: Path) -> None:
    """The adapter's files, and a tokenizer where it has none of its own, into the folder `out`."""
    folder = adapter_folder(subject)
    out.mkdir(exist_ok=True)
    for name in (*ADAPTER_FILES, *TOKENIZER_FILES):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    if not (out / "tokenizer_config.json").is_file():
        subject.tokenizer.save_pretrained(str(out))


def attach_to_empty_base(subject: ExportSource, folder: Path) -> empty_base.EmptyModel:
    """The adapter in `folder` on its base's shapes, by PEFT.

    Raises:
        LoraError: the two do not fit.
    """
    config = PeftConfig.from_pretrained(str(folder))
    model = empty_base.init_empty_weights(subject.base.skeleton())
    return empty_base.attach_saved_adapter(model, folder, config, base=subject.name)


def iterate_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and values of what the adapter file holds, one after the other."""
    with safe_open(folder / save_adapter.ADAPTER_WEIGHTS, framework="pt") as file:
        for key in sorted(file.keys()):
            yield key, file.get_tensor(key)


def check_equal_files(source: Path, out: Path) -> Check:
    """Every tensor against the adapter's own, and that the configuration is one."""
    kind = PeftConfig.from_pretrained(str(out)).peft_type.value
    expected, found = dict(iterate_tensors(source)), dict(iterate_tensors(out))
    strayed = sorted(expected.keys() ^ found.keys()) + [
        key for key in sorted(expected.keys() & found.keys()) if not bits_equal(expected[key], found[key])
    ]
    said = f"{len(found)} tensors of {kind} read back, each equal to the adapter's bit for bit"
    if strayed:
        said = f"{len(strayed)} of {len(expected)} tensors are others: {strayed[0]}"
    return Check("tensors", not strayed, said, {"tensors": len(found), "strayed": len(strayed)})


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and bits are the same: a NaN is equal to itself here."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def check_loaded(subject: ExportSource, out: Path) -> Check:
    """What PEFT has of the folder, once it is on the base, against the adapter's file."""
    attached = attach_to_empty_base(subject, out)
    held = save_adapter.adapter_tensors(attached.model)
    held |= {PREFIX + name: attached.model.get_base_model().get_parameter(name) for name in attached.from_adapter}
    strayed, count = [], 0
    for key, value in iterate_tensors(adapter_folder(subject)):
        count += 1
        there = held.pop(key, None)
        if there is None or not torch.equal(there.float(), value.float()):  # hollow bases compute in fp32
            strayed.append(key)
    strayed += sorted(held)
    said = f"PEFT puts it on its base, and all of its {count} tensors are in their places"
    if strayed:
        said = f"once PEFT has put it on its base, {len(strayed)} tensors are others: {strayed[0]}"
    return Check("peft", not strayed, said, {"tensors": count, "strayed": len(strayed)})
