"""Data files of URLs: downloaded once, read like local files, and every failure in one line. No network."""

import gzip
import json
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from lora_cli.data import remote
from lora_cli.data.sources import content_hash, read_records, train_sources
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from tests.faults.damage import damages
from tests.faults.test_disk import limit_file_size

ROWS = '{"text": "a"}\n{"text": "b"}\n'


class Server:
    """A web server: its pages, and the requests that it got."""

    def __init__(self) -> None:
        self.pages: dict[str, tuple[int, dict[str, str], bytes]] = {}  # status, headers, body
        self.downloads: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                server.downloads.append(self.path)
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                status, headers, content = server.pages.get(self.path, (404, {}, b""))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def serve(self, path: str, content: str | bytes, status: int = 200, **headers: str) -> str:
        body = content if isinstance(content, bytes) else content.encode()
        self.pages[path] = status, {name.replace("_", "-"): value for name, value in headers.items()}, body
        return self.url + path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def read(path: str, cache: Path, told: list[str] | None = None) -> list[str]:
    sources = train_sources(DataSpec(train=path), cache=cache, info=(told if told is not None else []).append)
    return [record.row["text"] for source in sources for record in read_records(source)]


def test_a_file_is_downloaded_once_and_again_when_it_changes(server, tmp_path):
    url = server.serve("/d/x.jsonl", ROWS, ETag='"1"')
    told: list[str] = []
    assert read(url, tmp_path, told) == ["a", "b"]
    assert told == [f"downloading {url} (0.0 MB)"]
    assert read(url, tmp_path, told) == ["a", "b"]
    assert len(told) == len(server.downloads) == 1
    server.serve("/d/x.jsonl", '{"text": "c"}\n{"text": "d"}\n', ETag='"2"')
    assert read(url, tmp_path) == ["c", "d"]


def test_a_damaged_copy_is_told_and_downloaded_again(server, tmp_path):
    url = server.serve("/d/x.jsonl", ROWS, ETag='"1"')
    other = server.serve("/d/y.jsonl", ROWS.replace("a", "c"), ETag='"1"')
    assert read(other, tmp_path) == ["c", "b"]
    assert read(url, tmp_path) == ["a", "b"]
    [entry] = (path.parent for path in tmp_path.rglob("x.jsonl"))
    [foreign] = (path.parent for path in tmp_path.rglob("y.jsonl"))
    intact = Path(shutil.copytree(entry, tmp_path / "intact"))
    for damage in damages(intact, seed=1, other=foreign):
        remove(entry)
        remove(entry.with_name(f"{entry.name}.outside"))
        shutil.copytree(intact, entry)
        damage.apply(entry)
        told: list[str] = []
        assert read(url, tmp_path, told) == ["a", "b"], damage.name
        silent = damage.name.startswith("remove-folder")
        assert silent or told[0].startswith(f"cache: {entry} is damaged: "), damage.name
        assert told[-1] == f"downloading {url} (0.0 MB)"
        assert read(url, tmp_path, told) == ["a", "b"]
        assert len(told) == 2 - silent


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()


def test_a_full_disk_is_no_error_of_the_server(server, tmp_path):
    url = server.serve("/d/x.jsonl", "a" * 5000, ETag='"1"')
    with limit_file_size(1000):
        message = error_of(url, tmp_path)
    assert message.startswith(f"the cache cannot be written: {tmp_path}/downloads/")
    assert message.endswith(": File too large")
    assert [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(".lock-")] == []


def test_a_file_without_version_is_not_reused(server, tmp_path, monkeypatch):
    url = server.serve("/x.jsonl", ROWS)
    monkeypatch.setattr(remote, "VERSION_KEYS", ())
    read(url, tmp_path)
    server.serve("/x.jsonl", ROWS.replace("a", "c"))
    assert read(url, tmp_path) == ["c", "b"]


def test_rows_and_hash_are_those_of_the_local_file(server, prepared, chatml, tmp_path):
    url = server.serve("/x.jsonl", ROWS)
    local = prepared(chatml, files={"x.jsonl": ROWS}, train="x.jsonl")
    data = prepared(chatml, train=url)
    assert data.fingerprint == local.fingerprint
    assert data.train[1].where == f"{url}:2"
    [source] = train_sources(DataSpec(train=url), cache=tmp_path / "cache")
    [entry] = data.ledger.to_json()["sources"]
    assert entry["content"] == content_hash(source) == local.ledger.to_json()["sources"][0]["content"]


