"""Entry point of `lora` and of `python -m lora_cli`: signals are handled before the slow imports begin."""

import atexit
import gc
import os
import signal
import sys
from contextlib import suppress


def main() -> None:
    """Run the command line."""
    if sys.platform == "win32":
        sys.stderr.write("error: lora runs on Linux and macOS; on Windows, use it in WSL\n")
        sys.exit(2)
    exit_codes: list[object] = []
    atexit.register(_end, exit_codes)  # before those of libraries, so that it is called after them
    from lora_cli.run.openmp import limit_spinning, read_cpu_times

    started = read_cpu_times()
    from lora_cli.run.signals import handle_signals
    from lora_cli.run.streams import standard_streams

    # Python's own handler prints a traceback. This one is in effect before and after the block.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with standard_streams(), handle_signals():
        from lora_cli import cli

        limit_spinning(started)
        try:
            cli.main()
        except SystemExit as end:
            exit_codes.append(end.code)
            raise
        finally:
            # At its end, Python would search the objects of all libraries for garbage: 1.5 s.
            gc.freeze()


def _end(exit_codes: list[object]) -> None:
    """Do the last thing of the process: hide what Triton would write, and end at once after a process group.

    Triton writes to stderr that its objects were left out of the garbage collection. A thread of gloo that still frees
    a tensor while Python ends is stopped within C++ code, which aborts the process of a run that has finished.
    """
    from lora_cli.run import worker

    if "triton" in sys.modules:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if worker.joined.is_set() and exit_codes and isinstance(exit_codes[0], int):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(exit_codes[0])


if __name__ == "__main__":
    main()
