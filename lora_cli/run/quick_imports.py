"""Import the libraries in two thirds of the time: no garbage collection, and no torch compiler for bitsandbytes."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

COMPILER_OFF = "TORCHDYNAMO_DISABLE"  # environment variable; torch.compile reads it at each call


@contextmanager
def quick_imports() -> Iterator[None]:
    """Within the block, import torch and what builds on it; a process that has done so already gains nothing here.

    Half a million objects of these modules live as long as the process. The garbage collector would look through them
    again and again, for a second in all, and at each full collection later: it is off, and then leaves them out.

    bitsandbytes compiles four functions for machines that its own kernels do not support, whether they are used or not,
    and this imports torch's compiler, which takes another second. Here they run uncompiled: none of them is used on a
    GPU, and on a CPU one alone, for a 4-bit layer with an odd number of inputs.
    """
    if "torch" in sys.modules:
        yield
        return
    switched_off = COMPILER_OFF not in os.environ
    if switched_off:
        os.environ[COMPILER_OFF] = "1"
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
        if switched_off:
            del os.environ[COMPILER_OFF]
