"""Run functions in a forked process with limits of CPU time and memory: for code and files of unknown origin. No torch.

A process, because nothing less ends every kind of work. A signal handler of Python waits until a function of a library
returns, and a comparison of nested lists in C need not return in a lifetime; memory that a library cannot allocate
ends the whole process; a damaged file can crash its reader. Here all of this ends the child, and the caller gets
`Ended`.

The child is a fork, as torch's DataLoader makes them: it has everything imported, and starts in milliseconds. It runs
no kernels and no tokenizer, holds no file of its parent open, and ends with it.
"""

import fcntl
import gc
import itertools
import mmap
import os
import pickle
import resource
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, ParamSpec, TypeVar

from lora_cli.errors import LoraError

P = ParamSpec("P")
T = TypeVar("T")

# Memory for each byte of a request: a text is copied and widened (4 bytes per character) a few times.
MEMORY_PER_BYTE = 16
BUFFER_BYTES = 1 << 20  # results that wait for the parent while it does other work; kernels allow less


class Limits(NamedTuple):
    """What a function may use in the child."""

    cpu_s: float  # seconds of CPU time until the next item, see `restart_time_limit`
    memory: int  # bytes, in addition to what the process has when the request arrives


class Ended(Exception):
    """The child ended, or was ended, before the function returned.

    Attributes:
        reason: it used too much time or memory, or a library crashed.
        detail: what a message can say: `was stopped after 10 s of CPU time`.
        place: what the function last passed to `mark`: the index of a row.
    """

    def __init__(self, reason: Literal["time", "memory", "crash"], detail: str, place: int) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.place = place


_limits: Limits | None = None  # of this process, if it is a child
_place: mmap.mmap | None = None  # memory that the child shares with its parent: 8 bytes


def is_child() -> bool:
    """Return whether this process is a child of this module."""
    return _limits is not None


def restart_time_limit() -> None:
    """Give the rest of the work the whole time limit: for a function whose steps are bounded, not their number."""
    if _limits is not None:
        signal.setitimer(signal.ITIMER_PROF, _limits.cpu_s)


def mark(place: int) -> None:
    """Tell the parent where the work is, in case that the child ends there: see `Ended.place`."""
    if _place is not None:
        struct.pack_into("q", _place, 0, place)


