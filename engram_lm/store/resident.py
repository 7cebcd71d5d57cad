"""The simplest store: all rows of a table in memory.

Shapes: V rows of the table, M rows asked for, R bytes per row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from engram_lm.errors import DataError, instance
from engram_lm.memory.rows import RowFormat, RowStore, check_store, select
from engram_lm.store.door import Door

COPIED_AT_ONCE = 2**24
"""Bytes that copying a table takes beside it."""


def copy_rows(
    store: RowStore, bytes_VR: Tensor, progress: Callable[[int], None] | None = None
) -> None:
    """Fills bytes_VR with all rows of a store. progress: called with the bytes of each piece."""
    step = max(1, COPIED_AT_ONCE // store.format.row_bytes)
    for start in range(0, store.rows, step):
        rows_M = torch.arange(start, min(start + step, store.rows))
        bytes_MR = store.gather(rows_M)
        bytes_VR[start : start + step] = bytes_MR
        if progress is not None:
            progress(bytes_MR.nbytes)


class Resident(RowStore):
    """A RowStore over one tensor of row bytes, (V, R) uint8, on any device."""

    def __init__(self, bytes_VR: Tensor, format: RowFormat) -> None:
        instance("bytes_VR", bytes_VR, Tensor)
        instance("format", format, RowFormat)
        if bytes_VR.dtype != torch.uint8 or bytes_VR.shape[1:] != (format.row_bytes,):
            raise DataError(
                f"rows of {bytes_VR.dtype} {tuple(bytes_VR.shape)}: uint8 with "
                f"{format.row_bytes} bytes a row is needed"
            )
        self.bytes_VR = bytes_VR
        self.format, self.rows = format, len(bytes_VR)
        self._door = Door("the table in memory")

    @classmethod
    def of(cls, store: RowStore, progress: Callable[[int], None] | None = None) -> "Resident":
        """All rows of another store, which stays open. progress: called with the bytes copied,
        piece by piece."""
        check_store("store", store)
        bytes_VR = torch.empty(store.rows, store.format.row_bytes, dtype=torch.uint8)
        copy_rows(store, bytes_VR, progress)
        return cls(bytes_VR, store.format)

    def gather(self, rows_M: Tensor) -> Tensor:
        """(M,) int64 -> (M, R) uint8."""
        with self._door.inside():
            return select(self.bytes_VR, rows_M)

    def prefetch(self, rows_M: Tensor) -> None:
        """Nothing to do: the rows are in memory."""

    def close(self) -> None:
        """Lets go of the tensor."""
        if self._door.shut():
            self.bytes_VR = self.bytes_VR.new_empty(0, self.format.row_bytes)
