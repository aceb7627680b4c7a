"""Find a base model on the hub, in a folder or in a GGUF file; read its config and tokenizer; identify its weights.

A model's files come from strangers: they are checked here before a library reads them, and what a library raises about
them becomes one error.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import AddedToken
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import cached_file

from lora_cli.data.check_template import check_tokenizer_templates
from lora_cli.errors import LoraError
from lora_cli.model import config_file, gguf_base, tokenizer_files
from lora_cli.model.library_errors import library_errors
from lora_cli.model.safetensors_header import StoredTensor, check_weights_are_floats, has_safetensors, read_headers
from lora_cli.recipe.schema import ModelSpec
from lora_cli.run.cache_folder import cache_folder
from lora_cli.run.checksums import CHECKSUMS_FILE, find_damage, read_checksums
from lora_cli.run.console import format_bytes
from lora_cli.run.folder import CONFIG_FILE as ADAPTER_CONFIG_FILE
from lora_cli.run.folder import is_path
from lora_cli.run.hub import USING_CACHE, ask_hub, no_answer_error
from lora_cli.run.read_file import RESTORE, describe_kind, open_regular, read_json_object
from lora_cli.run.worker import is_first_of_run

Info = Callable[[str], None]

SLOW_BYTES = 2 << 30  # to verify: it takes seconds
OWN_MODELS = ("merged model", "export")  # kinds of checksums.json
EDGE_BYTES = 1 << 20  # of each weight file, from its start and its end, that the fingerprint reads


class ModelSource(NamedTuple):
    """Where transformers finds a base model, and the arguments it needs there."""

    path: str  # folder or hub id; for a packed GGUF file, the folder of its config and tokenizer
    trust_remote_code: bool = False
    revision: str | None = None  # of a hub model
    gguf_file: Path | None = None  # the GGUF file that the weights come from
    packed: bool = False  # the weights stay packed in the GGUF file

    @property
    def arguments(self) -> dict[str, object]:
        """Keyword arguments of `from_pretrained`."""
        pinned = {"revision": self.revision} if self.revision is not None else {}
        return {"trust_remote_code": self.trust_remote_code, **pinned}


def find_model(
    spec: ModelSpec, *, dtype: torch.dtype, device: torch.device, info: Info, weights: bool = True
) -> ModelSource:
    """Find the base model. A GGUF file is unpacked, without its tensors if `weights` is False.

    Raises:
        LoraError: a local path does not exist or is not a model, a GGUF file cannot be read or stay packed, or the hub
            does not answer.
    """
    trust = spec.trust_remote_code
    path = Path(os.path.expanduser(spec.path))
    if path.suffix == ".gguf":
        if not os.path.lexists(path):
            raise LoraError(f"model.path: there is no file {spec.path}", hint=_suggest_path(path))
        gguf_base.check_gguf_file(path)
        packed = gguf_base.choose_packed(spec.gguf, path, device=device, info=info)
        folder = gguf_base.unpack_gguf(
            path, dtype=dtype, cache=cache_folder(), info=info, weights=weights and not packed
        )
        return ModelSource(str(folder), trust, gguf_file=path, packed=packed)
    if path.is_dir():
        is_adapter = os.path.lexists(path / ADAPTER_CONFIG_FILE)
        if not os.path.lexists(path / config_file.CONFIG_FILE):  # a link to nothing is named where the file is read
            hint = "model.path accepts a folder that save_pretrained wrote, a .gguf file or a hub id"
            if is_adapter:
                hint = "this is an adapter: give the base model it was trained on"
            raise LoraError(f"model.path: {spec.path} has no config.json", hint=hint)
        if is_adapter:  # transformers would load the adapter too, and merge and export would not
            raise LoraError(
                f"model.path: {spec.path} is a model and an adapter: it has config.json and {ADAPTER_CONFIG_FILE}",
                hint="move the files of one of them to another folder",
            )
        # Of several processes, one reads all weights twice.
        _check_own_model(path, weights=weights and is_first_of_run(), info=info)
        return ModelSource(str(path), trust)
    if os.path.lexists(path) and not path.is_file():  # a file can have the name of a hub id
        raise LoraError(f"model.path: {spec.path} is {describe_kind(path)}, not a folder", hint=_suggest_path(path))
    if is_path(spec.path):
        raise LoraError(f"model.path: there is no folder {spec.path}", hint=_suggest_path(path))
    return _find_on_hub(spec, info)


def _check_own_model(folder: Path, *, weights: bool, info: Info) -> None:
    """Verify a model that `lora merge` or `lora export` wrote; the weights only if they will be read.

    Raises:
        LoraError: a file is not the one that was written.
    """
    record = read_checksums(folder)
    if record is None or record.kind not in OWN_MODELS:
        return
    names = [name for name in record.files if not name.endswith((".md", *(() if weights else (".safetensors",))))]
    size = sum(record.files[name].bytes for name in names)
    if size > SLOW_BYTES:
        info(f"verifying {folder}: {format_bytes(size)}")
    if damage := find_damage(folder, names, follow_links=True):
        more = f", and {len(damage) - 1} more" if len(damage) > 1 else ""
        raise LoraError(
            f"model.path: {folder} is not the model that was verified: {damage[0]}{more}",
            hint=f"write it again, or restore it; if you changed it yourself, remove {folder / CHECKSUMS_FILE}",
        )


def _find_on_hub(spec: ModelSpec, info: Info) -> ModelSource:
    source = ModelSource(spec.path, spec.trust_remote_code, revision=spec.revision or "main")
    if (problem := ask_hub(info, about=f"{spec.path}/resolve/{spec.revision or 'main'}/config.json")) is not None:
        if hub_commit(source) is None:
            raise no_answer_error(spec.path, problem, key="model.path")
        info(USING_CACHE)
    return source


def _suggest_path(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either; model.path accepts a .gguf file, a folder or a hub id"
    names = sorted(p.name for p in path.parent.glob("*"))
    listed = ", ".join(names[:5]) or "nothing"
    return f"{path.parent} contains {listed}; model.path accepts a .gguf file, a folder or a hub id"


def load_config(source: ModelSource) -> PretrainedConfig:
    """Load the model's configuration.

    Raises:
        LoraError: it or the headers of the weights are damaged, or transformers does not know the architecture.
    """
    name, hint = config_file.CONFIG_FILE, restore_hint(source)
    file = Path(source.path, name)
    if not Path(source.path).is_dir():
        with library_errors(source.path):
            file = Path(cached_file(source.path, name, revision=source.revision))
    tensors = stored_tensors(source)
    config_file.check_config_file(
        file, tensors=len(tensors) if tensors else None, trusted=source.trust_remote_code, hint=hint
    )
    config_file.read_generation_config(file.parent, hint=hint)
    with library_errors(source.path, part=name, hint=hint, trusted=source.trust_remote_code):
        config: PretrainedConfig = AutoConfig.from_pretrained(source.path, **source.arguments)
    config_file.check_heads(config, file, hint=hint)
    if getattr(config, "quantization_config", None) is None:
        check_weights_are_floats(tensors, hint=hint)
    return config


def stored_tensors(source: ModelSource) -> dict[str, StoredTensor]:
    """Return the tensors of the model's safetensors files, from their headers; empty for a hub model or without files.

    Raises:
        LoraError: a file is missing or damaged.
    """
    folder = Path(source.path)
    return read_headers(folder, hint=restore_hint(source)) if has_safetensors(folder) else {}


def restore_hint(source: ModelSource) -> str:
    """Return the hint for a damaged file of a model on this machine."""
    if source.gguf_file is not None and cache_folder() in Path(source.path).parents:
        return f"remove the folder {source.path}: it is made again from {source.gguf_file.name}"
    if Path(source.path).is_dir():
        return f"{RESTORE}, or give another model"
    return "remove the model from the cache of the hub: it is downloaded again"


def load_tokenizer(
    source: ModelSource, new_tokens: Sequence[str] = (), *, uses_template: bool = True
) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, and add `new_tokens` to it as special tokens.

    The chat template is the tokenizer's, else that of the model's processor. It is checked, unless another one is used
    in its place (`uses_template` False).

    Raises:
        LoraError: it cannot be loaded, it already has one of the new tokens, or its chat template cannot be trusted.
    """
    hint, folder = restore_hint(source), cached_folder(source)
    content = tokenizer_files.check_tokenizer_files(folder, hint=hint) if folder is not None else None
    damage = hint if folder is not None else ""
    with library_errors(source.path, part="its tokenizer", hint=damage, trusted=source.trust_remote_code):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.path, **source.arguments)
    if folder is not None and content is not None and not source.trust_remote_code:
        file = folder / tokenizer_files.TOKENIZER_FILE
        tokenizer_files.check_loaded_tokenizer(tokenizer, content, file, hint=hint)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _processor_template(source)
    if uses_template:
        check_tokenizer_templates(tokenizer, source.path)
    if known := [token for token in new_tokens if token in tokenizer.get_vocab()]:
        raise LoraError(
            f"model.new_tokens: the tokenizer already has {known[0]}", hint="remove it from the list: it is not new"
        )
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in new_tokens], special_tokens=True
    )
    return tokenizer


