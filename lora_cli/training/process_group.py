"""Join the process group: the workers of `lora train` itself, torchrun, accelerate or Slurm, on one or more machines.

Every worker finds the others through environment variables: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed import (  # type: ignore[attr-defined]  # documented, but not in __all__
    DistError,
    PrefixStore,
    TCPStore,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from lora_cli.errors import LoraError, first_line
from lora_cli.recipe.problem import join_words
from lora_cli.recipe.schema import Recipe
from lora_cli.run import console
from lora_cli.run.worker import OF_MACHINE, STARTERS, is_worker, joined, local_rank, processes_of_machine
from lora_cli.training.agreement import check_start, start_record
from lora_cli.training.cpu import set_up_cpu
from lora_cli.training.gpu import set_up_allocator, set_up_determinism
from lora_cli.training.peers import STORE_ANSWERS, Peers, RunError

# The first process may write or unpack files for hours while the others wait. A process that dies is noticed without a
# timeout: its peers get a closed connection, or the launcher ends them.
PREPARING_TIMEOUT = timedelta(days=1)
# The group's own timeout is later than that of `Peers`, which names the process that does not answer. NCCL's watchdog,
# which cannot, ends the process with a trace of its threads.
LATER = timedelta(minutes=1)
TRY_S, POLL_S = 10, 0.2  # seconds of a try to reach the first machine, and between two of them
SUPERVISED = "LORA_SUPERVISED"  # environment variable of the only worker of a run, which joins no group
_groups: list[Any] = []  # within the group of all processes; their type has no annotation of the number of collectives
_timeout = [PREPARING_TIMEOUT]  # how long others may take to begin a collective, at present


def join_peers(recipe: Recipe, device: torch.device, *, info: Callable[[str], None] = console.info) -> Peers | None:
    """Meet the other workers of the run, compare what they have, and connect the process group; None: there are none.

    Raises:
        LoraError: the port is in use, the first machine does not answer, processes are missing, or they differ.
    """
    if not is_worker():
        return None
    set_up_allocator()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    joining = timedelta(minutes=recipe.distributed.timeout_minutes)
    server = _serve() if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" else None
    store = _connect(joining, answers=STORE_ANSWERS)
    peers = Peers(store, rank=rank, world_size=world_size)
    records = peers.join(start_record(recipe, device), timeout=joining)
    check_start(peers, records, info=info if rank == 0 else console.no_output)
    # torchrun keeps its store over restarts, and the addresses in it would be those of the ended workers.
    of_group = PrefixStore(peers.start, server or _connect(joining, answers=PREPARING_TIMEOUT))
    torch.distributed.init_process_group(
        "gloo" if device.type == "cpu" else "nccl",
        store=of_group,
        rank=rank,
        world_size=world_size,
        timeout=PREPARING_TIMEOUT,
    )
    joined.set()
    peers.watch(_collectives_begun, lambda: _timeout[0])
    return peers


def _collectives_begun() -> int:
    """Return the number of collectives that this process has begun; it rises equally in all processes."""
    groups: list[Any] = [torch.distributed.group.WORLD, *_groups]
    if groups[0] is None:  # the run has ended, and so will the thread that watches
        return 0
    return sum(int(group._get_sequence_number_for_group()) for group in groups)


def shard_mesh(device: torch.device, *, of_machine: bool) -> DeviceMesh:
    """Return the processes that share the weights of a base: all, or those of this machine. All must call it.

    Raises:
        RunError: machines have different numbers of processes, or one each, or ranks in another order; or a process
            does not know how many its machine has.
    """
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    if not of_machine:
        return init_device_mesh(device.type, (world,))
    sizes = gather_object([int(os.environ.get(OF_MACHINE) or 0)])
    if unknown := sizes.count(0):  # taken for one machine, the layers would cross the network unnoticed
        raise RunError(
            "distributed.strategy: hsdp shards the base over the processes of each machine, and "
            f"{OF_MACHINE}, which tells how many they are, is not set in {unknown} of {world} processes",
            hint=f"set {OF_MACHINE} to the number of processes on each machine (srun: $SLURM_NTASKS_PER_NODE; mpirun: "
            "$OMPI_COMM_WORLD_LOCAL_SIZE), start them with torchrun, which does, or write fsdp",
        )
    size = sizes[rank]
    if set(sizes) == {world}:
        return init_device_mesh(device.type, (world,))
    in_order = gather_object([local_rank() == rank % size])
    found = join_words([str(each) for each in sorted(set(sizes))], "and")
    if found != str(size) or size == 1 or not all(in_order):
        order = "" if all(in_order) else ", whose ranks do not follow each other"
        raise RunError(
            "distributed.strategy: hsdp shards the base over the processes of each machine, and machines have "
            f"{found} of them{order}",
            hint="start as many processes on each machine, two at least, as torchrun numbers them; or write fsdp",
        )
    names = ("machines", "processes")
    mesh = init_device_mesh(device.type, (world // size, size), mesh_dim_names=names)[names[1]]
    _groups.append(mesh.get_group())
    _set_pg_timeout(_timeout[0] + LATER, mesh.get_group())
    return mesh


def _serve() -> TCPStore:
    port = int(os.environ["MASTER_PORT"])
    try:
        # It serves all addresses of this machine, and this connection to it needs none that others know.
        return TCPStore("localhost", port, is_master=True, wait_for_workers=False, timeout=PREPARING_TIMEOUT)
    except DistError as error:
        if "EADDRINUSE" not in str(error):
            raise LoraError(f"MASTER_PORT {port} cannot be opened: {first_line(error)}", hint=STARTERS) from None
        raise LoraError(
            f"MASTER_PORT {port} of this machine is in use",
            hint="end the program that uses it, such as an earlier run, or choose another port: torchrun "
            "--master-port, accelerate launch --main_process_port, or MASTER_PORT on all machines",
            exit_code=1,
        ) from None


def _connect(timeout: timedelta, *, answers: timedelta) -> TCPStore:
    """Return the store of the run, which must be reached within `timeout`, and may take `answers` for an answer."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    reason, found = _wait_for_server(address, port, timeout), list[TCPStore]()

    def connect() -> None:
        with suppress(DistError):
            found.append(TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout))

    if not reason:
        # In a thread, because torch waits without end for a program that is no store.
        thread = threading.Thread(target=connect, name="store", daemon=True)
        thread.start()
        thread.join(timeout.total_seconds())
        reason = "another program has this port"
    if found:
        found[0].set_timeout(answers)
        return found[0]
    raise LoraError(
        f"the first machine of the run, {address}, does not answer on port {port}: {reason}",
        hint="MASTER_ADDR must name it on all machines; it must be started too, with the same MASTER_ADDR and "
        "MASTER_PORT, and a firewall must let this port and those of the connections between the processes pass",
        exit_code=1,
    ) from None


