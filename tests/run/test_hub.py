"""A hub that does not answer is asked twice in 5 seconds, and then only the cache is used."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants

from lora_cli.run import hub


class Status(BaseHTTPRequestHandler):
    """Answers every request with the status in `code`."""

    code = 200

    def do_HEAD(self) -> None:
        self.send_response(self.code)
        self.send_header("content-length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without HF_HUB_OFFLINE; what the functions change is changed back."""
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv(hub.BEFORE, "")  # so that it is removed afterwards
    monkeypatch.delenv(hub.BEFORE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_answers", {})


def use_hub(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the libraries, which have read HF_ENDPOINT when they were imported, use the hub at `address`."""
    import datasets

    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a port at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    use_hub(address, monkeypatch)
    return address


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that accepts connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        use_hub(address, monkeypatch)
        yield address


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Status]]:
    """A server that answers with `Status.code`."""
    with HTTPServer(("127.0.0.1", 0), Status) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        use_hub(f"http://127.0.0.1:{server.server_port}", monkeypatch)
        yield Status
        server.shutdown()


@pytest.mark.slow
def test_a_refused_connection_is_tried_again_once_and_told(refused: str):
    lines, before = list[str](), dict(os.environ)
    assert hub.ask_hub(lines.append) == f"{refused}: Connection refused"
    assert lines == [f"the hub ({refused}) does not answer (Connection refused): trying again"]
    assert huggingface_hub.is_offline_mode()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert hub.environment_of_others() == {**before, "HF_HUB_OFFLINE": "0"}
    assert hub.ask_hub(lines.append) == f"{refused}: Connection refused"
    assert len(lines) == 1, "it is asked once in a process"


@pytest.mark.slow
def test_a_server_that_never_answers_costs_less_than_5_seconds(silent: str):
    lines: list[str] = []
    start = time.monotonic()
    assert hub.ask_hub(lines.append) == f"{silent}: no answer"
    assert 4 < time.monotonic() - start < 6
    assert lines == [f"the hub ({silent}) does not answer (no answer): trying again"]


@pytest.mark.parametrize("code", [200, 302, 401, 404, 429])
def test_any_answer_of_a_working_server_is_one(code: int, answering: type[Status], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answering, "code", code)
    assert hub.ask_hub(pytest.fail) is None
    assert not huggingface_hub.is_offline_mode()


@pytest.mark.slow
def test_a_late_answer_to_the_first_attempt_counts(silent: str, monkeypatch: pytest.MonkeyPatch):
    answers = iter([2.0, 60.0])

    def ask(_: str) -> str | None:
        time.sleep(next(answers))
        return None

    monkeypatch.setattr(hub, "_ask", ask)
    assert hub.ask_hub(lambda _: None) is None


@pytest.mark.slow
def test_a_server_that_is_out_of_order_does_not_answer(answering: type[Status], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answering, "code", 503)
    assert str(hub.ask_hub(lambda _: None)).endswith(": HTTP status 503")


@pytest.mark.parametrize("value", ["", "1"])
def test_what_the_user_has_set_holds_for_other_programs_too(value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", value) if value else monkeypatch.delenv("HF_HUB_OFFLINE")
    assert hub.environment_of_others() == dict(os.environ)


def test_offline_nothing_is_asked(silent: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.ask_hub(pytest.fail) is None
