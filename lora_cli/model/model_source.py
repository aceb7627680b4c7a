"""Find a base model on the hub, in a folder or in a GGUF file; read its config and tokenizer; identify its weights."""

import hashlib
import json
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
from lora_cli.model import gguf_base
from lora_cli.recipe.schema import ModelSpec
from lora_cli.run.cache_folder import cache_folder
from lora_cli.run.hub import USING_CACHE, ask_hub, no_answer_error
from lora_cli.run.system_errors import OF_THIS_MACHINE, system_error

Info = Callable[[str], None]

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
    path = Path(spec.path).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise LoraError(f"model.path: there is no file {spec.path}", hint=_suggest_path(path))
        gguf_base.check_gguf_file(path)
        packed = gguf_base.choose_packed(spec.gguf, path, device=device, info=info)
        folder = gguf_base.unpack_gguf(
            path, dtype=dtype, cache=cache_folder(), info=info, weights=weights and not packed
        )
        return ModelSource(str(folder), trust, gguf_file=path, packed=packed)
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = "model.path accepts a folder that save_pretrained wrote, a .gguf file or a hub id"
            if (path / "adapter_config.json").is_file():
                hint = "this is an adapter: give the base model it was trained on"
            raise LoraError(f"model.path: {spec.path} has no config.json", hint=hint)
        return ModelSource(str(path), trust)
    if path.is_absolute() or spec.path.startswith(("./", "../", "~")) or spec.path.count("/") > 1:
        raise LoraError(f"model.path: there is no folder {spec.path}", hint=_suggest_path(path))
    return _find_on_hub(spec, info)


def _find_on_hub(spec: ModelSpec, info: Info) -> ModelSource:
    source = ModelSource(spec.path, spec.trust_remote_code, revision=spec.revision or "main")
    if (problem := ask_hub(info)) is not None:
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
        LoraError: it cannot be loaded, or transformers does not know the architecture.
    """
    with library_errors(source):
        config: PretrainedConfig = AutoConfig.from_pretrained(source.path, **source.arguments)
        return config


def load_tokenizer(
    source: ModelSource, new_tokens: Sequence[str] = (), *, uses_template: bool = True
) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, and add `new_tokens` to it as special tokens.

    The chat template is the tokenizer's, else that of the model's processor. It is checked, unless another one is used
    in its place (`uses_template` False).

    Raises:
        LoraError: it cannot be loaded, it already has one of the new tokens, or its chat template cannot be trusted.
    """
    with library_errors(source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.path, **source.arguments)
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
            template = json.loads(Path(file).read_text(encoding="utf-8")).get("chat_template")
        except OSError:  # there is no such file, here or on the hub
            continue
        if isinstance(template, str):
            return template
    return None


def hub_commit(source: ModelSource) -> str | None:
    """Return the commit that the revision of a loaded hub model stands for; None for a local model."""
    if Path(source.path).is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(source.path, "config.json", revision=source.revision or "main")
    # The cache keeps a repository's files in snapshots/<commit>/.
    return Path(file).parent.name if isinstance(file, str) else None


def fingerprint(source: ModelSource) -> str:
    """Return the identity of the base's weights: SHA-256 (hex) over size, first and last MiB of each weight file.

    A hub model is read from the local cache. A few megabytes are enough to distinguish models; hashing all of a large
    model would take minutes at every start.

    Raises:
        LoraError: a hub model is not in the cache.
    """
    digest = hashlib.sha256()
    for file in [source.gguf_file] if source.gguf_file else weight_files(source):
        size = file.stat().st_size
        digest.update(f"{size}|".encode())
        with file.open("rb") as stream:
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
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"] if fetch else None
    with library_errors(source):
        return Path(
            snapshot_download(
                source.path,
                revision=source.revision or "main",
                local_files_only=not fetch,
                allow_patterns=patterns,
            )
        )


class library_errors:  # used like a function: `with library_errors(source):`
    """Context manager that converts transformers' errors about a wrong model into a LoraError; others pass."""

    def __init__(self, source: ModelSource) -> None:
        self.source = source

    def __enter__(self) -> None:
        return

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, LoraError) or not isinstance(error, (OSError, ValueError, ImportError, RuntimeError)):
            return
        if (found := system_error(error)) is not None and found.errno in OF_THIS_MACHINE:
            return
        if isinstance(error, RuntimeError) and "loading state_dict" not in str(error) and "mismatch" not in str(error):
            return
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        path = self.source.path
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        hint = "check the hub id, or give a local folder or .gguf file as model.path"
        if "trust_remote_code" in str(error):
            first = "it needs Python code from its repository, which runs only if you trust it"
            pin = "" if Path(path).is_dir() else ", and pin the commit that you have read in model.revision"
            hint = f"read the code, then set model.trust_remote_code: true (lora merge: --trust-remote-code){pin}"
        elif "does not recognize this architecture" in str(error) or "Unrecognized model" in str(error):
            hint = "give a model that the installed transformers knows, or upgrade it: pip install -U transformers"
        elif "Unrecognized configuration class" in str(error):
            first = f"{first.partition(' for this kind')[0]}: transformers has no such model for this task"
            hint = "give a model of another architecture, or choose another task"
        elif isinstance(error, ImportError):
            hint = "install the package that it names"
        elif isinstance(error, RuntimeError):
            first = "the shapes of its weights differ from its config.json"
            hint = "download the model again, or give another one"
        elif Path(path).is_dir():
            hint = "model.path accepts a folder that save_pretrained wrote, a .gguf file or a hub id"
        elif offline:
            hint = "offline, and not all of its files are in the cache: unset HF_HUB_OFFLINE, or give a local path"
        raise LoraError(f"model.path: {path} cannot be loaded: {first}", hint=hint) from error
