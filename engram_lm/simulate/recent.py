"""The rows that were used last, as many as fit: what a tier keeps. Integers only, no bytes.

Shapes: V rows there are, U distinct rows of one request.
"""

from collections import deque

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.integer]

PIECE = 4096
"""Uses that are looked through together when room is made."""


class Recent:
    """At most `capacity` of the rows 0 to `rows` - 1: least recently used ones leave.

    Exact. A request is looked up as a whole before any of its rows is taken in, as the stores do.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        self.capacity = capacity
        self._used_V = np.full(rows, -1, np.int64)  # when a row that is kept was last used
        self._uses: deque[tuple[int, Rows]] = deque()  # first time of each piece, and its rows
        self._time = self._kept = 0

    def __len__(self) -> int:
        return self._kept

    def holds(self, rows_U: Rows) -> npt.NDArray[np.bool_]:
        """(U,) bool."""
        held_U: npt.NDArray[np.bool_] = self._used_V[rows_U] >= 0
        return held_U

    def use(self, rows_U: Rows) -> None:
        """Takes in distinct rows, and those here already anew, in this order."""
        self._kept += int(np.count_nonzero(self._used_V[rows_U] < 0))
        self._used_V[rows_U] = np.arange(self._time, self._time + len(rows_U))
        if self.capacity < len(self._used_V):  # else nothing ever leaves
            for start in range(0, len(rows_U), PIECE):
                self._uses.append((self._time + start, rows_U[start : start + PIECE]))
        self._time += len(rows_U)
        while self._kept > self.capacity:
            first, rows_P = self._uses.popleft()
            times_P = np.arange(first, first + len(rows_P))
            # A row used again since stands in a later piece.
            last_P = np.flatnonzero(self._used_V[rows_P] == times_P)
            leaving_P = last_P[: self._kept - self.capacity]
            self._used_V[rows_P[leaving_P]] = -1
            self._kept -= len(leaving_P)
            if len(leaving_P) < len(last_P):
                rest = int(leaving_P[-1]) + 1
                self._uses.appendleft((first + rest, rows_P[rest:]))