def _wait_for_server(address: str, port: int, timeout: timedelta) -> str:
    """Wait until the store can be reached; return why it cannot be within `timeout`, or an empty text.

    torch would wait too, and print a trace of its C++ functions, and a warning each time that a name is not found.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            with socket.create_connection((address, port), timeout=TRY_S):
                return ""
        except OSError as error:  # also of a name that is not known (yet): that of a new container
            if time.monotonic() > deadline:
                return error.strerror or first_line(error)
        time.sleep(POLL_S)


def join_processes(device: torch.device, *, deterministic: bool = False) -> Accelerator:
    """Set up the process for `device`, and return its Accelerator; after `join_peers` in a worker.

    `deterministic` is about GPUs.
    """
    set_up_allocator()
    if deterministic and device.type != "cpu":
        set_up_determinism()
    accelerator = Accelerator(cpu=device.type == "cpu")
    if device.type == "cpu":
        set_up_cpu(processes_of_machine(accelerator.num_processes))
    return accelerator


def set_timeout(timeout: timedelta) -> None:
    """Set how long this process waits for others in the operations that follow; all processes must call it.

    Its default is PREPARING_TIMEOUT. It does nothing in a run of one process.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _timeout[0] = timeout
        for group in (None, *_groups):
            _set_pg_timeout(timeout + LATER, group)


@contextmanager
def one_works_alone(timeout: timedelta) -> Iterator[None]:
    """Within the block, wait as long as it takes while one process works; afterwards again for `timeout`."""
    set_timeout(PREPARING_TIMEOUT)
    yield
    set_timeout(timeout)
