"""A few changed rows over a table that nobody writes to.

Shapes: M rows asked for, K changed rows, R bytes per row.
"""

import torch
from torch import Tensor

from engram_lm.errors import DataError, instance
from engram_lm.memory.rows import RowStore, TierCounts, check_rows, check_store
from engram_lm.store.door import Door


class Overlay(RowStore):
    """A RowStore that answers rows_K, (K,) int64, with bytes_KR, and all others from `base`.

    DataError for a row that is changed twice or bytes of another shape, AddressError for a row
    that the base does not have.
    """

    def __init__(self, base: RowStore, rows_K: Tensor, bytes_KR: Tensor) -> None:
        check_store("base", base)
        instance("rows_K", rows_K, Tensor)
        instance("bytes_KR", bytes_KR, Tensor)
        self.base, self.format, self.rows = base, base.format, base.rows
        if bytes_KR.dtype != torch.uint8 or bytes_KR.shape != (len(rows_K), self.format.row_bytes):
            raise DataError(
                f"{len(rows_K)} changed rows as {bytes_KR.dtype} {tuple(bytes_KR.shape)}: uint8 "
                f"with {self.format.row_bytes} bytes for each is needed"
            )
        check_rows(rows_K, self.rows)
        ascending_K, order_K = rows_K.sort()
        if bool((twice := ascending_K[1:] == ascending_K[:-1]).any()):
            raise DataError(f"row {int(ascending_K[1:][twice][0])} is changed twice")
        # Searching for a row above all changed ones ends at this number, which no row has.
        self._rows_K = torch.cat([ascending_K, ascending_K.new_full((1,), -1)])
        self._bytes_KR = bytes_KR[order_K]
        self._door = Door("the overlay")

    def gather(self, rows_M: Tensor) -> Tensor:
        """(M,) int64 -> (M, R) uint8; changed rows are not read from the base."""
        with self._door.inside():
            check_rows(rows_M, self.rows)
            place_M, changed_M = self._find(rows_M)
            if not changed_M.any():
                return self.base.gather(rows_M)
            bytes_MR = self._bytes_KR.new_empty(len(rows_M), self.format.row_bytes)
            bytes_MR[changed_M] = self._bytes_KR[place_M[changed_M]]
            bytes_MR[~changed_M] = self.base.gather(rows_M[~changed_M])
            return bytes_MR

    def prefetch(self, rows_M: Tensor) -> None:
        """Hands on what is not changed."""
        with self._door.inside():
            check_rows(rows_M, self.rows)
            _, changed_M = self._find(rows_M)
            self.base.prefetch(rows_M[~changed_M])

    def close(self) -> None:
        """Closes the base."""
        if self._door.shut():
            self.base.close()

    def tiers(self) -> list[TierCounts]:
        """Those of the base."""
        return self.base.tiers()

    def _find(self, rows_M: Tensor) -> tuple[Tensor, Tensor]:
        place_M = torch.searchsorted(self._rows_K[:-1], rows_M)
        return place_M, self._rows_K[place_M] == rows_M
