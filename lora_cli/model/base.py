"""Load the base model and its tokenizer: from the hub, a folder or a GGUF file, in 16 bit or quantised."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.errors import LoraError
from lora_cli.model.gguf import unpack
from lora_cli.model.quantize import guard_cpu, library_config
from lora_cli.recipe.schema import ModelSpec, QuantizationSpec

Say = Callable[[str], None]

# Progress of loading is ours to show; what transformers reports as a warning still comes through.
transformers_logging.disable_progress_bar()


class Source(NamedTuple):
    """Where transformers finds a base model, and how it is asked for it."""

    where: str  # folder or hub id
    options: dict[str, object]  # revision and trust_remote_code


def cache_folder() -> Path:
    """Where encoded rows and unpacked GGUF files are kept: $LORA_CACHE, else ~/.cache/lora."""
    return Path(os.environ.get("LORA_CACHE") or Path.home() / ".cache" / "lora")


def pick_device() -> torch.device:
    """The GPU this process was given, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Dtype of weights and compute; auto is bfloat16 where `device` multiplies it in hardware, else float32."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32


def _cpu_multiplies_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def locate(spec: ModelSpec, *, dtype: torch.dtype, say: Say, weights: bool = True) -> Source:
    """Find the base model; unpacks a GGUF file on the way, without its tensors where no `weights` are needed.

    Raises:
        LoraError: a local path that is not there, or not a model.
    """
    options: dict[str, object] = {"trust_remote_code": spec.trust_remote_code}
    path = Path(spec.path).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise LoraError(f"model.path: there is no file {spec.path}", hint=_near(path))
        return Source(str(unpack(path, dtype=dtype, cache=cache_folder(), say=say, weights=weights)), options)
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = "model.path takes a folder that save_pretrained wrote, a .gguf file or a hub id"
            if (path / "adapter_config.json").is_file():
                hint = "this is an adapter: give the base model it was trained on"
            raise LoraError(f"model.path: {spec.path} has no config.json", hint=hint)
        return Source(str(path), options)
    if path.is_absolute() or spec.path.startswith(("./", "../", "~")) or spec.path.count("/") > 1:
        raise LoraError(f"model.path: there is no folder {spec.path}", hint=_near(path))
    return Source(spec.path, {**options, "revision": spec.revision or "main"})


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either; model.path takes a .gguf file, a folder or a hub id"
    there = sorted(p.name for p in path.parent.glob("*"))
    listed = ", ".join(there[:5]) or "nothing"
    return f"{path.parent} holds {listed}; model.path takes a .gguf file, a folder or a hub id"


def load_config(source: Source) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        LoraError: not to be had, or of an architecture that transformers does not know.
    """
    with _library_errors(source):
        config: PretrainedConfig = AutoConfig.from_pretrained(source.where, **source.options)
        return config


def commit(source: Source) -> str | None:
    """The commit that a loaded hub model's revision stands for; None for a local model."""
    if Path(source.where).is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(source.where, "config.json", revision=str(source.options.get("revision", "main")))
    # The cache keeps a repository's files in snapshots/<commit>/.
    return Path(file).parent.name if isinstance(file, str) else None


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        LoraError: not to be had.
    """
    with _library_errors(source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.where, **source.options)
        return tokenizer


def load_base(
    source: Source,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str,
    quantization: QuantizationSpec | None = None,
) -> PreTrainedModel:
    """The base model on `device`, frozen.

    Raises:
        LoraError: not to be had, or it does not offer `attention`.
    """
    arguments: dict[str, object] = {"dtype": dtype, "attn_implementation": attention, **source.options}
    if quantization is not None:
        arguments["quantization_config"] = library_config(quantization)
        arguments["device_map"] = {"": device}
    with _library_errors(source):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source.where, **arguments)
    if quantization is None:
        model.to(device)
    else:
        guard_cpu(model)
    return model.requires_grad_(False)


def skeleton(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model's modules without weights, on the meta device: for counting."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model


def fingerprint(source: Source) -> str:
    """Identity of the base's weights: a hash over each weight file's name, size, head and tail.

    A hub model is read from the local cache. Reading a few megabytes tells models apart; hashing all of a large one
    would cost minutes at every start.
    """
    digest = hashlib.sha256()
    folder = Path(source.where)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(source.where, revision=str(source.options.get("revision", "main")), local_files_only=True)
        )
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = file.stat().st_size
        digest.update(f"{file.name}|{size}|".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()


class _library_errors:  # a function to its users: `with _library_errors(source):`
    """Turns what transformers raises for a wrong model into a LoraError; anything else passes."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, (OSError, ValueError, ImportError)) or isinstance(error, LoraError):
            return
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        hint = "check the hub id, or give a local folder or .gguf file as model.path"
        if "does not recognize this architecture" in first:
            hint = "give a model that the installed transformers knows, or upgrade it: pip install -U transformers"
        elif Path(self.source.where).is_dir():
            hint = "model.path takes a folder that save_pretrained wrote, a .gguf file or a hub id"
        elif offline:
            hint = "HF_HUB_OFFLINE is set and this model is not in the cache; unset it, or give a local path"
        raise LoraError(f"model.path: {self.source.where} cannot be loaded: {first}", hint=hint) from error
