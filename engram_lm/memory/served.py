"""Rows of a store that is slower than memory, gathered while the model computes.

Shapes: M rows asked for, E values per row.
"""

import time
from collections import deque
from concurrent.futures import Executor, Future

import torch
from torch import Tensor

from engram_lm.memory.rows import RowStore

KEPT = 4096
"""Waits that are remembered: the last ones."""


class Served:
    """One layer's rows. What is asked for is gathered and decoded by a thread, from `start` on.

    thread: of one worker, shared by the layers of a model: they are waited for in the order in
    which they were started.
    """

    def __init__(self, store: RowStore, thread: Executor) -> None:
        self.store, self._thread = store, thread
        self.waits: deque[float] = deque(maxlen=KEPT)
        """Seconds that the model has waited for rows of this layer, a forward pass each."""

    def start(self, rows_M: Tensor) -> "_Gathering":
        """Asks for rows, (M,) int64, on any device, where their values will be too."""
        host_M = rows_M.cpu()
        self.store.prefetch(host_M)
        return _Gathering(self, self._thread.submit(self._gather, host_M), rows_M.device)

    def _gather(self, rows_M: Tensor) -> Tensor:
        return self.store.format.decode(self.store.gather(rows_M))


class _Gathering:
    def __init__(self, served: Served, values: "Future[Tensor]", device: torch.device) -> None:
        self.served, self.values, self.device = served, values, device

    def wait(self) -> Tensor:
        """(M, E); what went wrong in the thread is raised here."""
        begun = time.perf_counter()
        values_ME = self.values.result().to(self.device)
        self.served.waits.append(time.perf_counter() - begun)
        return values_ME
