"""Rows of one open file, read by one compiled call that leaves the interpreter to the model.

A token asks for a few dozen rows, and each takes three calls of the kernel. From Python that is a
millisecond in which the thread that computes may not run Python either.

Importing this module needs numba (the extra `fast`) and a kernel with posix_fadvise; it compiles,
some seconds the first time. Shapes: K rows of one file, ascending, W bytes each.
"""

import mmap
import os
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, types

Offsets = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

AHEAD = 256
"""Extents whose pages have been asked for and not read yet."""
PAGE = mmap.PAGESIZE
_WILLNEED, _DONTNEED = os.POSIX_FADV_WILLNEED, os.POSIX_FADV_DONTNEED

_pread: Any = types.ExternalFunction(
    "pread", types.intp(types.intc, types.uintp, types.uintp, types.int64)
)
_fadvise: Any = types.ExternalFunction(
    "posix_fadvise", types.intc(types.intc, types.int64, types.int64, types.intc)
)


@njit("UniTuple(int64, 3)(int64[::1], int64, int64)", nogil=True, cache=True)
def _extent(offset_K: Offsets, width: int, row: int) -> tuple[int, int, int]:
    """The run of pages that begins with this row: its offset and end, and the row behind it."""
    begin = offset_K[row] // PAGE * PAGE
    end = begin
    while row < offset_K.size and offset_K[row] // PAGE * PAGE <= end:
        end = ((offset_K[row] + width - 1) // PAGE + 1) * PAGE
        row += 1
    return begin, end, row


@njit("UniTuple(int64, 2)(intc, int64[::1], uint8[:, ::1])", nogil=True, cache=True)
def read_rows(descriptor: int, offset_K: Offsets, bytes_KW: Bytes) -> tuple[int, int]:
    """Fills bytes_KW with the rows at these ascending offsets; pages are asked for ahead and handed
    back.

    Returns how many of the first rows are there for sure, which is all of them unless a read failed
    or came back short, and the bytes of the pages that they lie on.
    """
    K, width = bytes_KW.shape
    memory = bytes_KW.ctypes.data
    row = ask = extents = asked = bytes_read = 0
    while row < K:
        while ask < K and asked < extents + AHEAD:
            begin, end, ask = _extent(offset_K, width, ask)
            _fadvise(descriptor, begin, end - begin, _WILLNEED)
            asked += 1
        begin, end, behind = _extent(offset_K, width, row)
        while row < behind:
            rows = 1
            while row + rows < behind and offset_K[row + rows] == offset_K[row] + rows * width:
                rows += 1
            if (
                _pread(descriptor, memory + row * width, rows * width, offset_K[row])
                != rows * width
            ):
                return row, bytes_read
            row += rows
        _fadvise(descriptor, begin, end - begin, _DONTNEED)
        bytes_read += end - begin
        extents += 1
    return row, bytes_read
