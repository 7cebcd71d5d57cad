"""The simplest store: all rows of a table in memory.

Shapes: V rows of the table, M rows asked for, R bytes per row.
"""

import torch
from torch import Tensor

from engram_lm.errors import DataError
from engram_lm.memory.rows import RowFormat


class Resident:
    """A RowStore over one tensor of row bytes, (V, R) uint8, on any device."""

    def __init__(self, bytes_VR: Tensor, format: RowFormat) -> None:
        if bytes_VR.dtype != torch.uint8 or bytes_VR.shape[1:] != (format.row_bytes,):
            raise DataError(
                f"rows of {bytes_VR.dtype} {tuple(bytes_VR.shape)}: uint8 with "
                f"{format.row_bytes} bytes a row is needed"
            )
        self.bytes_VR = bytes_VR
        self.format = format

    def gather(self, rows_M: Tensor) -> Tensor:
        """(M,) int64 -> (M, R) uint8."""
        return self.bytes_VR.index_select(0, rows_M)

    def prefetch(self, rows_M: Tensor) -> None:
        """Nothing to do: the rows are in memory."""

    def close(self) -> None:
        """Nothing to give back."""
