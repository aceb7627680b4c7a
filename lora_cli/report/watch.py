"""`lora report --watch`: serve the page of runs that are in training, to this machine alone. No torch."""

import json
import secrets
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

from lora_cli.errors import LoraError, first_line
from lora_cli.run import console

ADDRESS = "127.0.0.1"


class Snapshot(NamedTuple):
    """The page at one moment."""

    version: str  # changes if the files of the runs change
    page: str
    news: dict[str, object]  # what the script of the page replaces: data, parts, changed


class Watch(NamedTuple):
    """What the server shows."""

    version: Callable[[], str]  # cheap: by the sizes and times of files
    snapshot: Callable[[], Snapshot]


class PageServer(ThreadingHTTPServer):
    """A server of this machine's loopback address; only who knows its address gets the page."""

    # Other users of this machine reach the port too.
    token = ""

    @property
    def address(self) -> str:
        """The address of the page."""
        return f"http://{ADDRESS}:{self.server_address[1]}/{self.token}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """Print one line, and nothing if the browser has left meanwhile."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, ConnectionError):
            console.info(f"the page could not be sent: {first_line(error)}")


def make_server(watch: Watch, *, port: int) -> PageServer:
    """Return a server of the page, not started; port 0 takes a free one.

    Raises:
        LoraError: the port is in use.
    """

    token = secrets.token_urlsafe(16)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page of another site could make a browser ask this server under the site's own name.
            host = (self.headers.get("Host") or "").rpartition(":")[0]
            if host not in (ADDRESS, "localhost"):
                self._send(HTTPStatus.FORBIDDEN, "text/plain", b"this server answers to localhost alone\n")
                return
            url = urlsplit(self.path)
            if url.path == f"/{token}/":
                self._send(HTTPStatus.OK, "text/html; charset=utf-8", _encode(watch.snapshot().page))
            elif url.path == f"/{token}/news":
                self._send_news(parse_qs(url.query).get("version", [""])[0])
            else:
                self._send(HTTPStatus.NOT_FOUND, "text/plain", b"not found\n")

        def _send_news(self, known: str) -> None:
            if watch.version() == known:
                self._send(HTTPStatus.NO_CONTENT, "text/plain", b"")
                return
            snapshot = watch.snapshot()
            body = json.dumps({"version": snapshot.version, **snapshot.news}).encode()
            self._send(HTTPStatus.OK, "application/json", body)

        def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing: a line for each request would hide the address."""

    try:
        server = PageServer((ADDRESS, port), Handler)
    except OSError as error:
        raise LoraError(f"--port {port} cannot be used: {error.strerror}", hint="leave it out for a free one") from None
    server.token = token
    return server


def _encode(page: str) -> bytes:
    """Return the bytes of a page; halves of surrogate pairs, which JSON of a model's text can have, become `?`."""
    return page.encode("utf-8", errors="replace")