def test_queries_and_passwords_are_not_shown(server, tmp_path):
    url = server.serve("/x.jsonl?token=SECRET", ROWS).replace("127", "user:PASSWORD@127")
    told: list[str] = []
    assert read(url, tmp_path, told) == ["a", "b"]
    assert "SECRET" not in told[0]
    with pytest.raises(LoraError) as caught:
        read(url.replace("/x.", "/y."), tmp_path)
    assert "PASSWORD" not in str([told, caught.value.message])


@pytest.mark.parametrize("headers", [{}, {"Content_Encoding": "gzip", "Content_Type": "application/json"}])
def test_a_compressed_file_keeps_its_type(server, tmp_path, headers):
    url = server.serve("/x.jsonl.gz", gzip.compress(ROWS.encode()), **headers)
    assert read(url, tmp_path) == ["a", "b"]


def error_of(path: str, cache: Path) -> str:
    with pytest.raises(LoraError) as caught:
        read(path, cache)
    assert "\n" not in caught.value.message + str(caught.value.hint)
    assert caught.value.hint
    return caught.value.message.removeprefix("data: ")


def test_failures_of_a_server_are_one_line_and_leave_nothing(server, tmp_path):
    failures = {
        "/missing.jsonl": ((404, ""), "does not exist (404)"),
        "/private.jsonl": ((403, ""), "may not be read (403)"),
        "/broken.jsonl": ((500, ""), "cannot be downloaded: the server answered 500 Internal Server Error"),
    }
    for path, ((status, content), problem) in failures.items():
        url = server.serve(path, content, status)
        assert error_of(url, tmp_path) == f"{url} {problem}"
    page = server.serve("/blob/x.jsonl", "<html>", Content_Type="text/html; charset=utf-8")
    assert error_of(page, tmp_path) == f"{page} is a web page, not a data file"
    other = server.serve("/x.docx", "a")
    assert error_of(other, tmp_path) == f"cannot read {other}: unknown file type"
    short = server.serve("/short.jsonl", ROWS, Content_Length="999")
    server.pages["/short.jsonl"][1]["Connection"] = "close"
    assert error_of(short, tmp_path).startswith(f"{short} cannot be read: ")
    assert [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(".lock-")] == []


def test_a_host_that_does_not_answer_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setattr(remote, "READ_TIMEOUT_S", 0.2)
        fsspec.get_filesystem_class("http").clear_instance_cache()
        url = f"http://127.0.0.1:{port}/x.jsonl"
        assert error_of(url, tmp_path) == f"{url} cannot be downloaded: no answer within the time limit"
    url = f"http://127.0.0.1:{port}/x.jsonl"
    assert error_of(url, tmp_path) == f"{url} cannot be downloaded: no connection to 127.0.0.1: Connection refused"
    assert "no connection to no-such-host.invalid" in error_of("http://no-such-host.invalid/x.jsonl", tmp_path)
    fsspec.get_filesystem_class("http").clear_instance_cache()


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()


def test_folders_and_globs_of_a_file_system(memory, tmp_path):
    for name in ("train/b.jsonl", "train/a.jsonl", "test/c.jsonl", "README.md"):
        memory.pipe(f"/bucket/{name}", json.dumps({"text": name}).encode())
    told: list[str] = []
    assert read("memory://bucket", tmp_path, told) == ["train/a.jsonl", "train/b.jsonl"]
    assert "memory://bucket: 2 files of split train by name; not read: test/c.jsonl" in told
    assert not any("README" in line for line in told if line.startswith("downloading"))
    assert read("memory://bucket/train/*.jsonl", tmp_path) == ["train/a.jsonl", "train/b.jsonl"]
    assert read("memory://bucket/test/c.jsonl", tmp_path) == ["test/c.jsonl"]
    assert error_of("memory://bucket/none.jsonl", tmp_path) == "memory://bucket/none.jsonl does not exist"
    assert error_of("memory://bucket/*.csv", tmp_path) == "memory://bucket/*.csv matches no file"


def test_a_missing_package_is_one_line_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(LoraError) as caught:
        read("s3://bucket/x.jsonl", tmp_path)
    assert caught.value.message == "data: s3://bucket/x.jsonl: the package that reads s3:// is not installed"
    assert caught.value.hint == "pip install 'lora-cli[s3]'"


def test_an_unknown_protocol_is_one_line(tmp_path):
    assert "Protocol not known: s4" in error_of("s4://bucket/x.jsonl", tmp_path)
