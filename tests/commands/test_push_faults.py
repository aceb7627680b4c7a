"""`lora push` ends in a bounded time, whatever the hub does, and says what is not there; run again, it goes on."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hf_xet
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _xet

from lora_cli.run import hub_limits
from tests.commands.conftest import Lora
from tests.support.stub_hub import Refusal, StubHub

pytestmark = pytest.mark.slow
REPOSITORY = "me/adapter"
AGAIN = "run the command again: what has arrived is not uploaded twice"
NOT_THERE = (
    f"not in {REPOSITORY}: README.md, adapter_config.json, adapter_model.safetensors, chat_template.jinja, "
    "checksums.json, tokenizer.json, tokenizer_config.json, trained_on.json ("
)


@pytest.mark.parametrize(
    ("place", "refusal", "time"),
    [
        ("PUT /lfs/", Refusal(429, headers={"Retry-After": "3600"}), "60 minutes (429)"),
        ("/commit/", Refusal(503, headers={"Retry-After": "90"}), "90 s (503)"),
        ("/preupload/", Refusal(429, headers={"RateLimit": '"api";r=0;t=290'}), "5 minutes (429)"),
    ],
)
def test_a_server_that_asks_for_a_long_wait(
    place: str, refusal: Refusal, time: str, trained_run: Path, lora: Lora, hub: StubHub
):
    hub.break_at = lambda request: refusal if place in request else None
    result = lora("push", trained_run, REPOSITORY)
    assert result.code == 1
    details, *error = result.err.splitlines()[-3:]
    assert error == [
        f"error: {REPOSITORY}: 127.0.0.1 takes no more requests for {time}",
        f"hint: wait, and then {AGAIN}",
    ]
    assert details.startswith(NOT_THERE)
    assert hub.count(place) <= 2, "the adapter and the tokenizer are sent side by side"
    hub.break_at = lambda request: None
    assert lora("push", trained_run, REPOSITORY).code == 0


def test_a_commit_whose_answer_is_lost_is_there(trained_run: Path, lora: Lora, hub: StubHub):
    hub.lose = "POST .*/commit/"
    result = lora("push", trained_run, REPOSITORY)
    assert result.code == 0, result.err
    assert f"note: {REPOSITORY}: the upload failed: " in result.err
    assert result.out.splitlines()[-1].endswith(f"commit {hub.repositories[REPOSITORY].head}")


@contextmanager
def silence(hub: StubHub, part: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within the block, requests with `part` in them get no answer, and the client waits for none for long."""
    monkeypatch.setattr(hub_limits, "ANSWER_S", 0.2)
    end = threading.Event()
    hub.break_at = lambda request: Refusal(410) if part in request and end.wait(30) else None
    yield
    end.set()


def test_a_server_that_takes_a_file_and_keeps_silent(
    trained_run: Path, lora: Lora, hub: StubHub, monkeypatch: pytest.MonkeyPatch
):
    with silence(hub, "PUT /lfs/", monkeypatch):
        result = lora("push", trained_run, REPOSITORY)
    assert result.err.count("127.0.0.1 has not answered: trying again") <= 2  # of the adapter, and of the tokenizer
    assert result.last_two[0].startswith(f"error: {REPOSITORY}: 127.0.0.1 does not answer: asked again and again for ")
    assert result.last_two[1] == f"hint: check the network, and {AGAIN}"
    assert NOT_THERE in result.err
    assert "http" not in result.err.partition("uploading")[2], "addresses of files can be signed ones"


def test_a_hub_that_does_not_say_whose_token_it_is(
    trained_run: Path, lora: Lora, hub: StubHub, monkeypatch: pytest.MonkeyPatch
):
    with silence(hub, "whoami", monkeypatch):
        result = lora("push", trained_run, REPOSITORY)
    assert result.last_two == ["error: the hub does not say whose token it is: no answer in time", f"hint: {AGAIN}"]


def test_a_token_that_expires_meanwhile(trained_run: Path, lora: Lora, hub: StubHub):
    hub.break_at = lambda request: Refusal(401, "token expired") if "/commit/" in request else None
    result = lora("push", trained_run, REPOSITORY)
    assert result.last_two[0] == f"error: {REPOSITORY}: the hub does not accept the token any more (401): token expired"
    assert result.last_two[1].endswith(f"; then {AGAIN}")


def test_the_storage_of_large_files_is_out_of_order(
    trained_run: Path, lora: Lora, hub: StubHub, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(_xet, "_GLOBAL_XET_HOLDER", _xet.XetSessionHolder())  # it reads the environment once
    for name in ("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "HF_XET_CLIENT_READ_TIMEOUT"):
        monkeypatch.setenv(name, "")  # so that it is removed afterwards
        monkeypatch.delenv(name)
    assert hub_limits.XET_RETRIES == "3"  # by default 5, with pauses that grow threefold: minutes
    monkeypatch.setattr(hub_limits, "XET_RETRIES", "0")
    hub.break_at = lambda request: Refusal(500) if "/v1/xorbs/" in request else None
    result = lora("push", trained_run, REPOSITORY)
    assert result.code == 1
    assert hub.count("/v1/xorbs/") == 1
    assert hf_xet.XetConfig().get("client.read_timeout").seconds == 61, "of 55 KiB"
    assert result.last_two[0].startswith(f"error: {REPOSITORY}: the upload failed: Server error"), result.err
    assert NOT_THERE in result.err


def test_an_upload_that_never_ends_is_ended(
    trained_run: Path, lora: Lora, hub: StubHub, monkeypatch: pytest.MonkeyPatch
):
    """The time is up while a file is sent. By the end of the process, in place of which the server goes on here."""
    times, first = list[float](), threading.Lock()
    ended: list[tuple[int, list[str]]] = []

    class Timer(threading.Timer):
        def start(self) -> None:
            times.append(self.interval)
            hub.break_at = self.end

        def end(self, request: str) -> None:
            if "PUT /lfs/" in request and first.acquire(blocking=False):
                self.function(*self.args)

    monkeypatch.setattr(threading, "Timer", Timer)
    monkeypatch.setattr(hub_limits, "end_process", lambda code, lines: ended.append((code, lines)))
    result = lora("push", trained_run, REPOSITORY, "--json")
    ((code, (details, error, hint)),) = ended
    assert code == 1
    assert 600 < times[0] < 602, "of 55 KiB"
    assert details.startswith(f"perhaps {NOT_THERE}")
    assert error == f"error: {REPOSITORY}: the upload has not ended after 10 minutes"
    assert hint == f"hint: check the network, and {AGAIN}"
    document = json.JSONDecoder().raw_decode(result.out)[0]
    assert (document["error"], document["exit_code"]) == (error.removeprefix("error: "), 1)
