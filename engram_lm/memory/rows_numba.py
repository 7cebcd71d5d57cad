"""Rows of fp8 -> bfloat16 values on a CPU, compiled: equal to RowFormat's own way on every byte.

Shapes: M rows, E values per row, R bytes per row, X = R / 4, W = E / 4.
torch turns fp8 into bfloat16 value by value. Here four values lie in a 64-bit integer, and a
processor has several of these in a register. A value's three bits of fraction and four of exponent
move to where bfloat16 has them, and the scale, a power of two, is added to the exponent: there is
no product, so nothing is rounded. One thread does it, beside those of the model.

Importing this module needs numba (the extra `fast`) and compiles, some seconds the first time.
"""

import functools

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

from engram_lm.memory.rows import RowFormat

Words = npt.NDArray[np.uint32]
Fours = npt.NDArray[np.uint64]
Halves = npt.NDArray[np.uint16]

_LEAST, _MOST = 16, 246
"""Scale bytes with which every value is a normal bfloat16, zero or no number; of others each value
is looked up."""
_1, _2, _3, _4, _5, _6, _7, _8, _16 = (np.uint64(bits) for bits in (1, 2, 3, 4, 5, 6, 7, 8, 16))
_EACH = np.uint64(0x0001_0001_0001_0001)
_PAIRS, _BYTES = np.uint64(0x0000_FFFF_0000_FFFF), np.uint64(0x00FF_00FF_00FF_00FF)
_SIGNS, _SIZES = np.uint64(0x80) * _EACH, np.uint64(0x7F) * _EACH
_TO_NORMAL = np.uint64(0x78) * _EACH


def compiles(format: RowFormat) -> bool:
    """Whether rows of this format are decoded here: fp8, a scale for each so many times 4 values,
    and a multiple of 4 bytes in all."""
    group = format.scale_group
    fp8 = format.dtype == torch.float8_e4m3fn
    return fp8 and group is not None and group % 4 == 0 and format.row_bytes % 4 == 0


def decode(format: RowFormat, bytes_MR: Tensor) -> Tensor:
    """(M, R) uint8 -> (M, E) bfloat16, of a format that `compiles`."""
    values_ME = torch.empty(len(bytes_MR), format.dim, dtype=torch.bfloat16)
    words_MX = bytes_MR.contiguous().numpy().view(np.uint32)
    if words_MX.ctypes.data % words_MX.itemsize:
        words_MX = words_MX.copy()
    _write(words_MX, _every_value(), values_ME.view(torch.uint16).numpy())
    return values_ME


@functools.cache
def _every_value() -> Halves:
    """Bits of the bfloat16 for each byte of scale and of value, as RowFormat decodes them."""
    byte = torch.arange(256, dtype=torch.uint8)
    rows_MR = torch.stack([byte.repeat(256), byte.repeat_interleave(256)], dim=1)
    one = RowFormat(dtype=torch.float8_e4m3fn, dim=1, scale_group=1)
    return one.decode(rows_MR).view(torch.uint16).view(256, 256).numpy()


@njit("uint64(uint64)", inline="always")
def _all(flags_4: np.uint64) -> np.uint64:
    """16 bits of ones where the lowest of 16 is one, zeros elsewhere."""
    flags_4 &= _EACH
    return (flags_4 << _16) - flags_4


@njit("uint64(uint64, uint64)", inline="always")
def _four(bytes_4: np.uint64, ones_4: np.uint64) -> np.uint64:
    """Four e4m3 bytes -> four bfloat16 in 16 bits each; ones_4: scale byte - 7, as an exponent.

    A normal value's exponent and fraction move up together, by 4 bits. Below are 0 to 7 eighths of
    the smallest normal value, whose exponents are those of 4 to 7, of 2 and 3, and of 1.
    """
    bytes_4 = (bytes_4 | bytes_4 << _16) & _PAIRS
    bytes_4 = (bytes_4 | bytes_4 << _8) & _BYTES
    sizes_4 = bytes_4 & _SIZES
    normal_4 = (sizes_4 << _4) + ones_4
    from_4 = ones_4 + ((sizes_4 & (_3 * _EACH)) << _5)
    from_2 = ones_4 - (_EACH << _7) + ((sizes_4 & _EACH) << _6)
    from_1 = ones_4 - (_EACH << _8)
    is_4, is_2, is_1 = _all(sizes_4 >> _2), _all(sizes_4 >> _1), _all(sizes_4)
    small_4 = (from_4 & is_4) | (from_2 & is_2 & ~is_4) | (from_1 & is_1 & ~is_2 & ~is_4)
    is_normal = _all((sizes_4 + _TO_NORMAL) >> _7)
    no_number = _all((sizes_4 + _EACH) >> _7)
    values_4 = (normal_4 & is_normal) | (small_4 & ~is_normal)
    return values_4 | (bytes_4 & _SIGNS) << _8 | no_number


@njit("void(uint32[::1], uint64[::1], uint64[::1])", cache=True)
def _write_row(words_X: Words, ones_W: Fours, into_W: Fours) -> None:
    for word in range(into_W.size):
        into_W[word] = _four(np.uint64(words_X[word]), ones_W[word])


@njit("void(uint32[:, ::1], uint16[:, ::1], uint16[:, ::1])", nogil=True, cache=True)
def _write(words_MX: Words, every_value: Halves, values_ME: Halves) -> None:
    M, E = values_ME.shape
    groups = 4 * words_MX.shape[1] - E
    words = E // 4 // groups
    ones_W = np.empty(E // 4, np.uint64)
    bytes_MR, values_MW = words_MX.view(np.uint8), values_ME.view(np.uint64)
    for row in range(M):
        bytes_R, looked_up, place = bytes_MR[row], False, 0
        for group in range(groups):
            scale = bytes_R[E + group]
            looked_up |= scale < _LEAST or scale > _MOST
            ones = ((np.uint64(scale) - _7) << _7) * _EACH
            for word in range(place, place + words):
                ones_W[word] = ones
            place += words
        _write_row(words_MX[row], ones_W, values_MW[row])
        if looked_up:
            for value in range(E):
                scale = bytes_R[E + value // (4 * words)]
                values_ME[row, value] = every_value[scale, bytes_R[value]]
