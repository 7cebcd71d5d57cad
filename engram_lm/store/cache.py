"""The rows of a slower store that were asked for last or again, kept in memory.

Shapes: M rows asked for, K distinct rows among them that are missing, S sets, W ways, R bytes
per row.
"""

import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram_lm.errors import ConfigError
from engram_lm.memory.rows import RowStore, TierCounts, ascending, check_rows
from engram_lm.memory.table import Merged
from engram_lm.store.door import Door

WAYS = 16
"""Places in a set. A row may only stand in its own set, so it is found without an index over all
rows; that costs hardly any hits."""
PROBATION = 4
"""Ways from which a new row takes the place used longest ago. The others belong to rows that were
found here since they came, the last of them: most 4-grams of a text are asked for once, and would
push out what is asked for again (segmented LRU; docs/serving.md has the hit ratios)."""
AGAIN = 2**62
"""Added to the number of the request that used a row last, once it was found here."""
NOBODY = -1
BLOCK = 2048
"""Rows looked up together: their sets' tags stay in the processor's cache."""


class Cache(RowStore):
    """A RowStore that reads rows of `slower` once and keeps them within `budget_bytes`.

    The budget covers rows and 16 bytes of bookkeeping each. ConfigError where no set fits in it.
    """

    asked = 0
    """Rows, repeats included."""
    hits = 0
    """Of these: found here. The others were read from the slower store, repeats once a request."""

    def __init__(self, slower: RowStore, budget_bytes: int) -> None:
        self.slower, self.format, self.rows = slower, slower.format, slower.rows
        set_bytes = WAYS * (self.format.row_bytes + 2 * np.dtype(np.int64).itemsize)
        if budget_bytes < set_bytes:
            raise ConfigError(
                f"budget_bytes={budget_bytes}: at least {set_bytes} are needed for {WAYS} rows "
                f"of {self.format.row_bytes} bytes"
            )
        self.sets = min(budget_bytes // set_bytes, -(-self.rows // WAYS))
        self._tags_SW = np.full((self.sets, WAYS), NOBODY, np.int64)
        self._used_SW = np.zeros((self.sets, WAYS), np.int64)  # the request that used a row last
        self._requests = 0
        self._bytes = torch.empty(self.sets * WAYS, self.format.row_bytes, dtype=torch.uint8)
        self._lock = threading.Lock()
        self._door = Door("the cache")

    def gather(self, rows_M: Tensor) -> Tensor:
        """(M,) int64 -> (M, R) uint8 in host memory; what is missing is asked for in one go."""
        rows_M = rows_M.cpu()
        with self._door.inside():
            check_rows(rows_M, self.rows)
            with self._lock:
                place_M, hit_M = self._find(rows_M.numpy())
                self._requests += 1
                self._used_SW.reshape(-1)[place_M[hit_M]] = AGAIN + self._requests
                self.asked += len(rows_M)
                self.hits += int(np.count_nonzero(hit_M))
                bytes_MR = self._bytes.index_select(0, torch.from_numpy(place_M))
                request = self._requests
            if hit_M.all():
                return bytes_MR
            missed = np.flatnonzero(~hit_M)
            rows_K = rows_M[torch.from_numpy(missed)]
            merged = None if ascending(rows_K) else Merged.of(rows_K)
            if merged is not None:
                rows_K = merged.rows_U
            bytes_KR = self.slower.gather(rows_K).cpu().numpy()
            # numpy, which unlike torch takes no threads from the model to write a few rows.
            bytes_MR.numpy()[missed] = (
                bytes_KR if merged is None else bytes_KR[merged.position_M.numpy()]
            )
            with self._lock:
                self._take_in(rows_K.numpy(), bytes_KR, alone=request == self._requests)
            return bytes_MR

    @property
    def places(self) -> int:
        """Rows that it can hold."""
        return self.sets * WAYS

    def seed(self, rows_K: Tensor, bytes_KR: Tensor) -> None:
        """Takes in distinct rows as if they had been found here before all others, as many as there
        are places for that no row has; what comes first has its place first."""
        with self._door.inside():
            check_rows(rows_K, self.rows)
            with self._lock:
                self._requests += 1  # who is about to bring rows must look for them again
                self._take_in(rows_K.numpy(), bytes_KR.numpy(), alone=False, seeds=True)

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

    def tiers(self) -> list[TierCounts]:
        """This one, and those of the slower store."""
        return [TierCounts("cache", self.asked, self.hits, 0), *self.slower.tiers()]

    def _find(self, rows_M: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Where each row is, and whether it is there at all (if not: some place of its set)."""
        place_M = rows_M % self.sets * WAYS
        for start in range(0, len(rows_M), BLOCK):
            block = slice(start, start + BLOCK)
            tags_BW = self._tags_SW.take(place_M[block] // WAYS, axis=0)
            place_M[block] += (tags_BW == rows_M[block, None]).argmax(axis=1)
        return place_M, self._tags_SW.reshape(-1).take(place_M) == rows_M

    def _take_in(
        self,
        rows_K: NDArray[np.int64],
        bytes_KR: NDArray[np.uint8],
        *,
        alone: bool,
        seeds: bool = False,
    ) -> None:
        """Puts distinct rows in places of their sets; a set takes W and no more, and of seeds what
        fills its empty places. alone: nobody else can have brought some of them since they were
        missing."""
        set_K = rows_K % self.sets
        order_K = np.argsort(set_K, kind="stable")
        if not alone:
            order_K = order_K[~self._find(rows_K)[1][order_K]]
        set_K = set_K[order_K]
        starts_K = np.searchsorted(set_K, set_K)
        rank_K = np.arange(len(set_K)) - starts_K
        fits_K = rank_K < ((self._tags_SW[set_K] == NOBODY).sum(axis=1) if seeds else WAYS)
        order_K, set_K, rank_K = order_K[fits_K], set_K[fits_K], rank_K[fits_K]
        place_K = set_K * WAYS + self._leaving(set_K)[np.arange(len(set_K)), rank_K]
        self._tags_SW.reshape(-1)[place_K] = rows_K[order_K]
        self._used_SW.reshape(-1)[place_K] = AGAIN if seeds else self._requests
        self._bytes.numpy()[place_K] = bytes_KR[order_K]

    def _leaving(self, set_K: NDArray[np.int64]) -> NDArray[np.int64]:
        """(K, W) ways of sets, in the order in which they are given to new rows."""
        used_KW = self._used_SW[set_K]
        way_KW = np.argsort(used_KW, axis=1, kind="stable")
        last_KP = np.take_along_axis(used_KW, way_KW[:, :PROBATION], axis=1) % AGAIN
        order_KP = np.argsort(last_KP, axis=1, kind="stable")
        way_KW[:, :PROBATION] = np.take_along_axis(way_KW, order_KP, axis=1)
        return way_KW
