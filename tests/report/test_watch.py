"""The server of --watch answers this machine alone, and sends news if the files of the run have changed."""

import json
import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse

import pytest

from lora_cli.errors import LoraError
from lora_cli.report.watch import PageServer, Snapshot, Watch, make_server


@pytest.fixture
def versions() -> list[str]:
    return ["1"]


@pytest.fixture
def server(versions: list[str]) -> Iterator[PageServer]:
    def snapshot() -> Snapshot:
        return Snapshot(versions[-1], "<p>\ud800</p>", {"data": versions[-1]})

    server = make_server(Watch(lambda: versions[-1], snapshot), port=0)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(server: PageServer, path: str, **headers: str) -> tuple[HTTPResponse, bytes]:
    connection = HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    connection.request("GET", path.replace("TOKEN", server.token), headers=headers)
    answer = connection.getresponse()
    return answer, answer.read()


def test_it_sends_the_page_and_news(server: PageServer, versions: list[str]):
    answer, body = ask(server, "/TOKEN/")
    assert (answer.status, body) == (200, b"<p>?</p>")
    answer, body = ask(server, "/TOKEN/news?version=")
    assert json.loads(body) == {"version": "1", "data": "1"}
    assert ask(server, "/TOKEN/news?version=1")[0].status == 204
    versions.append("2")
    assert json.loads(ask(server, "/TOKEN/news?version=1")[1])["data"] == "2"
    for path in ("/", "/news", "/TOKEN", "/TOKEN/../etc/passwd"):
        assert ask(server, path)[0].status == 404


def test_it_answers_to_the_name_of_this_machine_alone(server: PageServer):
    assert server.server_address[0] == "127.0.0.1"
    port = server.server_address[1]
    assert ask(server, "/TOKEN/", Host=f"localhost:{port}")[0].status == 200
    assert ask(server, "/TOKEN/", Host=f"example.org:{port}")[0].status == 403


def test_a_port_in_use_is_an_error(server: PageServer, versions: list[str]):
    with pytest.raises(LoraError, match="cannot be used"):
        make_server(Watch(lambda: "", lambda: Snapshot("", "", {})), port=int(server.server_address[1]))
