"""Places for rows in memory, in sets: where a row may stand, and which leaves when another comes.

Shapes: M rows asked for, K distinct rows that come, S sets, W ways, P places = S * W, R bytes per
row.
"""

import functools
from importlib.util import find_spec
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
Bytes = NDArray[np.uint8]

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


class Sets:
    """S sets of WAYS places for rows of R bytes, empty at first.

    Where numba is installed the compiled way (sets_numba.py) does the same, beside the interpreter.
    Callers see to it that one thread at a time is here.
    """

    def __init__(self, sets: int, row_bytes: int) -> None:
        self.count = sets
        self.tags_SW = np.full((sets, WAYS), NOBODY, np.int64)
        self.used_SW = np.zeros((sets, WAYS), np.int64)  # the request that used a row last
        self.bytes_PR = np.empty((sets * WAYS, row_bytes), np.uint8)
        self._compiled = _compiled()

    def take(self, rows_M: Rows, request: int, into_MR: Bytes) -> NDArray[np.int64]:
        """Copies what is here, as used by this request, and returns which of the M are not."""
        if self._compiled is not None:
            missed_M = np.empty(len(rows_M), np.int64)
            missed = self._compiled.take(
                rows_M,
                AGAIN + request,
                self.tags_SW,
                self.used_SW,
                self.bytes_PR,
                into_MR,
                missed_M,
            )
            return missed_M[:missed]
        place_M, hit_M = self._find(rows_M)
        self.used_SW.reshape(-1)[place_M[hit_M]] = AGAIN + request
        self.bytes_PR.take(place_M, axis=0, out=into_MR)
        return np.flatnonzero(~hit_M)

    def here(self, rows_M: Rows) -> NDArray[np.bool_]:
        """Which rows are here."""
        return self._find(rows_M)[1]

    def put(
        self, rows_K: Rows, bytes_KR: Bytes, request: int, *, new: bool = False, seeds: bool = False
    ) -> None:
        """Puts distinct rows that are not here in places of their sets; a set takes W and no more.

        new: it is known that none is here. seeds: they count as found before all requests, and take
        empty places alone.
        """
        set_K = rows_K % self.count
        order_K = np.argsort(set_K, kind="stable")
        if not new:
            order_K = order_K[~self.here(rows_K)[order_K]]
        if self._compiled is not None:
            self._compiled.put(
                rows_K,
                order_K,
                np.ascontiguousarray(bytes_KR),
                AGAIN if seeds else request,
                seeds,
                self.tags_SW,
                self.used_SW,
                self.bytes_PR,
            )
            return
        set_K = set_K[order_K]
        rank_K = np.arange(len(set_K)) - np.searchsorted(set_K, set_K)
        fits_K = rank_K < ((self.tags_SW[set_K] == NOBODY).sum(axis=1) if seeds else WAYS)
        order_K, set_K, rank_K = order_K[fits_K], set_K[fits_K], rank_K[fits_K]
        place_K = set_K * WAYS + self._leaving(set_K)[np.arange(len(set_K)), rank_K]
        self.tags_SW.reshape(-1)[place_K] = rows_K[order_K]
        self.used_SW.reshape(-1)[place_K] = AGAIN if seeds else request
        self.bytes_PR[place_K] = bytes_KR[order_K]

    def _find(self, rows_M: Rows) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Where each row is, and whether it is there at all (if not: some place of its set)."""
        place_M = rows_M % self.count * WAYS
        for start in range(0, len(rows_M), BLOCK):
            block = slice(start, start + BLOCK)
            tags_BW = self.tags_SW.take(place_M[block] // WAYS, axis=0)
            place_M[block] += (tags_BW == rows_M[block, None]).argmax(axis=1)
        return place_M, self.tags_SW.reshape(-1).take(place_M) == rows_M

    def _leaving(self, set_K: NDArray[np.int64]) -> NDArray[np.int64]:
        """(K, W) ways of sets, in the order in which they are given to new rows."""
        used_KW = self.used_SW[set_K]
        way_KW = np.argsort(used_KW, axis=1, kind="stable")
        last_KP = np.take_along_axis(used_KW, way_KW[:, :PROBATION], axis=1) % AGAIN
        order_KP = np.argsort(last_KP, axis=1, kind="stable")
        way_KW[:, :PROBATION] = np.take_along_axis(way_KW, order_KP, axis=1)
        return way_KW


@functools.cache
def _compiled() -> ModuleType | None:
    if find_spec("numba") is None:
        return None
    from engram_lm.store import sets_numba

    return sets_numba
