"""Importing this before torch has OpenMP's threads sleep soon while they wait for work.

As it comes, GNU OpenMP (torch's on Linux) lets a waiting thread spin for milliseconds. Alone that
saves the time to wake it, but beside other work the spinning thread keeps a core from the one that
it waits for, and a step takes many times as long. Threads that sleep at once cost little on some
machines and a third of a step on virtual ones, where waking takes longer. So they spin for some
tens of microseconds, less than most gaps between two operations, and then sleep (docs/speed.md has
the figures). LLVM's OpenMP (torch's on macOS) knows the policy alone: there they sleep at once.
What the user has set stays.
"""

import os

SPINS = 2_500

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)
