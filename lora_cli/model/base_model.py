"""Load the base model and its tokenizer: from the hub, a folder or a GGUF file, for a task, in 16 bit or quantised."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken
from transformers import AutoConfig, AutoTokenizer, GgufConfig, PretrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.data.class_labels import ClassLabels
from lora_cli.errors import LoraError
from lora_cli.model import gguf_base, prequantized
from lora_cli.model.quantize import bnb_config, check_cpu_4bit, is_quantized, prepare_for_kbit_training
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.schema import ModelSpec, QuantizationSpec
from lora_cli.recipe.tasks import TaskName

Info = Callable[[str], None]

# Progress of loading is ours to show; what transformers reports as a warning still comes through.
transformers_logging.disable_progress_bar()

PROBLEM_TYPES = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}


class ModelSource(NamedTuple):
    """Where transformers finds a base model, and how it is asked for it."""

    where: str  # folder or hub id; of a packed GGUF, the folder of its config and tokenizer
    options: dict[str, object]  # revision and trust_remote_code
    file: Path | None = None  # the GGUF file that the weights come from
    packed: bool = False  # they stay packed in it


class LoadedBase(NamedTuple):
    """A base model, frozen and on its device."""

    model: PreTrainedModel
    heads: tuple[str, ...]  # modules that the task adds to the base, or whose weights are new: trained whole
    notes: tuple[str, ...]  # what the user should know of the loading


def cache_folder() -> Path:
    """Where encoded rows and unpacked GGUF files are kept: $LORA_CACHE, else ~/.cache/lora."""
    return Path(os.environ.get("LORA_CACHE") or Path.home() / ".cache" / "lora")


def pick_device() -> torch.device:
    """The GPU this process was given, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def pick_dtype(name: str, device: torch.device, quantization: QuantizationSpec | None = None) -> torch.dtype:
    """Dtype of weights and compute; auto is bfloat16 where `device` multiplies it in hardware, else float32.

    Over a 4-bit base it is the dtype that its layers compute in, so that nothing is cast between them.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if quantization is not None and quantization.bits == 4:
        computed: torch.dtype = getattr(torch, quantization.compute_dtype)
        return computed
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32


def _cpu_multiplies_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def find_model(
    spec: ModelSpec, *, dtype: torch.dtype, device: torch.device, info: Info, weights: bool = True
) -> ModelSource:
    """Find the base model; unpacks a GGUF file on the way, without its tensors where no `weights` are needed.

    Raises:
        LoraError: a local path that is not there, or not a model.
    """
    options: dict[str, object] = {"trust_remote_code": spec.trust_remote_code}
    path = Path(spec.path).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise LoraError(f"model.path: there is no file {spec.path}", hint=_suggest_path(path))
        gguf_base.check_gguf_file(path)
        packed = gguf_base.choose_packed(spec.gguf, path, device=device, info=info)
        folder = gguf_base.unpack_gguf(
            path, dtype=dtype, cache=cache_folder(), info=info, weights=weights and not packed
        )
        return ModelSource(str(folder), options, path, packed)
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = "model.path takes a folder that save_pretrained wrote, a .gguf file or a hub id"
            if (path / "adapter_config.json").is_file():
                hint = "this is an adapter: give the base model it was trained on"
            raise LoraError(f"model.path: {spec.path} has no config.json", hint=hint)
        return ModelSource(str(path), options)
    if path.is_absolute() or spec.path.startswith(("./", "../", "~")) or spec.path.count("/") > 1:
        raise LoraError(f"model.path: there is no folder {spec.path}", hint=_suggest_path(path))
    return ModelSource(spec.path, {**options, "revision": spec.revision or "main"})


def _suggest_path(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either; model.path takes a .gguf file, a folder or a hub id"
    there = sorted(p.name for p in path.parent.glob("*"))
    listed = ", ".join(there[:5]) or "nothing"
    return f"{path.parent} holds {listed}; model.path takes a .gguf file, a folder or a hub id"


def load_config(source: ModelSource) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        LoraError: not to be had, or of an architecture that transformers does not know.
    """
    with _library_errors(source):
        config: PretrainedConfig = AutoConfig.from_pretrained(source.where, **source.options)
        return config


def hub_commit(source: ModelSource) -> str | None:
    """The commit that a loaded hub model's revision stands for; None for a local model."""
    if Path(source.where).is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(source.where, "config.json", revision=str(source.options.get("revision", "main")))
    # The cache keeps a repository's files in snapshots/<commit>/.
    return Path(file).parent.name if isinstance(file, str) else None


