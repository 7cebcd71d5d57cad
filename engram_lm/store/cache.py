"""The rows of a slower store that were asked for last or again, kept in memory.

Shapes: M rows asked for, K distinct rows among them that are missing, R bytes per row.
"""

import threading

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import ConfigError, whole_number
from engram_lm.memory.rows import RowStore, TierCounts, ascending, check_rows, check_store
from engram_lm.memory.table import Merged
from engram_lm.store.door import Door
from engram_lm.store.sets import WAYS, Sets


class Cache(RowStore):
    """A RowStore that reads rows of `slower` once and keeps them within `budget_bytes`.

    The budget covers rows and 16 bytes of bookkeeping each. ConfigError where no set fits in it.
    """

    asked = 0
    """Rows, repeats included."""
    hits = 0
    """Of these: found here. The others were read from the slower store, repeats once a request."""

    def __init__(self, slower: RowStore, budget_bytes: int) -> None:
        check_store("slower", slower)
        budget_bytes = whole_number("budget_bytes", budget_bytes)
        self.slower, self.format, self.rows = slower, slower.format, slower.rows
        set_bytes = WAYS * (self.format.row_bytes + 2 * np.dtype(np.int64).itemsize)
        if budget_bytes < set_bytes:
            raise ConfigError(
                f"budget_bytes={budget_bytes}: at least {set_bytes} are needed for {WAYS} rows "
                f"of {self.format.row_bytes} bytes"
            )
        sets = min(budget_bytes // set_bytes, -(-self.rows // WAYS))
        self._sets = Sets(sets, self.format.row_bytes)
        self._requests = 0
        self._lock = threading.Lock()
        self._door = Door("the cache")

    def gather(self, rows_M: Tensor) -> Tensor:
        """(M,) int64 -> (M, R) uint8 in host memory; what is missing is asked for in one go."""
        rows_M = rows_M.cpu()
        with self._door.inside():
            check_rows(rows_M, self.rows)
            bytes_MR = torch.empty(len(rows_M), self.format.row_bytes, dtype=torch.uint8)
            into_MR = bytes_MR.numpy()
            with self._lock:
                self._requests += 1
                missed_K = self._sets.take(rows_M.numpy(), self._requests, into_MR)
                self.asked += len(rows_M)
                self.hits += len(rows_M) - len(missed_K)
                request = self._requests
            if not len(missed_K):
                return bytes_MR
            rows_K = rows_M[torch.from_numpy(missed_K)]
            merged = None if ascending(rows_K) else Merged.of(rows_K)
            if merged is not None:
                rows_K = merged.rows_U
            bytes_KR = self.slower.gather(rows_K).cpu().numpy()
            # numpy, which unlike torch takes no threads from the model to write a few rows.
            into_MR[missed_K] = bytes_KR if merged is None else bytes_KR[merged.position_M.numpy()]
            with self._lock:
                # Who was alone since then brings what is still missing.
                alone = request == self._requests
                self._sets.put(rows_K.numpy(), bytes_KR, self._requests, new=alone)
            return bytes_MR

    @property
    def places(self) -> int:
        """Rows that it can hold."""
        return len(self._sets.bytes_PR)

    def seed(self, rows_K: Tensor, bytes_KR: Tensor) -> None:
        """Takes in distinct rows as if they had been found here before all others, as many as there
        are places for that no row has; what comes first has its place first."""
        with self._door.inside():
            check_rows(rows_K, self.rows)
            with self._lock:
                self._requests += 1  # who is about to bring rows must look for them again
                self._sets.put(rows_K.numpy(), bytes_KR.numpy(), self._requests, seeds=True)

    def prefetch(self, rows_M: Tensor) -> None:
        """Hands on what is not here."""
        rows_M = rows_M.cpu()
        with self._door.inside():
            check_rows(rows_M, self.rows)
            with self._lock:
                missing_M = ~self._sets.here(rows_M.numpy())
            if missing_M.any():
                self.slower.prefetch(rows_M[torch.from_numpy(missing_M)])

    def close(self) -> None:
        """Gives the memory back and closes the slower store."""
        if self._door.shut():
            self._sets = Sets(0, self.format.row_bytes)
            self.slower.close()

    def tiers(self) -> list[TierCounts]:
        """This one, and those of the slower store."""
        return [TierCounts("cache", self.asked, self.hits, 0), *self.slower.tiers()]
