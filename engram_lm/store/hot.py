"""The hot rows of a packed file: which rows are asked for most, and copies of them in that order.

They stand before the table, so that a cache is filled by one read from front to back. The table is
whole without them.

Shapes: V rows of the table, K hot rows, M of them, R bytes per row.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram_lm.errors import DataError
from engram_lm.store.header import Entry
from engram_lm.store.region import Region

NUMBERS, COPIES = "hot_numbers", "hot_rows"
"""Names of the two tensors, in the order in which they stand."""
NUMBER_BYTES = 8
MULTIPLE = 8
"""Of which K is one, so that row numbers and the table can both be aligned."""
DIGITS = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Hot:
    """Hot rows of one table whose numbers have been checked; the copies are not read yet."""

    rows_K: Tensor
    """Row numbers, int64, the hottest first."""
    region: Region
    """Where the copies are."""
    block_rows: int
    """Copies that share a checksum; the last block may have fewer."""
    block_sha256: str
    """64 hex digits a block."""

    @classmethod
    def open(
        cls, tensors: Mapping[str, Entry], table: Region, block_rows: int, sha256: str
    ) -> "Hot":
        """Reads the numbers. sha256: of the numbers, then of each block of copies.

        DataError where the tensors do not fit the table, the numbers are not what their checksum
        says, or one of them is no row or there twice.
        """
        path = table.path
        numbers, copies = tensors[NUMBERS], tensors[COPIES]
        shape = (copies.shape[0] if copies.shape else 0, table.row_bytes)
        found = numbers.dtype, numbers.shape, copies.dtype, copies.shape
        if found != ("I64", shape[:1], "U8", shape) or not shape[0] or shape[0] % MULTIPLE:
            raise DataError(
                f"{path}: hot rows are {NUMBERS} {numbers.dtype} {numbers.shape} and {COPIES} "
                f"{copies.dtype} {copies.shape}: I64 (K,) and U8 (K, {table.row_bytes}) are "
                f"needed, K a multiple of {MULTIPLE}"
            )
        digits = DIGITS * (1 + -(-shape[0] // block_rows))
        if len(sha256) != digits:
            raise DataError(f"{path}: hot_sha256 has {len(sha256)} digits, not {digits}")
        region = Region(path=path, offset=numbers.offset, rows=shape[0], row_bytes=NUMBER_BYTES)
        content = region.read(0, shape[0])
        if hashlib.sha256(content.numpy().tobytes()).hexdigest() != sha256[:DIGITS]:
            raise DataError(f"{path}: {NUMBERS} are not what hot_sha256 says: damaged")
        rows_K = content.view(torch.int64).view(-1)
        check_hot(str(path), rows_K.numpy(), table.rows)
        return cls(
            rows_K=rows_K,
            region=Region(
                path=path, offset=copies.offset, rows=shape[0], row_bytes=table.row_bytes
            ),
            block_rows=block_rows,
            block_sha256=sha256[DIGITS:],
        )

    def blocks(self, most: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Numbers (M,) and copies (M, R) of the `most` hottest rows, a block at a time, read from
        front to back. DataError where they cannot be read or are not what their checksum says."""
        for first in range(0, min(most, self.region.rows), self.block_rows):
            rows_M, bytes_MR, whole = self.block(first // self.block_rows)
            if not whole:
                raise DataError(
                    f"{self.region.path}: hot rows {first} to {first + len(rows_M) - 1} are not "
                    "what hot_sha256 says: damaged"
                )
            yield rows_M[: most - first], bytes_MR[: most - first]

    def block(self, number: int) -> tuple[Tensor, Tensor, bool]:
        """Its row numbers (M,), its copies (M, R), and whether these are what their checksum says.
        DataError where they cannot be read."""
        first = number * self.block_rows
        last = min(first + self.block_rows, self.region.rows)
        bytes_MR = self.region.read(first, last)
        digits = self.block_sha256[DIGITS * number : DIGITS * (number + 1)]
        whole = hashlib.sha256(bytes_MR.numpy().tobytes()).hexdigest() == digits
        return self.rows_K[first:last], bytes_MR, whole


def check_hot(where: str, rows_K: NDArray[np.int64], rows: int) -> None:
    """DataError where a hot row is none of a table's, or there twice."""
    sorted_K = np.sort(rows_K)
    outside_K = sorted_K[(sorted_K < 0) | (sorted_K >= rows)]
    if len(outside_K):
        raise DataError(f"{where}: hot row {outside_K[0]}: the table has rows 0 to {rows - 1}")
    twice_K = sorted_K[1:][sorted_K[1:] == sorted_K[:-1]]
    if len(twice_K):
        raise DataError(f"{where}: hot row {twice_K[0]} is there more than once")
