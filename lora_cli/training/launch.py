"""Distributed launch (DDP): start one worker per GPU on this machine, or join the workers of torchrun or accelerate."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, but not in __all__
from torch.distributed.distributed_c10d import _set_pg_timeout

from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DistributedSpec
from lora_cli.run.signals import LAUNCHED, SIGNALS, receive_signals
from lora_cli.training.cpu import available_cores
from lora_cli.training.gpu import link_settings, set_up_allocator, set_up_determinism

# The first process may write or unpack files for hours while the others wait. A process that dies is noticed without a
# timeout: its peers get a closed connection, or the launcher ends them.
PREPARING_TIMEOUT = timedelta(days=1)
WORKER = (sys.executable, "-m", "lora_cli")  # its command, before the arguments
POLL_S = 0.1  # seconds between two looks at the workers
# What the other workers get after one has failed, in seconds from then. The second SIGTERM ends a process at once.
PEER_ENDINGS = ((0, signal.SIGTERM), (2, signal.SIGTERM), (30, signal.SIGKILL))
STOPPING_S = 10  # seconds that workers which a signal has stopped may end after each other


def is_worker() -> bool:
    """Return whether torchrun, `accelerate launch` or `launch_workers` started this process as a worker."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def join_processes(*, cpu: bool, deterministic: bool = False) -> Accelerator:
    """Join the process group and return the Accelerator of this process; `deterministic` is about GPUs."""
    set_up_allocator()
    if deterministic and not cpu:
        set_up_determinism()
    return Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=PREPARING_TIMEOUT)])


def local_world_size(accelerator: Accelerator) -> int:
    """Return the number of processes on this machine, which is less than the world size of a multi-machine run."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes)


def set_timeout(timeout: timedelta) -> None:
    """Set how long this process waits for others in the operations that follow; all processes must call it.

    Its default is PREPARING_TIMEOUT. It does nothing in a run of one process.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _set_pg_timeout(timeout)


@contextmanager
def one_works_alone(timeout: timedelta) -> Iterator[None]:
    """Within the block, wait as long as it takes while one process works; afterwards again for `timeout`."""
    set_timeout(PREPARING_TIMEOUT)
    yield
    set_timeout(timeout)


@contextmanager
def report_lost_peer() -> Iterator[None]:
    """Within the block, report a lost or hanging peer as an error without traceback.

    Raises:
        LoraError: another process of the run has ended, which has printed its own reason, or does not answer.
    """
    try:
        yield
    except RuntimeError as error:  # gloo has no exception class of its own
        if any(text in str(error) for text in ("Timed out waiting", "timed out in")):
            raise LoraError(
                "a process of this run has not answered within distributed.timeout_minutes",
                hint="see what its machine and GPU do; if it only was slow, raise distributed.timeout_minutes",
                exit_code=1,
            ) from None
        if not any(text in str(error) for text in ("reset by peer", "closed by peer", "Broken pipe")):
            raise
        time.sleep(5)  # a launcher ends this process in this time and names the process that failed first
        raise LoraError("another process of this run has ended", hint="see its messages", exit_code=1) from None


def resolve_processes(spec: DistributedSpec) -> int:
    """Return the number of processes to start on this machine.

    Raises:
        LoraError: `distributed.processes` is more than the number of GPUs.
    """
    gpus = torch.cuda.device_count()
    if spec.processes == "auto":
        return max(1, gpus)
    if gpus and spec.processes > gpus:
        raise LoraError(
            f"distributed.processes: {spec.processes}, but this machine has {gpus} GPU{'s' * (gpus > 1)}",
            hint=f"write at most {gpus}, or auto",
        )
    return spec.processes


def launch_workers(processes: int, arguments: list[str]) -> int:
    """Run `lora ARGUMENTS` in `processes` workers on this machine.

    Signals are passed on to the workers, which stop after the current step at the first one. If a worker fails, the
    others are ended: without it they cannot finish the step. If this process is killed, the workers stop as after
    SIGTERM.

    Returns:
        0, the exit code of the first worker that failed, or 128 + the number of the signal that stopped them.
    """
    # The workers meet at this store. It has a free port from the start, and no other program can take that port.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the first worker makes no store of its own
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        # torch would use all cores in each worker; the workers then set their own number.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, available_cores() // processes)),
        LAUNCHED: "1",
        **link_settings(),
    }
    received: list[signal.Signals] = []

    def receive(number: signal.Signals) -> bool:
        received.append(number)
        return True

    with receive_signals(receive):
        workers = [_start_worker(rank, arguments, environment) for rank in range(processes)]
        failed = _wait(workers, received)
    if failed is None:
        return 0
    return 128 + received[0] if received else _exit_code(workers[failed])


def _start_worker(rank: int, arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    # A worker that has just started would die of a signal with a traceback: it waits until the worker can handle it.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return subprocess.Popen(
            [*WORKER, *arguments],
            stdin=subprocess.PIPE,  # its end tells the worker that this process has ended
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # Ctrl-C at the terminal reaches the workers only through this process
        )
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _wait(workers: list[subprocess.Popen[bytes]], received: list[signal.Signals]) -> int | None:
    """Pass on signals until all workers have ended; return the rank of the first that failed, or None."""
    passed_on = 0
    failed: int | None = None
    endings: list[tuple[float, signal.Signals]] = []
    while any(worker.poll() is None for worker in workers):
        for number in received[passed_on:]:
            _send(workers, number)
            passed_on += 1
        if failed is None and (failed := _first_failed(workers)) is not None:
            if not received:
                sys.stderr.write(f"process {failed} ended with exit code {_exit_code(workers[failed])}\n")
            start = time.monotonic() + (STOPPING_S if received else 0)
            endings = [(start + seconds, number) for seconds, number in PEER_ENDINGS]
        while endings and time.monotonic() >= endings[0][0]:
            _send(workers, endings.pop(0)[1])
        time.sleep(POLL_S)
    return _first_failed(workers) if failed is None else failed


def _first_failed(workers: list[subprocess.Popen[bytes]]) -> int | None:
    return next((rank for rank, worker in enumerate(workers) if worker.poll()), None)


def _send(workers: list[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for worker in workers:
        worker.send_signal(number)  # does nothing if the worker has ended


def _exit_code(worker: subprocess.Popen[bytes]) -> int:
    return worker.returncode if worker.returncode >= 0 else 128 - worker.returncode  # 128 + signal, as in a shell
