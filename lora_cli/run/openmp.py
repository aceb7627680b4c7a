"""Keep OpenMP's threads from spinning while they wait for each other. No torch: its library reads this when it loads.

A thread that has done its part of an operation spins for about a millisecond until the others have done theirs. On a
machine with other work, these others are often not running, and the spinning takes the core that one of them, or the
other work, needs: measured with two busy processes on two cores, a step took 3.4 times as long as with few rounds.
"""

import os
from collections.abc import MutableMapping

# How long each library of OpenMP spins: rounds of a loop, microseconds in all; milliseconds; then threads sleep.
SPINNING = {"GOMP_SPINCOUNT": "100", "KMP_BLOCKTIME": "0"}  # GNU's, which torch comes with; LLVM's and Intel's
# Settings of the user that say it already.
WAITING = (*SPINNING, "OMP_WAIT_POLICY")


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set how long threads spin, unless the user has set it; before torch is imported."""
    if not any(name in environment for name in WAITING):
        environment.update(SPINNING)
