"""How the threads of a command wait for work: set by importing this module, before anything imports torch.

A thread of OpenMP that waits spins for some milliseconds, which other programs pay for where they share the cores: four
photos took 189 s and 17 s of CPU time on two cores with other work, and 55 s and 6 s with short waits. On a quiet
machine nothing is lost.
"""

import os

__all__ = ["SPINS"]

SPINS = 10_000  # of libgomp, which torch brings on Linux, before a thread sleeps

if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:  # the user decides
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)
