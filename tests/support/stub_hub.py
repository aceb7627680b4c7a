"""A Hugging Face hub on localhost: repositories in memory, in the protocol of the real client (API, LFS, Xet).

It is made for faults: `break_at` lets a request fail or wait, `lose` loses an answer, `damage` flips a byte of a stored
file.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKENS: dict[str, dict[str, Any]] = {
    "hf_writer": {"name": "me", "role": "write"},
    "hf_reader": {"name": "me", "role": "read"},
}
LFS_FROM = 10_000  # bytes, from which a file is stored as LFS; the real hub decides by name and size
NO_COMMIT = "0" * 40


class Refusal(Exception):
    """An answer with an error status."""

    def __init__(
        self, status: int, message: str = "", code: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


@dataclass
class StoredFile:
    """A file of a repository."""

    data: bytes | None  # None: stored by Xet, whose blocks are not put together here
    size: int
    sha256: str
    lfs: bool

    def entry(self, path: str) -> dict[str, Any]:
        """Return the file as `tree` lists it, with the digests of what is stored."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
        content = pointer if self.lfs else self.data
        assert content is not None
        entry: dict[str, Any] = {"type": "file", "path": path, "size": self.size, "oid": git_blob_sha1(content)}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": len(pointer)}
        return entry


@dataclass
class Repository:
    """A model repository with its commits."""

    private: bool
    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)
    head: str = NO_COMMIT

    @property
    def files(self) -> dict[str, StoredFile]:
        """The files of the newest commit."""
        return self.commits[self.head]

    def commit(self, files: Mapping[str, StoredFile]) -> str:
        """Add a commit with `files`, and return its id."""
        self.head = hashlib.sha1(f"{self.head}{len(self.commits)}".encode()).hexdigest()
        self.commits[self.head] = dict(files)
        return self.head