def _processor_template(source: ModelSource) -> str | None:
    """Return the chat template in the processor's files of a multimodal model, where AutoTokenizer does not look."""
    for name in ("chat_template.json", "processor_config.json"):
        try:
            file = cached_file(source.path, name, revision=source.revision)
        except OSError:  # there is no such file, here or on the hub
            continue
        template = read_json_object(Path(file), hint=restore_hint(source)).get("chat_template")
        if isinstance(template, str):
            return template
    return None


def hub_commit(source: ModelSource) -> str | None:
    """Return the commit that the revision of a loaded hub model stands for; None for a local model."""
    folder = None if Path(source.path).is_dir() else cached_folder(source)
    return folder.name if folder is not None else None  # the cache keeps a repository's files in snapshots/<commit>/


def cached_folder(source: ModelSource) -> Path | None:
    """Return the folder of the model's files as far as they are on this machine; None for a hub model without any."""
    if Path(source.path).is_dir():
        return Path(source.path)
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(source.path, config_file.CONFIG_FILE, revision=source.revision or "main")
    return Path(file).parent if isinstance(file, str) else None


def fingerprint(source: ModelSource) -> str:
    """Return the identity of the base's weights: SHA-256 (hex) over size, first and last MiB of each weight file.

    A hub model is read from the local cache. A few megabytes are enough to distinguish models; hashing all of a large
    model would take minutes at every start.

    Raises:
        LoraError: a hub model is not in the cache, or a weight file cannot be read.
    """
    digest = hashlib.sha256()
    for file in [source.gguf_file] if source.gguf_file else weight_files(source):
        with open_regular(file, hint=restore_hint(source)) as stream:
            size = stream.seek(0, os.SEEK_END)
            digest.update(f"{size}|".encode())
            stream.seek(0)
            digest.update(stream.read(EDGE_BYTES))
            stream.seek(max(0, size - EDGE_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()


def weight_files(source: ModelSource) -> list[Path]:
    """Return the files that contain the model's weights; for a hub model, those in the local cache.

    Raises:
        LoraError: a hub model is not in the cache.
    """
    folder = local_folder(source, fetch=False)
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])


def local_folder(source: ModelSource, *, fetch: bool) -> Path:
    """Return the folder of the model's files; for a hub model in the cache, where `fetch` downloads missing files.

    Raises:
        LoraError: the model is not in the cache, or cannot be downloaded.
    """
    folder = Path(source.path)
    if folder.is_dir():
        return folder
    if is_removed(source):
        raise removed_error(source)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"] if fetch else None
    with library_errors(source.path):
        return Path(
            snapshot_download(
                source.path,
                revision=source.revision or "main",
                local_files_only=not fetch,
                allow_patterns=patterns,
            )
        )


def is_removed(source: ModelSource) -> bool:
    """Return whether the folder of a local model, which was there when it was found, is missing now."""
    return source.revision is None and not Path(source.path).is_dir()


def removed_error(source: ModelSource) -> LoraError:
    """Return the error about a local model that was removed; transformers would look for it on the hub."""
    hint = "put it back, and start again; a run continues with --resume"
    return LoraError(f"{source.path} was removed or renamed while the command ran", hint=hint, exit_code=1)
