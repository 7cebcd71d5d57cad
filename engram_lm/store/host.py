"""A whole table in one piece of memory that processes share.

The memory is a sealed memfd: it has no name to clean up and no limit such as /dev/shm's, lives
until the last process that maps it is gone however that ended, and cannot be cut shorter under a
reader. Shapes: V rows of the table, M rows asked for, R bytes per row.
"""

import fcntl
import mmap
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engram_lm.errors import DataError, instance, whole_number
from engram_lm.memory.rows import RowFormat, RowStore, check_store, select
from engram_lm.store.door import Door
from engram_lm.store.resident import copy_rows

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Host(RowStore):
    """A RowStore over shared memory, pinned where there is a GPU.

    `Host.of(store)` makes it; another process maps the same memory with `Host.attach`, or gets it
    by pickling. address: what to attach to while this process, or another that has attached, lives
    and keeps its store open.
    """

    def __init__(self, descriptor: int, format: RowFormat) -> None:
        instance("format", format, RowFormat)
        try:
            size = os.fstat(whole_number("descriptor", descriptor)).st_size
        except OSError as error:
            raise DataError(f"descriptor={descriptor}: {error.strerror}") from error
        self.format, self.rows = format, size // format.row_bytes
        self.address = f"/proc/{os.getpid()}/fd/{descriptor}"
        self._descriptor = descriptor
        self._door = Door("the table in shared memory")
        self._bytes_VR = torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
        self._bytes_VR = self._bytes_VR.view(self.rows, format.row_bytes)
        if torch.cuda.is_available():
            torch.cuda.check_error(
                torch.cuda.cudart().cudaHostRegister(self._bytes_VR.data_ptr(), size, 0)
            )

    @classmethod
    def of(cls, store: RowStore, progress: Callable[[int], None] | None = None) -> "Host":
        """All rows of a store, copied into new shared memory. The store stays open. progress:
        called with the bytes copied, piece by piece.

        DataError where the kernel refuses so much.
        """
        check_store("store", store)
        size = store.rows * store.format.row_bytes
        descriptor = os.memfd_create("engram-table", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
            host = cls(descriptor, store.format)
        except OSError as error:
            os.close(descriptor)
            raise DataError(f"{size} bytes of shared memory: {error.strerror}") from error
        try:
            copy_rows(store, host._bytes_VR, progress)
        except BaseException:
            host.close()
            raise
        return host

    @classmethod
    def attach(cls, address: str, format: RowFormat) -> "Host":
        """The memory that another process shares. DataError where there is none, or not of rows
        of this format."""
        instance("address", address, str)
        instance("format", format, RowFormat)
        try:
            descriptor = os.open(address, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{address}: no table in shared memory ({error.strerror})") from error
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            size = os.fstat(descriptor).st_size
        except OSError:
            seals = size = 0
        if seals & SEALS != SEALS or not size or size % format.row_bytes:
            os.close(descriptor)
            raise DataError(
                f"{address}: not a table in shared memory with {format.row_bytes} bytes a row"
            )
        return cls(descriptor, format)

    def gather(self, rows_M: Tensor) -> Tensor:
        """(M,) int64 -> (M, R) uint8."""
        with self._door.inside():
            return select(self._bytes_VR, rows_M)

    def prefetch(self, rows_M: Tensor) -> None:
        """Nothing to do: the rows are in memory."""

    def close(self) -> None:
        """Lets go of the memory; other processes keep theirs."""
        if self._door.shut():
            if torch.cuda.is_available():
                torch.cuda.check_error(
                    torch.cuda.cudart().cudaHostUnregister(self._bytes_VR.data_ptr())
                )
            self._bytes_VR = self._bytes_VR.new_empty(0, self.format.row_bytes)
            os.close(self._descriptor)

    def __reduce__(self) -> tuple[Callable[..., "Host"], tuple[Any, ...]]:
        return Host.attach, (self.address, self.format)