class ChildProcess:
    """A child that is started with the first request, and again with the next one after it ended.

    A class, because the process and its pipe live from one request to the next.
    """

    def __init__(self, limits: Limits, errors: tuple[type[Exception], ...] = (LoraError,)) -> None:
        """`errors` are passed on to the caller of a function that raises them; others are bugs, and end the child."""
        self._limits = limits
        self._errors = errors
        self._child: _Child | None = None
        self._open = False  # a request has results that nobody has read
        self._has_frozen = False  # the objects of this process, until the child ends

    def call(self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Return what `function` returns in the child; function, arguments and result must be picklable.

        Raises:
            Ended: the child ended before.
            Exception: one of `errors`, raised by the function.
        """
        (result,) = self.stream(_only_result, function, arguments, options)
        return result

    def stream(self, function: Callable[P, Iterator[T]], *arguments: P.args, **options: P.kwargs) -> Iterator[T]:
        """Start `function` in the child now, and return an iterator over what it yields; ends it if closed early.

        The time limit is for each item, without the time in which the child waits for its parent. The next request
        ends one whose results have not been read.

        Raises:
            Ended: while iterated: the child ended before.
            Exception: while iterated: one of `errors`, raised by the function.
        """
        return self._results(self._send(_Request(function, arguments, options)))

    def close(self) -> None:
        """End the child, if there is one."""
        child, self._child, self._open = self._child, None, False
        if child is not None and child.owner == os.getpid():
            with suppress(BrokenPipeError):  # a part of a request may not have been written
                child.requests.close()
            child.process.kill()
            child.process.join()
            child.results.close()
            if self._has_frozen:
                gc.unfreeze()
                self._has_frozen = False

    def _started(self) -> "_Child":
        if self._child is None or self._child.owner != os.getpid():
            context = get_context("fork")
            (its_requests, requests), (results, its_results) = os.pipe(), os.pipe()
            _enlarge(results)
            place = mmap.mmap(-1, 8)
            arguments = (its_requests, its_results, place, self._limits, self._errors)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            # The garbage collector writes into every object that it looks at, and the two processes share each page
            # of memory until one writes into it: without this, the first collection would copy 100 MB.
            if gc.get_freeze_count() == 0:  # else the objects of the libraries are frozen, see `quick_imports`
                gc.freeze()
                self._has_frozen = True
            process.start()
            os.close(its_requests)
            os.close(its_results)
            streams = os.fdopen(requests, "wb"), os.fdopen(results, "rb", buffering=BUFFER_BYTES)
            self._child = _Child(process, *streams, place, os.getpid())
        return self._child

    def _send(self, request: "_Request") -> "_Child":
        if self._open:
            self.close()
        child = self._started()
        self._open = True
        try:
            _write(child.requests, request)
        except BrokenPipeError:  # it was ended while it waited, as by the kernel when memory was short
            self.close()
            child, self._open = self._started(), True
            _write(child.requests, request)
        return child

    def _results(self, child: "_Child") -> Iterator[Any]:
        finished = False
        try:
            while True:
                try:
                    kind, value = pickle.load(child.results)
                except (EOFError, pickle.UnpicklingError):  # its last message is not complete
                    raise self._ended(child) from None
                if kind == "item":
                    yield value
                    continue
                if kind == "memory":
                    detail = f"was stopped because it needs more than {self._limits.memory / 2**30:g} GiB of memory"
                    raise Ended("memory", detail, child.marked())
                finished = True
                if kind == "error":
                    raise value
                return
        finally:
            self._open = False
            if not finished:
                self.close()

    def _ended(self, child: "_Child") -> Ended:
        child.process.join()
        code = child.process.exitcode or 0
        if code >= 0:
            raise RuntimeError("a function failed in the child process, which has printed the traceback")
        if code == -signal.SIGPROF:
            return Ended("time", f"was stopped after {self._limits.cpu_s:g} s of CPU time", child.marked())
        if code == -signal.SIGKILL:  # by the kernel, which chooses this process first
            return Ended("memory", "was stopped because the machine has no memory left", child.marked())
        return Ended("crash", f"crashed ({signal.Signals(-code).name})", child.marked())


class _Child(NamedTuple):
    process: ForkProcess
    requests: BinaryIO
    results: BinaryIO
    place: mmap.mmap  # shared memory: 8 bytes
    owner: int  # process number of its parent: a process that is forked from this one later has no child

    def marked(self) -> int:
        """Return what the child last passed to `mark`."""
        return int(struct.unpack_from("q", self.place, 0)[0])


class _Request(NamedTuple):
    function: Callable[..., Iterator[Any]]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def _write(stream: BinaryIO, value: object) -> None:
    pickle.dump(value, stream, protocol=5)
    stream.flush()


def _enlarge(pipe: int) -> None:
    with suppress(AttributeError, OSError):  # not on macOS; or the user has too many of them
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, BUFFER_BYTES)


def _only_result(function: Callable[..., T], arguments: tuple[Any, ...], options: dict[str, Any]) -> Iterator[T]:
    yield function(*arguments, **options)


def _serve(
    requests: int,
    results: int,
    place: mmap.mmap,
    limits: Limits,
    errors: tuple[type[Exception], ...],
) -> None:
    """Answer requests until the parent closes the pipe or ends."""
    global _limits, _place
    _limits, _place = limits, place
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is sent to all processes; the parent decides
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    _close_files_except(requests, results)
    with suppress(OSError):  # not on macOS
        Path("/proc/self/oom_score_adj").write_text("1000")
    with (
        os.fdopen(requests, "rb", buffering=BUFFER_BYTES) as waiting,
        os.fdopen(results, "wb") as answers,
        suppress(EOFError, BrokenPipeError, pickle.UnpicklingError),  # the parent is gone
    ):
        while True:
            before = _memory()
            request = pickle.load(waiting)
            _limit_memory(limits.memory, more=MEMORY_PER_BYTE * (_memory() - before))
            mark(0)
            answer: tuple[str, Any] = ("done", None)
            try:
                restart_time_limit()
                for item in request.function(*request.arguments, **request.options):
                    signal.setitimer(signal.ITIMER_PROF, 0)
                    _write(answers, ("item", item))
                    restart_time_limit()
            except MemoryError:
                answer = ("memory", None)
            except errors as error:
                answer = ("error", error)
            signal.setitimer(signal.ITIMER_PROF, 0)
            _limit_memory(None)
            _write(answers, answer)


def _close_files_except(*kept: int) -> None:
    """Close the parent's files: its locks and pipes would stay open as long as this process."""
    last = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    borders = [2, *sorted(kept), last]
    for before, after in itertools.pairwise(borders):
        os.closerange(before + 1, after)


def _limit_memory(memory: int | None, *, more: int = 0) -> None:
    """Allow `memory` and `more` bytes in addition to what this process has; None for no limit."""
    if sys.platform == "linux":
        # Not RLIMIT_AS, which counts files that are mapped into memory too.
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = hard if memory is None else _memory() + memory + more
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _memory() -> int:
    """Return the bytes of this process that RLIMIT_DATA counts; 0 where the system does not tell, as on macOS."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[5]) * mmap.PAGESIZE if sys.platform == "linux" else 0
