"""Check the tokenizer's files of a model before they are loaded, and the loaded tokenizer against them.

The tokenizers library gives a token another id than its file says without an error, transformers adds special tokens
that the vocabulary lacks, and a regular expression of a pre-tokenizer can take time without end.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.errors import LoraError
from lora_cli.model.library_errors import is_panic
from lora_cli.run.read_file import as_json, open_regular, printable, read_json_object

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
# Further files that a tokenizer or a processor is read from, if the model has them.
JSON_FILES = (
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "chat_template.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
OTHER_FILES = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
MAX_ID = 2**22  # the largest vocabularies have some 10^6 tokens; lists of all ids are made of them
PROBE_LIMIT_S = 10.0  # for texts that take a healthy tokenizer some milliseconds
RUN = 200  # characters of a probe


def check_tokenizer_files(folder: Path, *, hint: str) -> dict[str, Any] | None:
    """Check the files of the tokenizer and the processors in `folder`; return the content of tokenizer.json, if any.

    Raises:
        LoraError: a file is not a regular one, not JSON, or has a value of a wrong type.
    """
    for name in JSON_FILES:
        if os.path.lexists(folder / name):
            read_json_object(folder / name, hint=hint)
    for name in OTHER_FILES:
        if os.path.lexists(folder / name):
            open_regular(folder / name, hint=hint).close()
    if os.path.lexists(file := folder / TOKENIZER_CONFIG_FILE):
        _check_tokenizer_config(read_json_object(file, hint=hint), file, hint)
    if not os.path.lexists(file := folder / TOKENIZER_FILE):
        return None
    content = read_json_object(file, hint=hint)
    _check_tokenizer_json(content, file, hint)
    return content


def _check_tokenizer_config(config: Mapping[str, Any], file: Path, hint: str) -> None:
    for key, value in config.items():
        if (problem := _setting_problem(key, value)) is not None:
            raise LoraError(f"{file}: {printable(key)} is {as_json(value)}: {problem}", hint=hint)


def _setting_problem(key: str, value: Any) -> str | None:
    """Return what is wrong with a value of tokenizer_config.json; None if nothing is."""
    if not key.isidentifier() or key.startswith("__"):
        return "no name of a setting"
    if value is None:
        return None
    match key:
        case "tokenizer_class" | "processor_class" | "backend" if not isinstance(value, str):
            return "not a name"
        case "padding_side" | "truncation_side" if value not in ("left", "right"):
            return "not left or right"
        case "model_max_length" if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            return "not a number of tokens"
        case "add_bos_token" | "add_eos_token" | "add_prefix_space" if not isinstance(value, bool):
            return "neither true nor false"
        case "auto_map" if not isinstance(value, (dict, list)):
            return "not an object"
        case "chat_template" if not isinstance(value, str) and not _is_named_templates(value):
            return "neither a text nor a list of named texts"
        case "added_tokens_decoder" if not _is_added_tokens(value):
            return "not an object of ids and tokens"
    return "not a token" if key in SPECIAL_TOKENS and not _is_token(value) else None


def _is_token(value: Any) -> bool:
    text = value.get("content") if isinstance(value, dict) else value
    return isinstance(text, str) and text != ""


def _is_named_templates(value: Any) -> bool:
    entries = (
        value if isinstance(value, list) else [{"name": "", "template": ""}] if isinstance(value, dict) else [None]
    )
    return all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in entries
    )


def _is_added_tokens(value: Any) -> bool:
    return isinstance(value, dict) and all(
        number.isascii() and number.isdigit() and isinstance(entry, dict) and _is_token(entry)
        for number, entry in value.items()
    )


def _check_tokenizer_json(content: Mapping[str, Any], file: Path, hint: str) -> None:
    model, added = content.get("model"), content.get("added_tokens", [])
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), (dict, list)):
        raise LoraError(f"{file} has no model with a vocab", hint=hint)
    if not isinstance(added, list):
        raise LoraError(f"{file}: added_tokens is {as_json(added)}: not a list", hint=hint)
    seen: dict[int, str] = {}
    for entry in added:
        if not _is_added_token(entry):
            raise LoraError(f"{file}: added_tokens has {as_json(entry)}: not a token with an id", hint=hint)
        if (other := seen.setdefault(entry["id"], entry["content"])) != entry["content"]:
            raise _same_id(file, other, entry["content"], entry["id"], hint)
    if isinstance(model["vocab"], dict):
        ids: dict[int, str] = {}
        for token, number in model["vocab"].items():
            if not _is_id(number):
                raise LoraError(f"{file}: {printable(token)} has the id {as_json(number)}", hint=hint)
            if (other := ids.setdefault(number, token)) != token:
                raise _same_id(file, other, token, number, hint)


def _is_added_token(entry: Any) -> bool:
    """Return whether an entry of added_tokens has the keys and types that the tokenizers library writes."""
    if not isinstance(entry, dict) or not _is_token(entry) or not _is_id(entry.get("id")):
        return False
    return all(key in ADDED_TOKEN_FLAGS and isinstance(entry[key], bool) for key in entry.keys() - {"id", "content"})


def _same_id(file: Path, first: str, second: str, number: int, hint: str) -> LoraError:
    return LoraError(f"{file}: {printable(first)} and {printable(second)} have the same id {number:,}", hint=hint)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_ID


def check_loaded_tokenizer(
    tokenizer: PreTrainedTokenizerBase, content: Mapping[str, Any], file: Path, *, hint: str
) -> None:
    """Check a loaded tokenizer against the `content` of its tokenizer.json, and try it on a few texts.

    Raises:
        LoraError: a token has another id than in the file, or the tokenizer fails on a text or does not finish.
    """
    loaded = tokenizer.get_vocab()
    vocab = content["model"]["vocab"]
    expected = dict(vocab) if isinstance(vocab, dict) else {}
    expected |= {entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}
    for token, number in expected.items():
        if loaded.get(token) != number:
            found = "does not load it" if token not in loaded else f"loads it as {loaded[token]:,}"
            raise LoraError(
                f"{file}: {printable(token)} has the id {number:,}, but the tokenizers library {found}", hint=hint
            )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        _probe(backend, list(_probe_texts(content)), file, hint)


def _probe_texts(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield a plain text, and runs of each character that the regular expressions of the tokenizer name.

    An expression that needs exponential time needs it on a long run of characters that it repeats.
    """
    yield "The fox: 12 and 3.5!\n\n  \tünï 日本 🦊\r\n"
    patterns = [step["Regex"] for step in _objects(content) if isinstance(step.get("Regex"), str)]
    characters = dict.fromkeys("aA0 .\n" + "".join(char for pattern in patterns for char in pattern[:5000]))
    for char in list(characters)[:100] if patterns else ():
        yield f"{char * RUN}\u2603"


def _objects(tree: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects in the sections of tokenizer.json that can have regular expressions, at any depth."""
    if isinstance(tree, dict):
        yield tree
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        if key not in ("model", "added_tokens"):
            yield from _objects(value)


def _probe(backend: Any, texts: list[str], file: Path, hint: str) -> None:
    """Encode and decode `texts` with a time limit.

    The library cannot be interrupted: a thread that does not finish ends with the process, which the error ends.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            # Only the methods for batches release the interpreter's lock.
            backend.decode_batch([encoding.ids for encoding in backend.encode_batch(texts)])
        except BaseException as error:  # noqa: BLE001 - Rust's panics have no class that can be named; raised below
            failed.append(error)

    with silent_panics():
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(PROBE_LIMIT_S)
    if thread.is_alive():
        raise LoraError(f"{file}: the tokenizer does not finish a short text in {PROBE_LIMIT_S:.0f} s", hint=hint)
    for error in failed:
        if not is_panic(error) and type(error) is not Exception:
            raise error
        raise LoraError(f"{file}: the tokenizer fails on a short text: {printable(str(error))}", hint=hint) from None


@contextmanager
def silent_panics() -> Iterator[None]:
    """Keep Rust from printing its own report of a panic to stderr: the error that follows is the report."""
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
