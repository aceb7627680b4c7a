"""What must not be published: secrets (tokens, keys) and paths of this machine in the files of a result. No torch.

Weights are numbers; of their files, the header with its metadata is searched. Vocabularies are lists of arbitrary
pieces of text, in which a path is no path of this machine: they are searched for secrets only.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.errors import LoraError
from lora_cli.model.gguf_header import read_gguf_header
from lora_cli.run.cache_folder import CACHE_VARIABLE
from lora_cli.run.read_file import open_regular
from lora_cli.setup.publishable import PublishedFile

BLOCK_BYTES = 1 << 24  # of a large file that are searched at a time
MAX_HEADER_BYTES = 100 << 20  # of a safetensors file, by the limit of its library
OVERLAP_BYTES = 1 << 12  # that the next block begins with again: longer than any secret
WEIGHTS = (".data", "_data")  # endings of files that have nothing but numbers
# Documented forms, with a fixed beginning each, so that random text hardly matches.
SECRETS: dict[str, bytes] = {
    "a token of Hugging Face": rb"\b(?:hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,})\b",
    "an access key of AWS": rb"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a secret key of AWS": rb"(?i:aws_?secret_?access_?key)[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9/+]{40}",
    "a private key": rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
    "a token of GitHub": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})",
    "a token of GitLab": rb"\bglpat-[A-Za-z0-9_-]{20,}",
    "an API key of OpenAI or Anthropic": rb"\bsk-(?:ant-|proj-|svcacct-|admin-)?[A-Za-z0-9_-]{32,}",
    "an API key of Google": rb"\bAIza[A-Za-z0-9_-]{35}",
    "a token of Slack": rb"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    "an API key of Weights & Biases": rb"(?i:wandb_?api_?key)[\"']?\s*[:=]\s*[\"']?[0-9a-f]{40}",
    "a key of an Azure account": rb"AccountKey=[A-Za-z0-9+/=]{60,}",
    "a signed URL": rb"[?&](?:X-Amz-Signature=[0-9a-f]{32,}|sig=[A-Za-z0-9%+/=]{30,})",
    "a URL with a password": rb"\b[a-z][a-z0-9+.-]*://[^\s/:@\"'<>{}]+:[^\s/@\"'<>{}]+@[\w.-]",
}
_SECRET = re.compile(b"|".join(b"(%s)" % pattern for pattern in SECRETS.values()))
OF_MACHINE = "a path of this machine"
SHOWN = 6  # characters of a secret in a message
# Folders of a user. Not after a letter, as in https://example.org/home/page.
_USER_FOLDER = re.compile(
    r"(?<![\w.:/@-])(?:/home/[\w.-]+/|/Users/[\w.-]+/|/root/[\w.-]|file:///[\w])[^\s\"'`<>)]*"
    r"|\b[A-Za-z]:\\+Users\\+[^\s\"'`<>)]*"
)
# The whole value of a key: a path that starts at the root, with a folder at least.
_ABSOLUTE = re.compile(r"(~|/[\w.@+ -]+)/[^\n]*|[A-Za-z]:[\\/][^\n]*")
# The value of a key of recipes, or of a Modelfile. Of other keys, it may be the path of a URL.
_ASSIGNED = re.compile(
    r"^[ \t-]*(?:(?:path|train|eval|output|from|base|base_model|chat_template|model|data|file|dir):|FROM|ADAPTER)"
    r"[ \t]+[\"']?((?:~|/[\w.@+-]+)/[^\s\"'#]*)",
    re.MULTILINE,
)
# Keys whose values are texts of the vocabulary, or names of classes.
_ANY_TEXT = ("model", "vocab", "merges", "id2label", "label2id", "names", "chat_template")
_VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt")


class Leak(NamedTuple):
    """A secret, or a path of this machine, in a file."""

    file: str
    where: str  # `line 3`, or the key of a JSON file
    what: str

    @property
    def is_path(self) -> bool:
        """Whether it is a path, and no secret."""
        return self.what.startswith(OF_MACHINE)

    def describe(self) -> str:
        """Return it in one line."""
        return f"{self.file}{f', {self.where}' if self.where else ''}: {self.what}"


def find_leaks(files: Iterable[PublishedFile], *, token: str | None) -> list[Leak]:
    """Search files for secrets and for paths of this machine.

    Args:
        files: that would be published.
        token: of the user, which must be in no file, whatever its form.

    Raises:
        LoraError: a file cannot be read.
    """
    folders = machine_folders()
    return [leak for file in files for leak in dict.fromkeys(_search(file, folders, token))]


def machine_folders() -> list[str]:
    """Return folders of this machine and its user; one such as /tmp is too short to be told from other text."""
    places = [os.path.expanduser("~"), os.getcwd(), tempfile.gettempdir()]
    places += [os.environ.get(name, "") for name in (CACHE_VARIABLE, "HF_HOME", "XDG_CACHE_HOME", "VIRTUAL_ENV")]
    found = {os.path.abspath(place) for place in places if place}
    return sorted((place for place in found if place.count("/") > 1), key=len, reverse=True)


def _search(file: PublishedFile, folders: list[str], token: str | None) -> Iterator[Leak]:
    suffix = Path(file.name).suffix
    if file.name.endswith(WEIGHTS):
        return
    if suffix == ".gguf":
        yield from _search_gguf(file, folders, token)
        return
    if suffix == ".safetensors":
        with open_regular(file.path) as stream:
            header = stream.read(min(int.from_bytes(stream.read(8), "little"), MAX_HEADER_BYTES))
        yield from _secrets(file, header, token)
        yield from _folders(file, header.decode(errors="replace"), folders)
        return
    if file.size > BLOCK_BYTES and suffix != ".json":
        for block in _blocks(file.path):
            found = [*_secrets(file, block, token), *_folders(file, block.decode(errors="replace"), folders)]
            yield from (leak._replace(where="") for leak in found)
        return
    content = file.path.read_bytes() if file.content is None else file.content
    yield from _secrets(file, content, token)
    if file.name not in _VOCABULARIES and suffix != ".model":
        yield from _paths(file, content.decode(errors="replace"), folders)


def _blocks(path: Path) -> Iterator[bytes]:
    with open_regular(path) as stream:
        block = b""
        while more := stream.read(BLOCK_BYTES):
            block = block[-OVERLAP_BYTES:] + more
            yield block


def _secrets(file: PublishedFile, content: bytes, token: str | None) -> Iterator[Leak]:
    if token and token.encode() in content:
        yield Leak(file.name, _line(content, content.index(token.encode())), "your token of the hub")
    for match in _SECRET.finditer(content):
        name = list(SECRETS)[(match.lastindex or 1) - 1]
        text = match[0].decode(errors="replace")
        if not (token and token in text):
            yield Leak(file.name, _line(content, match.start()), f"{name} ({text[:SHOWN]}...)")


def _line(content: bytes, position: int) -> str:
    breaks = content.count(b"\n", 0, position)
    return f"line {breaks + 1}"


def _paths(file: PublishedFile, text: str, folders: list[str]) -> Iterator[Leak]:
    if file.name.endswith(".json"):
        try:
            value = json.loads(text)
        except ValueError:
            raise LoraError(f"{file.path} is not valid JSON", hint="write the result again, or correct it") from None
        yield from _in_json(file, value, "", folders)
        return
    yield from _folders(file, text, folders)
    if Path(file.name).suffix in (".md", "") and not file.name.startswith(("LICENSE", "NOTICE")):
        for match in _ASSIGNED.finditer(text):
            yield Leak(file.name, _text_line(text, match.start(1)), f"{OF_MACHINE}, {match[1]}")


def _in_json(file: PublishedFile, value: Any, key: str, folders: list[str]) -> Iterator[Leak]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if name not in _ANY_TEXT or file.name.startswith(("adapter_config", "export", "trained_on")):
                yield from _in_json(file, inner, f"{key}.{name}" if key else str(name), folders)
    elif isinstance(value, list):
        for inner in value:
            yield from _in_json(file, inner, key, folders)
    elif isinstance(value, str):
        if _ABSOLUTE.fullmatch(value):
            yield Leak(file.name, key, f"{OF_MACHINE}, {value}")
        else:
            yield from (leak._replace(where=key) for leak in _folders(file, value, folders))


def _folders(file: PublishedFile, text: str, folders: list[str]) -> Iterator[Leak]:
    for match in _USER_FOLDER.finditer(text):
        yield Leak(file.name, _text_line(text, match.start()), f"{OF_MACHINE}, {match[0]}")
    for folder in folders:
        pattern = re.compile(rf"(?<![\w.-]){re.escape(folder)}(?=[/\s\"'`<>),;:]|$)[^\s\"'`<>)]*")
        for match in pattern.finditer(text):
            if not _USER_FOLDER.match(match[0]):
                yield Leak(file.name, _text_line(text, match.start()), f"{OF_MACHINE}, {match[0]}")


def _text_line(text: str, position: int) -> str:
    breaks = text.count("\n", 0, position)
    return f"line {breaks + 1}"


def _search_gguf(file: PublishedFile, folders: list[str], token: str | None) -> Iterator[Leak]:
    for key, value in read_gguf_header(file.path).metadata.items():
        if isinstance(value, str):
            yield from (leak._replace(where=key) for leak in _secrets(file, value.encode(), token))
            if key != "tokenizer.chat_template" and _ABSOLUTE.fullmatch(value):
                yield Leak(file.name, key, f"{OF_MACHINE}, {value}")
            else:
                yield from (leak._replace(where=key) for leak in _folders(file, value, folders))
