"""How a row is written, and what a place that holds rows must answer.

Shapes: M rows asked for, E values per row, R bytes per row.
"""

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from engram_lm.errors import AddressError, ConfigError


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """The bytes of one row: `dim` values of `dtype`, then one ue8m0 scale per `scale_group` values.

    A ue8m0 byte b stands for 2^(b - 127) (DeepSeek-V4.1 has e4m3 values and a group of 32: 264 B).
    """

    dtype: torch.dtype
    dim: int
    scale_group: int | None = None

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ConfigError(f"dim={self.dim}: a row holds at least 1 value")
        if self.scale_group is not None and self.dim % self.scale_group:
            raise ConfigError(f"scale_group={self.scale_group}: must divide dim={self.dim}")

    @property
    def value_bytes(self) -> int:
        """Bytes of a row's values, without its scales."""
        return self.dim * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """R, values and scales."""
        return self.value_bytes + (0 if self.scale_group is None else self.dim // self.scale_group)

    def decode(self, bytes_MR: Tensor) -> Tensor:
        """(M, R) uint8 -> (M, E) values: of `dtype` as they are, or scaled, then in bfloat16.

        An e4m3 value times a power of two is exact in bfloat16, short of its ends.
        """
        assert bytes_MR.dtype == torch.uint8 and bytes_MR.shape[-1] == self.row_bytes
        if self.scale_group is None:
            return bytes_MR.view(self.dtype)
        values_MGE = bytes_MR[:, : self.value_bytes].contiguous().view(self.dtype)
        values_MGE = values_MGE.float().unflatten(-1, (-1, self.scale_group))
        # The byte is a float32's exponent field, which is how the released engines read it.
        scales_MG = (bytes_MR[:, self.value_bytes :].to(torch.int32) << 23).view(torch.float32)
        return (values_MGE * scales_MG[..., None]).flatten(1).bfloat16()


class RowStore(Protocol):
    """Where the rows of one layer's table live. It answers one question: give me these rows.

    Stores that read from another close it with themselves. `with store:` closes at the end.
    """

    format: RowFormat
    rows: int
    """V, how many there are."""

    def gather(self, rows_M: Tensor) -> Tensor:
        """(M,) int64 -> (M, R) uint8, in the order asked, repeats included.

        AddressError for a row that is not there, DataError once closed or where reading fails.
        """
        ...

    def prefetch(self, rows_M: Tensor) -> None:
        """A hint that these rows will be gathered soon; gather is right without it."""
        ...

    def close(self) -> None:
        """Gives back files, memory and threads; waits for readers that have begun."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def select(values_VX: Tensor, rows_M: Tensor) -> Tensor:
    """(V, X) -> (M, X). AddressError for a row that is not there (a GPU's own assertion on one)."""
    try:
        return values_VX.index_select(0, rows_M)
    except IndexError:
        check_rows(rows_M, len(values_VX))
        raise


def check_rows(rows_M: Tensor, rows: int) -> None:
    """AddressError where a number is outside 0..rows-1: the first such and its place."""
    if not len(rows_M):
        return
    lowest, highest = torch.aminmax(rows_M)
    if lowest < 0 or highest >= rows:
        place = int(((rows_M < 0) | (rows_M >= rows)).nonzero()[0])
        raise AddressError(
            f"row {int(rows_M[place])} asked for at position {place}: "
            f"this table has rows 0 to {rows - 1}"
        )
