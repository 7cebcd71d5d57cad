"""Rows that were hinted at and not gathered yet: integers only, no I/O.

Shapes: M rows asked for, A rows ahead.
"""

import threading

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]

PATIENCE = 1024
"""Gathers after which a hint may give way: whoever hinted has thought better of it."""


class Ahead:
    """At most `room` rows, in the order hinted: those whose reading has begun, then the others.

    A hint beyond the room is dropped, its first rows last. Threads may come as they like.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._lock = threading.Lock()
        self._rows_A = np.empty(0, np.int64)
        self._since_A = np.empty(0, np.int64)
        self._begun = 0
        self._gathers = 0

    def __len__(self) -> int:
        return len(self._rows_A)

    def add(self, rows_M: Rows) -> None:
        """Takes in what is new among these rows, in their order, as far as there is room."""
        rows_U, first_U = np.unique(rows_M, return_index=True)
        rows_U = rows_U[np.argsort(first_U)]
        with self._lock:
            new_U = rows_U[~np.isin(rows_U, self._rows_A)]
            if len(self._rows_A) + len(new_U) > self.room:
                self._keep(self._since_A > self._gathers - PATIENCE)
            new_U = new_U[: self.room - len(self._rows_A)]
            self._rows_A = np.concatenate([self._rows_A, new_U])
            self._since_A = np.concatenate([self._since_A, np.full(len(new_U), self._gathers)])

    def begin(self, most: int) -> Rows:
        """The next rows to read, ascending; none where reading of all has begun."""
        with self._lock:
            rows = np.sort(self._rows_A[self._begun : self._begun + most])
            self._begun += len(rows)
        return rows

    def gathered(self, rows_U: Rows) -> None:
        """These rows are being read by whoever wants them: they need no hint any more."""
        with self._lock:
            self._gathers += 1
            if len(self._rows_A):
                self._keep(~np.isin(self._rows_A, rows_U))

    def clear(self) -> None:
        """Forgets all."""
        with self._lock:
            self._keep(np.zeros(len(self._rows_A), np.bool_))

    def _keep(self, kept_A: NDArray[np.bool_]) -> None:
        self._begun = int(np.count_nonzero(kept_A[: self._begun]))
        self._rows_A, self._since_A = self._rows_A[kept_A], self._since_A[kept_A]
