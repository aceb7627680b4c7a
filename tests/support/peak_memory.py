"""Peak memory of `lora` in a process of its own, read by that process, because ru_maxrss may be the parent's."""

import json
import subprocess
import sys
from collections.abc import Sequence

# With one core, no more threads than the tests have.
MEASURED_LORA = """
import json, os, sys
os.sched_getaffinity = lambda _: {0}
from lora_cli.cli import main
from lora_cli.training.cpu import peak_resident_memory
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["lora", *arguments]
    try:
        main()
    except SystemExit as exit_request:
        if exit_request.code:
            raise
    print(peak_resident_memory(), file=sys.stderr)
"""


def peak_memory_of(*commands: Sequence[object]) -> list[int]:
    """Run the `lora` commands in this folder, one after the other in one process.

    Returns the largest resident memory so far after each, in bytes, mapped pages included.
    """
    arguments = json.dumps([[str(argument) for argument in command] for command in commands])
    done = subprocess.run([sys.executable, "-c", MEASURED_LORA, arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stderr.splitlines() if line.isdecimal()]
