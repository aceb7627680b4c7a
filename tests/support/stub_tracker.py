"""The process of a tracker whose library is a stub: `python -m tests.support.stub_tracker STAGE FAULT DESCRIPTOR`.

At the first call of STAGE (start, log, upload, finish), the library does what FAULT names; else it writes each value
to `stored.txt` in the run folder. It needs neither torch nor Accelerate, so a process starts in 0.2 s.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

SECRETS = ("s3cret-pass", "0123456789abcdef0123456789abcdef01234567", "of-the-environment")
REPEATED = 100_000  # lines of 100 characters


def open_files(path: str) -> None:
    for _ in range(8):
        os.open(path, os.O_RDWR)


def close_files() -> None:
    os.closerange(3, 1024)
    os.chdir("/")
    open_files("/dev/zero")  # under the numbers of the closed ones


def close_all_files() -> None:
    os.closerange(0, 1024)
    open_files(os.devnull)


def leave_a_fork() -> None:
    """Leave a process with all files of this one, and end."""
    if os.fork():
        os.kill(os.getpid(), signal.SIGKILL)
    os.setsid()
    time.sleep(30)


def become_a_daemon() -> None:
    if os.fork():
        os._exit(0)
    os.setsid()


def leave_a_daemon() -> None:
    """Leave a process of another session that keeps what this one prints to."""
    subprocess.Popen(["sleep", "30"], start_new_session=True)


def read_input() -> None:
    Path("input.txt").write_text(repr(sys.stdin.read()))


def print_secrets() -> None:
    """Print from Python, from a process, and in an exception."""
    first, second, third = SECRETS
    print(f"GET http://user:{first}@host/path?sig={first} key {second}\r10 %\r20 %", flush=True)
    subprocess.run(["echo", f"in a process: {third} wandb_api_key={second}"], check=True)
    raise ConnectionError(f"refused: https://user:{first}@host/x?token={second} {third}")


def print_much() -> None:
    sys.stdout.write(("x" * 99 + "\n") * REPEATED)
    sys.stdout.write("y" * 5_000_000)
    sys.stdout.flush()


def limit_files() -> None:
    """Leave too few files for anything to be opened, until a second later."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    threading.Timer(1.0, resource.setrlimit, (resource.RLIMIT_NOFILE, (256, hard))).start()


def fill_the_disk() -> None:
    """Let no file grow, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def kill_children() -> None:
    subprocess.run(["pkill", "-KILL", "-P", str(os.getpid()), "python"], check=False)
    time.sleep(0.3)
    for _ in range(3):
        print("printed afterwards", flush=True)


def raise_cancelled() -> None:
    import asyncio

    raise asyncio.CancelledError


def do_nothing() -> None:
    pass


FAULTS: dict[str, Callable[[], None]] = {
    "nothing": do_nothing,
    "close": close_files,
    "close_all": close_all_files,
    "fork": leave_a_fork,
    "daemonise": become_a_daemon,
    "daemon": leave_a_daemon,
    "stdin": read_input,
    "secrets": print_secrets,
    "much": print_much,
    "files": limit_files,
    "disk": fill_the_disk,
    "children": kill_children,
    "cancelled": raise_cancelled,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(3600),
    "signals": lambda: os.kill(os.getpid(), 40),
}


class Library:
    """What tracker_process.py uses of `trackers.py`, and of Accelerate's object in it."""

    def __init__(self, stage: str, fault: str) -> None:
        self.stage, self.fault = stage, fault
        self.folder: Path | None = None

    def at(self, stage: str) -> None:
        if stage == self.stage:
            self.stage = ""
            FAULTS[self.fault]()

    def start(self, job: Any) -> "Library":
        self.folder = job.run.absolute()
        self.at("start")
        return self

    def log(self, values: dict[str, float], *, step: int) -> None:
        self.at("log")
        assert self.folder is not None
        descriptor = os.open(self.folder / "stored.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with suppress(OSError):  # a server does not need this machine's disk
            os.write(descriptor, f"{step} {json.dumps(values)}\n".encode())
        os.close(descriptor)

    def upload(self, _: Any, __: Any, folder: Path) -> None:
        self.at("upload")
        assert self.folder is not None
        (self.folder / "uploaded.txt").write_text(" ".join(sorted(os.listdir(folder))))

    def finish(self, _: Any, status: str) -> None:
        self.at("finish")


def main() -> None:
    from lora_cli.training import tracker_process

    library = Library(*sys.argv[1:3])
    entry = SimpleNamespace(
        run_id=lambda _: "id",
        place=lambda _, __: "here",
        send_config=lambda *_: None,
        upload=library.upload,
        finish=library.finish,
    )
    module = ModuleType("lora_cli.training.trackers")
    vars(module).update(start=library.start, TABLE={"wandb": entry, "tensorboard": entry})
    sys.modules[module.__name__] = module
    tracker_process.main()


if __name__ == "__main__":
    main()