@dataclass
class StubHub:
    """The state of the hub, which tests read and change."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS, by the SHA-256 that the client gave
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)  # of multipart uploads
    blocks: dict[str, bytes] = field(default_factory=dict)  # of Xet: xorbs by their hash, and shards
    requests: list[str] = field(default_factory=list)  # `PUT /lfs/...`, in order
    part_bytes: int | None = None  # of a multipart upload; None: whole files
    damage: str | None = None  # the name of a file of which a byte is flipped when it is stored
    lose: str | None = None  # a pattern of requests that are done, and whose answers do not arrive
    break_at: Callable[[str], Refusal | None] = lambda request: None  # called with every request

    def add(self, name: str, files: Mapping[str, bytes], *, private: bool = False) -> Repository:
        """Create a repository with `files`."""
        repository = Repository(private)
        repository.commit({path: self.store(path, data) for path, data in files.items()})
        self.repositories[name] = repository
        return repository

    def store(self, path: str, data: bytes) -> StoredFile:
        """Return `data` as it is stored, with a flipped byte if `damage` names the file."""
        lfs = len(data) >= LFS_FROM
        if path == self.damage:
            data = data[:-1] + bytes([data[-1] ^ 1])
        return StoredFile(data, len(data), hashlib.sha256(data).hexdigest(), lfs)

    def count(self, pattern: str) -> int:
        """Return the number of requests that match."""
        return sum(re.search(pattern, request) is not None for request in self.requests)


def git_blob_sha1(data: bytes) -> str:
    """Return git's id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def stub_hub() -> Iterator[StubHub]:
    """Serve a hub on a free port until the block ends."""
    hub = StubHub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of the client."""

    hub: StubHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        try:
            if (refusal := self.hub.break_at(request)) is not None:
                raise refusal
            found = self.find(path, body)
            if self.hub.lose and re.search(self.hub.lose, request):
                self.close_connection = True
                return
            self.reply(200, found)
        except Refusal as refusal:
            self.reply(refusal.status, {"error": refusal.message}, refusal)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def reply(self, status: int, value: object, refusal: Refusal | None = None) -> None:
        headers = value.pop("_headers") if isinstance(value, dict) and "_headers" in value else {}
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, text in headers.items():
            self.send_header(name, text)
        if refusal is not None:
            self.send_header("X-Error-Message", refusal.message)
            if refusal.code:
                self.send_header("X-Error-Code", refusal.code)
            for name, text in refusal.headers.items():
                self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def find(self, path: str, body: bytes) -> object:
        """Return the answer to a request."""
        routes: dict[str, Callable[..., object]] = {
            r"HEAD /": lambda body: {},
            r"GET /api/whoami-v2": self.whoami,
            r"POST /api/validate-yaml": lambda body: {"errors": [], "warnings": []},
            r"POST /api/repos/create": self.create,
            r"GET /api/models/([^/]+/[^/]+)": self.info,
            r"GET /api/models/([^/]+/[^/]+)/revision/([^/]+)": self.info,
            r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)": self.tree,
            r"POST /api/models/([^/]+/[^/]+)/preupload/([^/]+)": self.preupload,
            r"POST /api/models/([^/]+/[^/]+)/commit/([^/]+)": self.commit,
            r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": self.lfs_batch,
            r"PUT /lfs/(\w+)": self.lfs_put,
            r"PUT /lfs/(\w+)/(\d+)": self.lfs_put_part,
            r"POST /lfs/(\w+)/complete": self.lfs_complete,
            r"POST /lfs/(\w+)/verify": self.lfs_verify,
            r"GET /api/models/([^/]+/[^/]+)/xet-write-token/([^/]+)": self.xet_token,
            r"GET /v1/chunks/(.+)": self.xet_unknown,
            r"POST /v1/xorbs/(.+)": self.xet_block,
            r"POST /v1/shards": self.xet_shard,
        }
        for pattern, function in routes.items():
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return function(*match.groups(), body=body)
        raise Refusal(404, f"no route for {self.command} {path}")

    def user(self) -> dict[str, Any]:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in TOKENS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return TOKENS[token]

    def repository(self, name: str) -> Repository:
        user = self.user()
        found = self.hub.repositories.get(name)
        if found is None or (found.private and user["name"] != name.partition("/")[0]):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return found

    def may_write(self, owner: str) -> None:
        user = self.user()
        if user["role"] != "write" or owner not in (user["name"], "my-org"):
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')

    def whoami(self, body: bytes) -> object:
        user = self.user()
        token = {"displayName": "laptop", "role": user["role"]}
        return {
            "type": "user", "name": user["name"], "orgs": [{"name": "my-org"}],
            "auth": {"type": "access_token", "accessToken": token},
        }  # fmt: skip

    def create(self, body: bytes) -> object:
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        self.may_write(wanted["organization"])
        if name in self.hub.repositories:
            raise Refusal(409, "You already created this model repo")
        self.hub.add(
            name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=wanted.get("visibility") == "private"
        )
        return {"url": f"{self.hub.address}/{name}"}

    def info(self, name: str, revision: str = "main", *, body: bytes) -> object:
        repository = self.repository(name)
        return {"id": name, "modelId": name, "sha": repository.head, "private": repository.private, "tags": []}

    def tree(self, name: str, revision: str, *, body: bytes) -> object:
        repository = self.repository(name)
        files = repository.commits[repository.head if revision == "main" else revision]
        return [file.entry(path) for path, file in files.items()]

    def preupload(self, name: str, revision: str, *, body: bytes) -> object:
        repository = self.repository(name)
        self.may_write(name.partition("/")[0])
        answers = []
        for file in json.loads(body)["files"]:
            old = repository.files.get(file["path"])
            oid = None if old is None else old.sha256 if old.lfs else old.entry("")["oid"]
            mode = "lfs" if file["size"] >= LFS_FROM else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def lfs_batch(self, name: str, *, body: bytes) -> object:
        self.repository(name)
        objects = []
        for each in json.loads(body)["objects"]:
            oid, place = each["oid"], f"{self.hub.address}/lfs/{each['oid']}"
            entry: dict[str, Any] = {"oid": oid, "size": each["size"]}
            if oid not in self.hub.objects:
                upload: dict[str, Any] = {"href": place}
                if self.hub.part_bytes is not None and each["size"] > self.hub.part_bytes:
                    count = -(-each["size"] // self.hub.part_bytes)
                    urls = {str(number): f"{place}/{number}" for number in range(1, count + 1)}
                    upload = {"href": f"{place}/complete", "header": {"chunk_size": str(self.hub.part_bytes), **urls}}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{place}/verify"}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str, *, body: bytes) -> object:
        self.hub.objects[oid] = body
        return {}

    def lfs_put_part(self, oid: str, number: str, *, body: bytes) -> object:
        self.hub.parts.setdefault(oid, {})[int(number)] = body
        return {"_headers": {"ETag": f"part-{number}"}}

    def lfs_complete(self, oid: str, *, body: bytes) -> object:
        parts = self.hub.parts.pop(oid)
        assert [part["partNumber"] for part in json.loads(body)["parts"]] == sorted(parts)
        self.hub.objects[oid] = b"".join(parts[number] for number in sorted(parts))
        return {}

    def lfs_verify(self, oid: str, *, body: bytes) -> object:
        if len(self.hub.objects[oid]) != json.loads(body)["size"]:
            raise Refusal(422, "wrong size")
        return {}

    def commit(self, name: str, revision: str, *, body: bytes) -> object:
        repository = self.repository(name)
        self.may_write(name.partition("/")[0])
        files = dict(repository.files)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit", repository.head) != repository.head:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            if item["key"] == "file":
                files[value["path"]] = self.hub.store(value["path"], base64.b64decode(value["content"]))
            if item["key"] == "lfsFile":
                files[value["path"]] = self.lfs_file(value)
        repository.commit(files)
        return {"commitUrl": f"{self.hub.address}/{name}/commit/{repository.head}", "commitOid": repository.head}

    def lfs_file(self, value: Mapping[str, Any]) -> StoredFile:
        if value["oid"] in self.hub.objects:
            return self.hub.store(value["path"], self.hub.objects[value["oid"]])
        if not self.hub.blocks:
            raise Refusal(400, f"LFS object {value['oid']} was not uploaded")
        oid = value["oid"] if value["path"] != self.hub.damage else hashlib.sha256(b"damaged").hexdigest()
        return StoredFile(None, value["size"], oid, lfs=True)

    def xet_token(self, name: str, revision: str, *, body: bytes) -> object:
        self.repository(name)
        expires = int(time.time()) + 3600
        return {"accessToken": "xet", "exp": expires, "casUrl": self.hub.address}

    def xet_unknown(self, chunk: str, *, body: bytes) -> object:
        raise Refusal(404, "no such chunk")

    def xet_block(self, block: str, *, body: bytes) -> object:
        new = block not in self.hub.blocks
        self.hub.blocks[block] = body
        return {"was_inserted": new}

    def xet_shard(self, *, body: bytes) -> object:
        self.hub.blocks[f"shard-{len(self.hub.blocks)}"] = body
        return {"result": 1}
