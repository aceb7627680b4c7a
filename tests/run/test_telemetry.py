"""No telemetry: the libraries' own is off, unless the user has switched it on, and no request of it is made."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest

import lora_cli
from lora_cli.run.telemetry import VARIABLES, switch_off_telemetry

ROOT = Path(lora_cli.__file__).parents[1]


class Requests(BaseHTTPRequestHandler):
    """Answers 404 to every request, and keeps its path and user agent."""

    seen: list[tuple[str, str]]

    def do_HEAD(self) -> None:
        self.seen.append((self.path, self.headers.get("user-agent", "")))
        self.send_response(404)
        self.send_header("content-length", "0")
        self.end_headers()

    do_GET = do_POST = do_HEAD

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[dict[str, str], list[tuple[str, str]]]]:
    """The environment of a process whose hub is a server here, and the requests that this one gets."""
    Requests.seen = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Requests) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        unset = {*VARIABLES, "DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_OFFLINE"}
        environment = {name: value for name, value in os.environ.items() if name not in unset}
        environment |= {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"),
            "LORA_CACHE": str(tmp_path / "lora"), "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        yield environment, Requests.seen
        server.shutdown()


SEND = """
import time
{setup}
from huggingface_hub.utils import send_telemetry
send_telemetry("lora-test")
time.sleep(1)
"""


@pytest.mark.slow
def test_the_hubs_telemetry_is_off(hub: tuple[dict[str, str], list[tuple[str, str]]]):
    environment, seen = hub
    off = "from lora_cli.run.telemetry import switch_off_telemetry; switch_off_telemetry()"
    subprocess.run([sys.executable, "-c", SEND.format(setup=off)], env=environment, check=True)
    assert seen == []
    subprocess.run([sys.executable, "-c", SEND.format(setup="")], env=environment, check=True)
    sent = [path for path, _ in seen if path.startswith("/api/telemetry/lora-test")]
    assert sent, "the request that the first process did not make"


# Prints at its end what was imported beside what the command uses, and how often garbage was collected.
LISTING_LORA = """
import atexit, gc, sys
unused = {"torch._inductor.compile_fx", "networkx", "pandas", "sklearn", "datasets"}
atexit.register(lambda: print(*sorted(unused & sys.modules.keys()), gc.get_stats()[0]["collections"]))
from lora_cli.__main__ import main
main()
"""


@pytest.mark.slow
def test_a_command_makes_no_request_of_telemetry_and_imports_what_it_uses(
    hub: tuple[dict[str, str], list[tuple[str, str]]], tmp_path: Path
):
    environment, seen = hub
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a row"}) + "\n")
    recipe = {"model": {"path": "org/name"}, "data": {"train": "rows.jsonl"}, "output": "run"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-c", LISTING_LORA, "check", "recipe.yaml"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert seen, "the model is looked for"
    assert all("org/name" in path for path, _ in seen), seen
    of_transformers = [agent for _, agent in seen if "transformers/" in agent]
    assert of_transformers, seen
    assert all("telemetry/off" in agent and "; agent/" not in agent for agent in of_transformers), seen
    assert int(done.stdout) < 300, "collections; more than 1,000 without `quick_imports`"
    assert "leaked" not in done.stderr, "what Triton says of objects that are left at the end"


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    switch_off_telemetry()
    assert {name: os.environ[name] for name in VARIABLES} == {**VARIABLES, "ORT_DISABLE_TELEMETRY": "0"}


def test_onnxruntime_reads_its_variable():
    spec = find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    libraries = list((Path(spec.origin).parent / "capi").glob("onnxruntime_pybind11_state*.so"))
    content = libraries[0].read_bytes()
    assert b"ORT_DISABLE_TELEMETRY\0" in content, "is it called otherwise now? then change run/telemetry.py"
