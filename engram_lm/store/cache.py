"""The rows of a slower store that were asked for last, kept in memory.

Shapes: M rows asked for, U distinct rows among them, K rows to take in, S sets, W ways, R bytes
per row.
"""

import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram_lm.errors import ConfigError
from engram_lm.memory.rows import RowStore, check_rows
from engram_lm.memory.table import Merged
from engram_lm.store.door import Door

WAYS = 16
"""Places in a set. A row may only stand in its own set, and takes the place used longest ago: what
LRU keeps but for crowded sets, found without an index over all rows."""
NOBODY = -1


class Cache(RowStore):
    """A RowStore that reads rows of `slower` once and keeps them within `budget_bytes`.

    The budget covers rows and 12 bytes of bookkeeping each. ConfigError where no set fits in it.
    """

    asked = 0
    """Rows, repeats included."""
    unique = 0
    """Rows, each once a request."""
    hits = 0
    """Of `unique`: found here. The others were read from the slower store."""

    def __init__(self, slower: RowStore, budget_bytes: int) -> None:
        self.slower, self.format, self.rows = slower, slower.format, slower.rows
        tag, stamp = np.dtype(np.int64), np.dtype(np.uint32)
        set_bytes = WAYS * (self.format.row_bytes + tag.itemsize + stamp.itemsize)
        if budget_bytes < set_bytes:
            raise ConfigError(
                f"budget_bytes={budget_bytes}: at least {set_bytes} are needed for {WAYS} rows "
                f"of {self.format.row_bytes} bytes"
            )
        self.sets = min(budget_bytes // set_bytes, -(-self.rows // WAYS))
        self._tags_SW = np.full((self.sets, WAYS), NOBODY, tag)
        self._used_SW = np.zeros((self.sets, WAYS), stamp)  # the request that used a row last
        self._requests = 0
        self._bytes = torch.empty(self.sets * WAYS, self.format.row_bytes, dtype=torch.uint8)
        self._lock = threading.Lock()
        self._door = Door("the cache")

    def gather(self, rows_M: Tensor) -> Tensor:
        """(M,) int64 -> (M, R) uint8 in host memory; what is missing is asked for in one go."""
        rows_M = rows_M.cpu()
        with self._door.inside():
            check_rows(rows_M, self.rows)
            merged = Merged.of(rows_M)
            rows_U = merged.rows_U.numpy()
            with self._lock:
                place_U, hit_U = self._find(rows_U)
                self._requests += 1
                self._used_SW.reshape(-1)[place_U[hit_U]] = self._requests
                self.asked, self.unique = self.asked + len(rows_M), self.unique + len(rows_U)
                self.hits += int(np.count_nonzero(hit_U))
                if hit_U.all():
                    place_M = torch.from_numpy(place_U)[merged.position_M]
                    return self._bytes.index_select(0, place_M)
                bytes_UR = self._bytes.index_select(0, torch.from_numpy(place_U))
            missed_K = torch.from_numpy(np.flatnonzero(~hit_U))
            bytes_KR = self.slower.gather(merged.rows_U[missed_K]).cpu()
            bytes_UR.index_copy_(0, missed_K, bytes_KR)
            with self._lock:
                self._take_in(rows_U[~hit_U], bytes_KR)
            return bytes_UR.index_select(0, merged.position_M)

    def prefetch(self, rows_M: Tensor) -> None:
        """Hands on what is not here."""
        rows_M = rows_M.cpu()
        with self._door.inside():
            check_rows(rows_M, self.rows)
            with self._lock:
                _, hit_M = self._find(rows_M.numpy())
            if not hit_M.all():
                self.slower.prefetch(rows_M[torch.from_numpy(~hit_M)])

    def close(self) -> None:
        """Gives the memory back and closes the slower store."""
        if self._door.shut():
            self._bytes = self._bytes.new_empty(0, self.format.row_bytes)
            self._tags_SW, self._used_SW = self._tags_SW[:0].copy(), self._used_SW[:0].copy()
            self.slower.close()

    def _find(self, rows_U: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Where each row is, and whether it is there at all (if not: the place of any)."""
        set_U = rows_U % self.sets
        here_UW = self._tags_SW[set_U] == rows_U[:, None]
        way_U = here_UW.argmax(axis=1)
        return set_U * WAYS + way_U, here_UW[np.arange(len(rows_U)), way_U]

    def _take_in(self, rows_K: NDArray[np.int64], bytes_KR: Tensor) -> None:
        """Puts rows where the oldest of their sets are; of more than W in one set, the first W."""
        _, hit_K = self._find(rows_K)  # another thread may have brought some
        set_K = rows_K % self.sets
        order_K = np.argsort(set_K, kind="stable")
        order_K = order_K[~hit_K[order_K]]
        set_K = set_K[order_K]
        starts_K = np.searchsorted(set_K, set_K)
        rank_K = np.arange(len(set_K)) - starts_K
        oldest_KW = np.argsort(self._used_SW[set_K], axis=1, kind="stable")
        fits_K = rank_K < WAYS
        order_K, set_K, rank_K = order_K[fits_K], set_K[fits_K], rank_K[fits_K]
        place_K = set_K * WAYS + oldest_KW[fits_K, rank_K]
        self._tags_SW.reshape(-1)[place_K] = rows_K[order_K]
        self._used_SW.reshape(-1)[place_K] = self._requests
        self._bytes[torch.from_numpy(place_K)] = bytes_KR[torch.from_numpy(order_K)]
