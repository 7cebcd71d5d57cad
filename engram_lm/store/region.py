"""Where rows lie in a file."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engram_lm.errors import DataError, instance, whole_number


@dataclass(frozen=True, kw_only=True)
class Region:
    """Rows one behind another in a file. A table on disk is a list of regions, in row order.

    offset: bytes from the beginning of the file to the first row. Raises ConfigError.
    """

    path: Path
    offset: int
    rows: int
    row_bytes: int

    def __post_init__(self) -> None:
        instance("path", self.path, str, os.PathLike)
        object.__setattr__(self, "path", Path(self.path))
        for name in ("offset", "rows", "row_bytes"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least=0))

    @property
    def end(self) -> int:
        """Bytes from the beginning of the file to behind the last row."""
        return self.offset + self.rows * self.row_bytes

    def read(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` - 1 as they are stored, (M, R) uint8. DataError."""
        length = (last - first) * self.row_bytes
        content = bytearray(length)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + first * self.row_bytes)
                count = file.readinto(content)
                while count < length and (more := file.readinto(memoryview(content)[count:])):
                    count += more
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}") from error
        if count < length:
            raise DataError(f"{self.path}: ends before its rows do: truncated")
        return torch.frombuffer(content, dtype=torch.uint8).view(-1, self.row_bytes)


def stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced or written to, its time put back or not. DataError."""
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    return state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
