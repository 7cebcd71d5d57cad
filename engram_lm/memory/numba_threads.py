"""Threads of numba's loops: as many as torch has.

Importing this module needs numba (the extra `fast`). It starts numba's threads, which sets torch's
number to that of all cores, because both use the process's one OpenMP, and puts that back. So it is
imported before any loop is compiled.
"""

import torch
from numba import config, set_num_threads


def follow_torch() -> None:
    """Has the loops that come next run in as many threads as torch's operations.

    Workers that share a machine each have a part of its cores.
    """
    threads = torch.get_num_threads()
    set_num_threads(min(threads, config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


follow_torch()
