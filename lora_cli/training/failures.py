"""Report the failure of one of several processes once, with its rank and machine, and the loss of a peer in two lines.

Without it, one failing process gives a traceback in every other one: of gloo, of NCCL, or of the store.
"""

import time
from types import TracebackType

from torch.distributed import DistError

from lora_cli.errors import LoraError, first_line
from lora_cli.run import console
from lora_cli.run.os_errors import as_lora_error
from lora_cli.run.print_error import print_error
from lora_cli.run.signals import end_process, is_launched, receive_signals
from lora_cli.training.memory_ladder import StartAgain
from lora_cli.training.peers import Failure, LostPeer, Peers, RunError

LINGER_S = 2.0  # seconds for which the first process, which may hold the store, stays: the others read its failure
LAUNCHER_S = 5.0  # seconds in which a launcher ends the peers of a process that has failed
# What torch's errors say. gloo raises plain RuntimeErrors; NCCL's and the store's are subclasses of DistError.
NO_ANSWER = (
    "Timed out waiting",  # gloo
    "timed out in",  # gloo
    "collective operation timeout",  # NCCL's watchdog
    "Socket Timeout",  # the store, while NCCL connects
    "wait timeout after",  # the store
)
CLOSED = (
    "reset by peer",
    "closed by peer",
    "Broken pipe",
    "Connection refused",
    "remote process exited",  # ncclRemoteError
    "Connection was likely closed",  # the store, while NCCL connects
    "failed to recv, got 0 bytes",  # the store
)
SEE_GPU = "see what its machine and GPU do; if it only was slow, raise distributed.timeout_minutes"
NCCL_DEBUG = (
    "start again with NCCL_DEBUG=INFO, which prints each step of NCCL and what it did not find; with several network "
    "cards, NCCL_SOCKET_IFNAME names the one to use"
)


class report_failures:  # used like a function: `with report_failures(peers):`
    """Context manager that prints an error once on each machine, and exits.

    The process that fails names itself and tells the others, which end too and do not repeat it on the same machine.
    Tracebacks of bugs stay, below the name of the process. With None, in a run of one process, it does nothing.
    """

    def __init__(self, peers: Peers | None) -> None:
        self._peers = peers

    def __enter__(self) -> None:
        """Enter the block."""

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Report `error`.

        Raises:
            SystemExit: it is printed, by this process or another one.
        """
        if self._peers is None:
            return
        try:
            if isinstance(error, Exception):
                _report(self._peers, error)
        finally:
            self._peers.leave()


def _report(peers: Peers, error: Exception) -> None:
    if isinstance(error, RuntimeError):
        # The launcher, which ends this process meanwhile, has said why.
        with receive_signals(lambda number: end_process(128 + number)):
            error = describe_group_error(error, peers) or error
    if isinstance(error, StartAgain):
        peers.want_form(dict(error.rung._asdict()))
    if isinstance(error, LostPeer):
        for line in peers.lines_after(error):
            console.print_always(line)
        raise SystemExit(error.exit_code) from None
    found = as_lora_error(error) if isinstance(error, (OSError, MemoryError, RuntimeError)) else None
    found = error if isinstance(error, LoraError) else found
    own = peers.name(peers.rank)
    text = found.message if found else f"{type(error).__name__}: {first_line(error)}"
    if not isinstance(error, RunError):
        peers.record_failure(Failure(peers.rank, f"{own} failed: {text}", found.hint if found else None))
    is_first = peers.claim(text)
    if is_first and isinstance(error, StartAgain) and is_launched():
        console.info(f"{own}: {text}; all processes start again")
    elif is_first and found is not None:
        found.message = found.message if isinstance(found, RunError) else f"{own}: {found.message}"
        print_error(found)
    time.sleep(0 if peers.rank else LINGER_S)
    if found is None:
        if not is_first:
            raise SystemExit(1) from None
        console.print_always(f"{own} failed:")
        return
    raise SystemExit(found.exit_code) from None


def describe_group_error(error: RuntimeError, peers: Peers) -> LoraError | None:
    """Return what an error of gloo, NCCL or the store means; None if it is none of theirs.

    Where a connection was closed, this takes LAUNCHER_S: a launcher ends this process then, and names the one that
    failed first.
    """
    text = str(error)
    if any(each in text for each in NO_ANSWER):
        return LostPeer("a process of this run did not answer for distributed.timeout_minutes", hint=SEE_GPU)
    if any(each in text for each in CLOSED):
        return peers.describe_loss(wait_s=LAUNCHER_S)
    if not isinstance(error, DistError):
        return None
    return LoraError(f"the connection of the GPUs failed: {_reason(text)}", hint=NCCL_DEBUG, exit_code=1)


def _reason(text: str) -> str:
    """Return what NCCL says of its error: `ncclSystemError: ...`, and the last error of its log."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("nccl")][:1]
    last = lines[lines.index("Last error:") + 1 :][:1] if "Last error:" in lines else []
    return " ".join([*reasons, *last]) or (lines or ["it gives no reason"])[0]
