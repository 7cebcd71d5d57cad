"""Where rows lie in a file."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Region:
    """Rows one behind another in a file. A table on disk is a list of regions, in row order.

    offset: bytes from the beginning of the file to the first row.
    """

    path: Path
    offset: int
    rows: int
    row_bytes: int

    @property
    def end(self) -> int:
        """Bytes from the beginning of the file to behind the last row."""
        return self.offset + self.rows * self.row_bytes