def load_tokenizer(source: ModelSource, new_tokens: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with `new_tokens` added to it as special ones.

    Raises:
        LoraError: not to be had, or it knows one of the new tokens already.
    """
    with _library_errors(source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.where, **source.options)
    if known := [token for token in new_tokens if token in tokenizer.get_vocab()]:
        raise LoraError(
            f"model.new_tokens: the tokenizer knows {known[0]} already",
            hint="remove it from the list: it is no new one",
        )
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in new_tokens], special_tokens=True
    )
    return tokenizer


def head_labels(config: PretrainedConfig, task: TaskName) -> tuple[str, ...]:
    """Names of the labels that the checkpoint's own head tells apart; none where it has no such head."""
    suffix = {"seq-cls": "ForSequenceClassification", "token-cls": "ForTokenClassification"}.get(task)
    if suffix is None or not any(name.endswith(suffix) for name in config.architectures or ()):
        return ()
    return tuple(config.id2label[number] for number in sorted(config.id2label))


def load_base(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None = None,
    quantization: QuantizationSpec | None = None,
    task: TaskName = "causal-lm",
    labels: ClassLabels | None = None,
    vocabulary: int = 0,
    pad_id: int | None = None,
    seed: int = 0,
) -> LoadedBase:
    """The base model on `device`, frozen, with the head that the task needs.

    Args:
        source: where it is.
        dtype: of what is not quantised.
        device: where it goes.
        attention: implementation, by transformers' name; its own choice where None.
        quantization: how its linear layers are packed on the way.
        task: what it is to learn.
        labels: what its head tells apart, for the tasks that classify.
        vocabulary: tokens that the tokenizer knows; more than the model has embeddings for are given new ones.
        pad_id: of a padding token, for models that find the end of a row by it.
        seed: draws what is new.

    Raises:
        LoraError: not to be had, it lacks weights that are not the task's own, or it does not offer `attention`.
    """
    arguments: dict[str, Any] = {"dtype": dtype, **source.options}
    if attention is not None:
        arguments["attn_implementation"] = attention
    if quantization is not None:
        arguments["quantization_config"] = bnb_config(quantization)
    if quantization is not None or prequantized.detect_prequantized(load_config(source)) is not None:
        arguments["device_map"] = {"": device}  # packed weights do not move afterwards; some would stay on the CPU
    if labels is not None:
        arguments |= _head_arguments(labels)
    where = source.where
    if source.packed:
        assert source.file is not None
        where = str(source.file.parent)
        arguments |= {"gguf_file": source.file.name, "quantization_config": GgufConfig(), "device_map": {"": device}}
    torch.manual_seed(seed)
    with _library_errors(source):
        model: PreTrainedModel
        model, loading_info = TASKS[task].loader.from_pretrained(where, output_loading_info=True, **arguments)
    heads, notes = _check_missing_weights(model, loading_info, task)
    if not is_quantized(model):
        model.to(device)
    else:
        check_cpu_4bit(model)
        prepare_for_kbit_training(model, dtype)
    gguf_base.make_packed_layers_differentiable(model)
    if vocabulary > model.get_input_embeddings().weight.shape[0]:
        _add_embedding_rows(model, vocabulary)
    if pad_id is not None and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = pad_id
    return LoadedBase(model.requires_grad_(False), heads, notes)


def _head_arguments(labels: ClassLabels) -> dict[str, Any]:
    return {
        "num_labels": len(labels.names),
        "id2label": dict(enumerate(labels.names)),
        "label2id": {name: number for number, name in enumerate(labels.names)},
        "problem_type": PROBLEM_TYPES[labels.kind],
        "ignore_mismatched_sizes": True,  # a head for other labels gives way to a new one, and is told about
    }


def _check_missing_weights(
    model: PreTrainedModel, loading_info: dict[str, Any], task: TaskName
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The modules that are the task's own or new, and notes on what the checkpoint and the model do not share.

    Raises:
        LoraError: weights are missing that no task brings along: the model would be part random.
    """
    replaced = {entry[0] for entry in loading_info["mismatched_keys"]}
    missing = set(loading_info["missing_keys"]) | replaced
    heads = task_heads(model, task)
    strange = sorted(key for key in missing if not _is_inside(key, heads) and "pooler" not in key)
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise LoraError(
            f"model.path: the checkpoint has no weights for {', '.join(strange[:3])}{more}",
            hint=f"it is none of a {type(model).__name__}, or not whole: give another model, or another task",
        )
    poolers = sorted({key.rpartition(".")[0] for key in missing if not _is_inside(key, heads)})
    notes = []
    if missing:
        drawn = sum(model.get_parameter(key).numel() for key in missing)
        why = " in place of one for other labels" if replaced else ""
        notes.append(f"new head{why}: {', '.join([*heads, *poolers])}, {drawn:,} parameters drawn by the seed")
    unused = sorted(loading_info["unexpected_keys"])
    if unused:
        kinds = sorted({key.partition(".")[0] for key in unused})
        notes.append(f"of the checkpoint, {len(unused)} tensors are not used by this task: {', '.join(kinds[:4])}")
    return (*heads, *poolers), tuple(notes)


def task_heads(model: PreTrainedModel, task: TaskName) -> tuple[str, ...]:
    """The parts of a classifier that stand beside its base model; a language model's head is part of the base."""
    if not TASKS[task].classes:
        return ()
    beside = [(n, m) for n, m in model.named_children() if n != model.base_model_prefix]
    return tuple(name for name, module in beside if any(True for _ in module.parameters()))


def _is_inside(key: str, modules: Sequence[str]) -> bool:
    return any(key.startswith(f"{module}.") for module in modules)


@torch.no_grad()
def _add_embedding_rows(model: PreTrainedModel, vocabulary: int) -> None:
    """New rows for new tokens: the mean of the others, so that a token that is not taught yet is an average one."""
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            layer.weight[before:] = layer.weight[:before].float().mean(dim=0).to(layer.weight.dtype)


def skeleton(
    config: PretrainedConfig,
    *,
    trust_remote_code: bool = False,
    task: TaskName = "causal-lm",
    labels: ClassLabels | None = None,
    vocabulary: int = 0,
) -> PreTrainedModel:
    """The model's modules without weights, on the meta device: for counting."""
    if labels is not None:
        config.id2label = dict(enumerate(labels.names))  # num_labels is their number
        config.problem_type = PROBLEM_TYPES[labels.kind]
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # shapes of whole weights, whatever they are packed in
    with torch.device("meta"):
        model: PreTrainedModel = TASKS[task].loader.from_config(config, trust_remote_code=trust_remote_code)
        if vocabulary > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model


def fingerprint(source: ModelSource) -> str:
    """Identity of the base's weights: a hash over each weight file's size, head and tail.

    A hub model is read from the local cache. Reading a few megabytes tells models apart; hashing all of a large one
    would cost minutes at every start.
    """
    digest = hashlib.sha256()
    for file in [source.file] if source.file else weight_files(source):
        size = file.stat().st_size
        digest.update(f"{size}|".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()


def weight_files(source: ModelSource) -> list[Path]:
    """The files that the model's weights are in; of a hub model, those in the local cache."""
    folder = local_folder(source, fetch=False)
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])


def local_folder(source: ModelSource, *, fetch: bool) -> Path:
    """The folder that holds the model's files; a hub model's is in the cache, which `fetch` completes.

    Raises:
        LoraError: it is not to be had.
    """
    folder = Path(source.where)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    revision = str(source.options.get("revision", "main"))
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"] if fetch else None
    with _library_errors(source):
        return Path(
            snapshot_download(source.where, revision=revision, local_files_only=not fetch, allow_patterns=wanted)
        )


class _library_errors:  # a function to its users: `with _library_errors(source):`
    """Turns what transformers raises for a wrong model into a LoraError; anything else passes."""

    def __init__(self, source: ModelSource) -> None:
        self.source = source

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, LoraError) or not isinstance(error, (OSError, ValueError, ImportError, RuntimeError)):
            return
        if isinstance(error, RuntimeError) and "loading state_dict" not in str(error) and "mismatch" not in str(error):
            return
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = self.source.where
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        hint = "check the hub id, or give a local folder or .gguf file as model.path"
        if "trust_remote_code" in str(error):
            first = "it needs Python code of its own, which is not run unless you trust it"
            pin = "" if Path(where).is_dir() else ", and pin the commit that you have read in model.revision"
            hint = f"read the code, then set model.trust_remote_code: true (lora merge: --trust-remote-code){pin}"
        elif "does not recognize this architecture" in str(error) or "Unrecognized model" in str(error):
            hint = "give a model that the installed transformers knows, or upgrade it: pip install -U transformers"
        elif "Unrecognized configuration class" in str(error):
            first = f"{first.partition(' for this kind')[0]}: transformers has no such model for this task"
            hint = "give a model of another architecture, or write another task"
        elif isinstance(error, RuntimeError):
            first = "its weights have other shapes than its config.json says"
            hint = "fetch the model again, or give another one"
        elif Path(where).is_dir():
            hint = "model.path takes a folder that save_pretrained wrote, a .gguf file or a hub id"
        elif offline:
            hint = "HF_HUB_OFFLINE is set and this model is not in the cache; unset it, or give a local path"
        raise LoraError(f"model.path: {where} cannot be loaded: {first}", hint=hint) from error
