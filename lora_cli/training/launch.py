"""Launch one worker per GPU on this machine, end all when one fails, and start them again if requested."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, but not in __all__

from lora_cli.errors import LoraError
from lora_cli.model.memory import PROCESS_BYTES, available_memory
from lora_cli.recipe.schema import DistributedSpec
from lora_cli.run import console
from lora_cli.run.console import format_bytes
from lora_cli.run.print_error import print_error
from lora_cli.run.signals import LAUNCHED, SIGNALS, receive_signals
from lora_cli.run.standard_input import BYTES, text_for_workers
from lora_cli.training.cpu import available_cores
from lora_cli.training.gpu import link_settings
from lora_cli.training.peers import FORM, lasting_store, wanted_form
from lora_cli.training.process_group import SUPERVISED

WORKER = (sys.executable, "-m", "lora_cli")  # its command, before the arguments
POLL_S = 0.1  # seconds between two looks at the workers
# What the other workers get after one has failed, in seconds from then. The second SIGTERM ends a process at once.
PEER_ENDINGS = ((0, signal.SIGTERM), (2, signal.SIGTERM), (30, signal.SIGKILL))
STOPPING_S = 10  # seconds that workers which a signal has stopped may end after each other
REPORTED = (1, 2)  # exit codes of a worker that has printed its error
# What the signal that ended a worker means, where that is not the signal's own name.
SIGNAL_HINTS = {
    signal.SIGKILL: "if nobody sent it, the system was out of memory: see `dmesg`; a smaller batch or fewer processes "
    "need less",
    signal.SIGABRT: "a library ended it: see the messages above; NCCL does so when a GPU or a connection does not "
    "answer, and NCCL_DEBUG=INFO prints more",
    signal.SIGSEGV: "a library has crashed: PYTHONFAULTHANDLER=1 prints where",
    signal.SIGBUS: "a library has crashed, as where /dev/shm is full: start a container with --shm-size 1g or more",
}


class Outcome(NamedTuple):
    """How the workers of one start have ended."""

    exit_code: int
    stopped: bool = False  # by a signal to the launcher
    form: dict[str, Any] | None = None  # of the memory ladder, in which a worker has asked for another start

    @property
    def may_restart(self) -> bool:
        """Whether another start could go further: not after success, a signal, or an error of recipe or data."""
        of_signals = [128 + number for number in SIGNALS]  # sent to a worker
        return not self.stopped and self.exit_code not in (0, 2, *of_signals)


def resolve_processes(spec: DistributedSpec) -> int:
    """Return the number of processes to start on this machine.

    Raises:
        LoraError: `distributed.processes` is more than the number of GPUs, or than the host memory has room for.
    """
    gpus = torch.cuda.device_count()
    if spec.processes == "auto":
        return max(1, gpus)
    need, free = spec.processes * PROCESS_BYTES, available_memory(torch.device("cpu"))
    if not gpus and spec.processes > 1 and need > free:
        raise LoraError(
            f"distributed.processes: {spec.processes:,} processes take {format_bytes(need)} for Python and its "
            f"libraries alone, and {format_bytes(free)} is free",
            hint=f"write at most {max(1, free // PROCESS_BYTES)}",
        )
    if gpus and spec.processes > gpus:
        raise LoraError(
            f"distributed.processes: {spec.processes}, but this machine has {gpus} GPU{'s' * (gpus > 1)}",
            hint=f"write at most {gpus}, or auto",
        )
    return spec.processes


def launch_with_restarts(
    processes: int, arguments: list[str], *, max_restarts: int, resume_arguments: Callable[[], list[str]]
) -> int:
    """Run `lora ARGUMENTS` as `launch_workers` does; after a worker has died, start all again, `max_restarts` times.

    A start for which a worker has asked, because it ran out of memory in a step of a sharded base, does not count: each
    takes a form that needs less, of which there are few.

    Args:
        processes: number of workers.
        arguments: of the first start.
        max_restarts: starts after the first; 0: none.
        resume_arguments: returns the arguments of a further start, which continues the run as far as it got.

    Returns:
        The exit code of the last start.
    """
    restarts, form = 0, None
    while True:
        outcome = launch_workers(processes, arguments, form=form)
        if outcome.form is not None and not outcome.stopped:
            form = outcome.form
        elif restarts < max_restarts and outcome.may_restart:
            restarts += 1
            workers = f"all {processes} processes" if processes > 1 else "the process"
            console.info(f"starting {workers} again, from the newest checkpoint: restart {restarts} of {max_restarts}")
        else:
            return outcome.exit_code
        arguments = resume_arguments()


def launch_workers(processes: int, arguments: list[str], *, form: dict[str, Any] | None = None) -> Outcome:
    """Run `lora ARGUMENTS` in `processes` workers on this machine, in a `form` of the memory ladder or a smaller one.

    Signals are passed on to the workers, which stop after the current step at the first one. If a worker fails, the
    others are ended: without it they cannot finish the step. If this process is killed, the workers stop as after
    SIGTERM.

    Returns:
        With exit code 0, that of the first worker that failed, or 128 + the number of the signal that stopped them.
    """
    # The workers meet at this store. It has a free port from the start, and no other program can take that port.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    lasting = lasting_store(store)
    if form is not None:
        lasting.set(FORM, json.dumps(form))
    environment = os.environ | {
        # torch would use all cores in each worker; the workers then set their own number.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, available_cores() // processes)),
        LAUNCHED: "1",
        BYTES: str(len(text_for_workers())),
    }
    if processes == 1:
        environment[SUPERVISED] = "1"
    else:
        environment |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the first worker makes no store of its own
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
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
        return Outcome(0)
    code = 128 + received[0] if received else _exit_code(workers[failed])
    wanted = wanted_form(lasting)
    return Outcome(code, stopped=bool(received), form=None if wanted == form else wanted)


def _start_worker(rank: int, arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    ranks = {} if SUPERVISED in environment else {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    # A worker that has just started would die of a signal with a traceback: it waits until the worker can handle it.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        worker = subprocess.Popen(
            [*WORKER, *arguments],
            stdin=subprocess.PIPE,  # its end tells the worker that this process has ended
            env=environment | ranks,
            start_new_session=True,  # Ctrl-C at the terminal reaches the workers only through this process
        )
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if (text := text_for_workers()) and worker.stdin is not None:
        with suppress(BrokenPipeError):  # it has ended, which is reported
            worker.stdin.write(text)
            worker.stdin.flush()
    return worker


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
                _report(failed, workers[failed].returncode)
            start = time.monotonic() + (STOPPING_S if received else 0)
            endings = [(start + seconds, number) for seconds, number in PEER_ENDINGS]
        while endings and time.monotonic() >= endings[0][0]:
            _send(workers, endings.pop(0)[1])
        time.sleep(POLL_S)
    if failed is None and (failed := _first_failed(workers)) is not None and not received:
        _report(failed, workers[failed].returncode)
    return failed


def _report(rank: int, code: int) -> None:
    """Print how a worker has ended, unless it has printed its own error."""
    if code in REPORTED:
        return
    how, hint = f"ended with exit code {code}", None
    if code < 0:
        how, hint = f"was ended by {signal.Signals(-code).name}", SIGNAL_HINTS.get(signal.Signals(-code))
    elif code - 128 in SIGNALS:  # it has handled the signal, which somebody sent to it alone
        how = f"was stopped by {signal.Signals(code - 128).name}"
    print_error(LoraError(f"process {rank} ({socket.gethostname()}) {how}", hint=hint))


def _first_failed(workers: list[subprocess.Popen[bytes]]) -> int | None:
    return next((rank for rank, worker in enumerate(workers) if worker.poll()), None)


def _send(workers: list[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for worker in workers:
        worker.send_signal(number)  # does nothing if the worker has ended


def _exit_code(worker: subprocess.Popen[bytes]) -> int:
    return worker.returncode if worker.returncode >= 0 else 128 - worker.returncode  # 128 + signal, as in a shell
