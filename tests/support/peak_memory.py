"""Peak memory of `lora` in a process of its own, read by that process, because ru_maxrss may be the parent's."""

import subprocess
import sys

# With one core, no more threads than the tests have.
MEASURED_LORA = """
import atexit, os, sys
os.sched_getaffinity = lambda _: {0}
from lora_cli.cli import main
from lora_cli.training.cpu import peak_resident_memory
atexit.register(lambda: print(peak_resident_memory(), file=sys.stderr))
main()
"""


def peak_memory_of(*arguments: object) -> int:
    """Run `lora ARGUMENTS` in this folder; return its largest resident memory in bytes, mapped pages included."""
    command = [sys.executable, "-c", MEASURED_LORA, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.splitlines()[-1])
