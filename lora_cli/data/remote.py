"""Download data files from URLs (https, s3, gs, hf: every file system of fsspec) to the cache. No torch.

A download is kept under a hash of its URL and of what the server says of its version (ETag, size, time). A file that is
not complete never gets there. The rows are read from the copy, whose content is hashed like that of a local file.
"""

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast
from urllib.parse import unquote, urlsplit, urlunsplit

from lora_cli.errors import LoraError
from lora_cli.run.cache_entry import OTHER_DISK, cached_entry
from lora_cli.run.disk_space import Need, check_free_space
from lora_cli.run.system_errors import OF_THIS_MACHINE, system_error

CONNECT_TIMEOUT_S = 20.0  # seconds for a connection
READ_TIMEOUT_S = 60.0  # seconds without any data
PROGRESS_EVERY_S = 10.0  # seconds between progress messages

# The package that fsspec needs for a protocol: an extra of this project.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "abfs": "azure", "abfss": "azure", "az": "azure"}
# What servers and fsspec call the version of a file.
VERSION_KEYS = (
    *("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "blob_id", "lfs"),
    *("Last-Modified", "LastModified", "last_modified", "updated", "mtime", "created", "size"),
)


class RemoteFile(NamedTuple):
    """A remote file that exists."""

    url: str
    name: str  # in messages: the URL without credentials and query, which can contain secrets
    within: str  # path within the folder or glob
    size: int | None  # bytes
    version: str  # differs when the content does


class Found(NamedTuple):
    """What there is at a URL."""

    files: list[RemoteFile]
    single: bool  # the URL is a file's
    glob: bool = False


def is_url(path: str) -> bool:
    """Return whether a path is a URL: `https://...`, `s3://...`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


def find_url(url: str) -> Found:
    """Return the files at a URL: one, those of a folder or those that a glob matches (not for http).

    Raises:
        LoraError: there is none, the server cannot be reached or refuses, or a package for the protocol is missing.
    """
    name = _public_name(url)
    protocol = url.partition("://")[0].lower()
    with _translated(name):
        fs, root = _open_url(url)
        if protocol in ("http", "https"):
            info = fs.info(url)
            _check_no_web_page(name, info)
            return Found([_remote_file(url, name, PurePosixPath(urlsplit(name).path).name, info)], single=True)
        if is_glob := re.search(r"[*?[]", root) is not None:
            infos = fs.glob(root, detail=True)
            root = root[: re.search(r"[^/]*[*?[]", root).start()]  # type: ignore[union-attr]
        else:
            top = fs.info(root)
            if top["type"] == "file":
                return Found([_remote_file(url, name, PurePosixPath(root).name, top)], single=True)
            infos = fs.find(root, detail=True)
    paths = sorted(path for path, info in infos.items() if info["type"] == "file")
    if not paths:
        what = "matches no file" if is_glob else "is a folder without files"
        raise LoraError(f"data: {name} {what}", hint="correct the URL")
    urls = {path: str(fs.unstrip_protocol(path)) for path in paths}
    return Found(
        [_remote_file(urls[path], urls[path], path.removeprefix(root).lstrip("/"), infos[path]) for path in paths],
        single=False,
        glob=is_glob,
    )


def _public_name(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme.lower() not in ("http", "https"):
        return url
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], unquote(parts.path), "", ""))


def _remote_file(url: str, name: str, within: str, info: dict[str, Any]) -> RemoteFile:
    version = {key: str(info[key]) for key in VERSION_KEYS if info.get(key) is not None}
    return RemoteFile(url, name, within, info.get("size"), json.dumps(version, sort_keys=True))


def _check_no_web_page(name: str, info: dict[str, Any]) -> None:
    if info.get("mimetype") == "text/html":
        hint = "write the URL of the file itself"
        if "/blob/" in name:
            hint = f"write {name.replace('/blob/', '/resolve/' if 'huggingface' in name else '/raw/', 1)}"
        raise LoraError(f"data: {name} is a web page, not a data file", hint=hint)


def _open_url(url: str) -> tuple[Any, str]:
    """Return the file system of fsspec for a URL, and the path in it."""
    # Imported here because fsspec's http takes a third of a second to import, and most data is local.
    import fsspec

    if not url.lower().startswith(("http://", "https://")):
        return cast(tuple[Any, str], fsspec.url_to_fs(url))
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
    fs, path = fsspec.url_to_fs(
        url,
        # trust_env: proxies of the environment. Without auto_decompress, a .gz file stays what its name says.
        client_kwargs={"timeout": timeout, "trust_env": True, "auto_decompress": False},
        encoded="%" in url,
        headers={"Accept-Encoding": "identity"},
    )
    return fs, path


@contextmanager
def _translated(name: str) -> Iterator[None]:
    """Turn the exceptions of fsspec's file systems into one line."""
    try:
        yield
    except ImportError as error:
        raise _missing_package(name, error) from None
    except _library_errors() as error:
        if (found := system_error(error)) is not None and found.errno in OF_THIS_MACHINE:
            raise
        # fsspec's http replaces the reason by FileNotFoundError, and keeps it as the cause.
        reason = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise LoraError(f"data: {name} {_problem(reason)}", hint=_hint(reason)) from None


def _library_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of fsspec, and of the libraries that it uses and does not translate."""
    names = {
        "aiohttp": "ClientError",
        "botocore.exceptions": "BotoCoreError",
        "gcsfs.retry": "HttpError",
        "google.auth.exceptions": "GoogleAuthError",
    }
    names["azure.core.exceptions"] = "AzureError"
    loaded = (getattr(sys.modules[module], name) for module, name in names.items() if module in sys.modules)
    return (OSError, ValueError, *loaded)


def _problem(error: BaseException) -> str:
    import aiohttp

    status = getattr(error, "status", None)
    if status == 404 or (status is None and isinstance(error, FileNotFoundError)):
        return "does not exist" + " (404)" * (status == 404)
    if status in (401, 403) or isinstance(error, PermissionError):
        return "may not be read" + (f" ({status})" if status else "")
    if status is not None:
        return f"cannot be downloaded: the server answered {status} {getattr(error, 'message', '')}".rstrip()
    if isinstance(error, TimeoutError):
        return "cannot be downloaded: no answer within the time limit"
    if isinstance(error, aiohttp.ClientConnectorError):
        number = error.os_error.errno or 0
        reason = os.strerror(number) if number > 0 else error.os_error.strerror or str(error.os_error)
        return f"cannot be downloaded: no connection to {error.host}: {reason}"
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return f"cannot be read: {first_line}"


def _hint(error: BaseException) -> str:
    status = getattr(error, "status", None)
    if status in (401, 403) or isinstance(error, PermissionError):
        return "check the URL and its credentials"
    if status == 404 or isinstance(error, FileNotFoundError):
        return "correct the URL"
    return "check the URL and the network"


def _missing_package(name: str, error: ImportError) -> LoraError:
    protocol = name.partition("://")[0].lower()
    package = re.search(r"[Ii]nstall (\S+)", str(error))
    command = f"lora-cli[{EXTRAS[protocol]}]" if protocol in EXTRAS else package[1] if package else "fsspec"
    return LoraError(
        f"data: {name}: the package that reads {protocol}:// is not installed", hint=f"pip install '{command}'"
    )


def download(file: RemoteFile, cache: Path, info: Callable[[str], None]) -> Path:
    """Return the local copy of a remote file, downloaded if the cache has none of this version.

    Safe with concurrent processes: one downloads, the others wait. A damaged copy is reported and downloaded again.

    Raises:
        LoraError: the download fails or is not complete, or the cache cannot be written; nothing is cached then.
    """
    key = hashlib.blake2b(f"{file.url}\n{file.version}".encode(), digest_size=16).hexdigest()
    name = PurePosixPath(file.within).name

    def fetch(folder: Path) -> None:
        size = f" ({file.size / 1e6:,.1f} MB)" if file.size is not None else ""
        info(f"downloading {file.name}{size}")
        check_free_space([Need(cache, file.size or 0, f"the download of {file.name}")], hint=OTHER_DISK)
        written = _fetch(file, folder / name, info)
        if file.size is not None and written != file.size:
            raise LoraError(
                f"data: {file.name}: the download ended after {written:,} of {file.size:,} bytes",
                hint="try it again",
            )

    # Without anything that tells versions apart, an old copy may differ.
    reuse = file.version != "{}"
    folder = cache / "downloads" / key
    what = f"the download of {file.name}"
    return cached_entry(folder, make=fetch, what=what, versions={}, info=info, reuse=reuse) / name


def _fetch(file: RemoteFile, path: Path, info: Callable[[str], None]) -> int:
    from fsspec.callbacks import Callback

    class Progress(Callback):  # type: ignore[misc]
        reported = time.monotonic()

        def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
            if time.monotonic() > self.reported + PROGRESS_EVERY_S:
                self.reported = time.monotonic()
                share = f" of {file.size / 1e6:,.1f}" if file.size else ""
                info(f"downloading {file.name}: {self.value / 1e6:,.1f}{share} MB")

    with _translated(file.name):
        fs, remote_path = _open_url(file.url)
        fs.get_file(remote_path, str(path), callback=Progress())
    return path.stat().st_size
