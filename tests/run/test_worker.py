"""Whether a process is one of several, from its environment variables; values that they cannot have are one error."""

import subprocess
import sys
from typing import Any

import pytest

from lora_cli.errors import LoraError
from lora_cli.run import worker

WORKER = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that sets the environment variables of a worker to these alone."""

    def set_variables(values: dict[str, str]) -> None:
        for name in (*worker.RENDEZVOUS, worker.OF_MACHINE, *worker.OF_MPI):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, False),
        (WORKER, True),
        ({**WORKER, "WORLD_SIZE": "1"}, True),
        # Of a container in which a launcher is to start the processes.
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, False),
        ({"RANK": "3", "MASTER_ADDR": "a"}, False),
        ({"PMI_SIZE": "1", "LOCAL_RANK": "-1"}, False),  # of a shell that srun has started
    ],
)
def test_a_worker_is_known_by_its_environment(values: dict[str, str], expected: bool, variables: Any):
    variables(values)
    assert worker.is_worker() is expected


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_worker_without_one_of_the_variables_is_refused(missing: str, variables: Any):
    variables({name: value for name, value in WORKER.items() if name != missing})
    with pytest.raises(LoraError, match=f"^WORLD_SIZE is 2, but {missing} is not set$") as raised:
        worker.is_worker()
    assert "torchrun" in str(raised.value.hint)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("WORLD_SIZE", "two", "1 or more"),
        ("WORLD_SIZE", "0", "1 or more"),
        ("WORLD_SIZE", "-2", "1 or more"),
        ("RANK", "2", "0 to 1, as WORLD_SIZE is 2"),
        ("RANK", "-1", "0 to 1, as WORLD_SIZE is 2"),
        ("RANK", "0.5", "0 to 1, as WORLD_SIZE is 2"),
        ("LOCAL_RANK", "2", "0 to 1, as this machine has 2 processes"),
        ("LOCAL_RANK", "x", "0 to 1, as this machine has 2 processes"),
        ("LOCAL_WORLD_SIZE", "0", "1 to 2, as WORLD_SIZE is 2"),
        ("LOCAL_WORLD_SIZE", "3", "1 to 2, as WORLD_SIZE is 2"),
        ("MASTER_PORT", "80000", "1 to 65535"),
        ("MASTER_PORT", "port", "1 to 65535"),
    ],
)
def test_a_value_that_a_variable_cannot_have_is_told(name: str, value: str, told: str, variables: Any):
    variables({**WORKER, name: value})
    with pytest.raises(LoraError) as raised:
        worker.is_worker()
    assert raised.value.message == f"{name} is {value}, and can be {told}"


@pytest.mark.parametrize("name", [*worker.OF_MPI, "LOCAL_RANK"])
def test_a_process_that_looks_like_one_of_several_is_refused(name: str, variables: Any):
    """Accelerate would take it for one, and end with a traceback."""
    variables({name: "4"})
    with pytest.raises(LoraError, match=f"^{name} is 4, as in one of several .*, but WORLD_SIZE is not set$") as raised:
        worker.is_worker()
    assert f"unset {name}" in str(raised.value.hint)


@pytest.mark.parametrize(
    ("values", "of_machine", "of_run"),
    [
        ({}, True, True),
        ({"LOCAL_RANK": "1", "RANK": "1"}, True, True),  # one process alone, in a shell with these variables
        (WORKER, True, True),
        ({**WORKER, "RANK": "1", "LOCAL_RANK": "1"}, False, False),
        ({**WORKER, "RANK": "1"}, True, False),  # of the second machine
        # The first process does not know that this one is lost: it would wait for it.
        ({**WORKER, "RANK": "5", "LOCAL_RANK": "1"}, True, True),
        ({**WORKER, "RANK": "1", "LOCAL_RANK": "7"}, True, True),
    ],
)
def test_one_process_speaks(values: dict[str, str], of_machine: bool, of_run: bool, variables: Any):
    variables(values)
    assert (worker.is_first_of_machine(), worker.is_first_of_run()) == (of_machine, of_run)


@pytest.mark.parametrize(("value", "found"), [("4", 4), ("", 16), ("0", 16), ("x", 16), ("32", 16)])
def test_the_local_world_size_counts_the_processes_of_this_machine(value: str, found: int, variables: Any):
    variables({worker.OF_MACHINE: value})
    assert worker.processes_of_machine(16) == found


@pytest.mark.slow
@pytest.mark.parametrize("joined", [False, True])
def test_a_process_of_a_group_ends_at_once_after_the_run_with_its_exit_code(joined: bool):
    """A thread of gloo can abort a process whose objects Python frees at its end; the code stands for these objects."""
    code = f"""if True:
        import os, sys
        from lora_cli import __main__
        from lora_cli.run import worker
        class Freed:
            def __del__(self, write=os.write):
                write(1, b"objects are freed")
        sys.freed = Freed()
        if {joined}:
            worker.joined.set()
        sys.argv = ["lora", "methods", "unknown-method"]
        __main__.main()
    """
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert ended.stdout == ("" if joined else "objects are freed")
