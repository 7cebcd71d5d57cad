"""A file read row by row, from wherever the rows lie in it, at the depth a disk wants.

One thread tells the kernel of the pages to come (WILLNEED), reads exact rows from those that have
arrived (preadv), and hands pages back (DONTNEED): the disk works on a few hundred reads at a time,
rows arrive in the consumer's buffer, and the page cache keeps no 4 KiB for a row of 264 bytes. Of
32,768 random rows each takes 9.7 us of CPU time; with 32 threads of preadv it is 32.6, and 38.4 on
a file opened with O_DIRECT, at fewer rows a second (results/disk_reads.json, from
benchmarks/disk_reads.py). A mapping takes less CPU time still, 7.0 us, but keeps its pages, and
where a file is cut or a disk fails it ends the process with a signal. Where numba is installed, one
compiled call does it (row_file_numba.py).

Shapes: K rows of one file, ascending, W bytes each.
"""

import errno
import functools
import mmap
import os
import stat
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engram_lm.errors import DataError

PAGE = mmap.PAGESIZE
WINDOW = 64
"""Extents whose pages are asked for, read and handed back together."""
WINDOWS_AHEAD = 4
ADVICE = hasattr(os, "posix_fadvise")
"""Without it (macOS) rows are read one after the other."""
TRIES = 2
"""Of a read that fails with EIO; a disk's passing faults are gone at the second."""


class Extents(NamedTuple):
    """Runs of pages that hold rows, neighbours joined: where each begins, how long it is, and the
    first row in it."""

    offsets: list[int]
    sizes: list[int]
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, offset_K: NDArray[np.int64], width: int) -> "Extents":
        """Of rows of `width` bytes at ascending offsets."""
        first_K, stop_K = offset_K // PAGE, (offset_K + width - 1) // PAGE + 1
        begins = np.flatnonzero(np.concatenate([[True], first_K[1:] > stop_K[:-1]]))
        ends = np.concatenate([begins[1:], [len(offset_K)]]) - 1
        sizes = (stop_K[ends] - first_K[begins]) * PAGE
        return cls((first_K[begins] * PAGE).tolist(), sizes.tolist(), begins)

    def window(self, window: int, windows: int = 1) -> Iterable[tuple[int, int]]:
        """Offset and size of each extent in these windows."""
        part = slice(window * WINDOW, (window + windows) * WINDOW)
        return zip(self.offsets[part], self.sizes[part], strict=True)


class RowFile:
    """One open file of at least `size` bytes. DataError where it cannot be opened, is shorter, or
    does not stay what it was."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        try:
            state = os.fstat(self._descriptor)
            if not stat.S_ISREG(state.st_mode):
                raise DataError(f"{path}: not a file")
            if state.st_size < size:
                raise DataError(
                    f"{path}: {state.st_size} bytes, its rows end at byte {size}: truncated"
                )
            if ADVICE:  # the kernel's own reading ahead fetches what nobody asked for
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        except BaseException:
            self.close()
            raise
        self._state = state
        _compiled()  # now, and not when the first row is wanted

    def read_rows(self, offset_K: NDArray[np.int64], bytes_KW: NDArray[np.uint8]) -> int:
        """Fills bytes_KW (C order) with the rows at these ascending offsets.

        Returns the bytes of all pages that they lie on, which is what a disk reads for them.
        """
        done = pages = 0
        if (compiled := _compiled()) is not None:
            done, pages = compiled.read_rows(self._descriptor, offset_K, bytes_KW)
        if done < len(offset_K):  # also what a compiled read could not get: it has one try
            pages += self._read_plainly(offset_K[done:], bytes_KW[done:])
        self._check_unchanged()
        return pages

    def hint(self, offset_K: NDArray[np.int64], width: int) -> None:
        """Starts reading the pages of rows at these ascending offsets, and waits for none unless
        the disk's queue is full."""
        extents = Extents.of(offset_K, width)
        self._ask(extents, 0, -(-len(extents.offsets) // WINDOW))

    def close(self) -> None:
        """Nobody may be reading any more."""
        os.close(self._descriptor)

    def _check_unchanged(self) -> None:
        """DataError where it was written to, its time put back or not. Its name may go, which
        changes the time of its state too: an open file keeps its bytes."""
        then, now = self._state, os.fstat(self._descriptor)
        written = (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns)
        if not written and now.st_ctime_ns == then.st_ctime_ns:
            return
        if written or (now.st_nlink == then.st_nlink and self._has_its_name(now)):
            raise DataError(f"{self.path}: it was changed after it had been opened")
        self._state = now

    def _has_its_name(self, state: os.stat_result) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), state)
        except OSError:
            return False

    def _read_plainly(self, offset_K: NDArray[np.int64], bytes_KW: NDArray[np.uint8]) -> int:
        width = bytes_KW.shape[1]
        view = bytes_KW.reshape(-1).data
        extents = Extents.of(offset_K, width)
        begins = np.flatnonzero(np.concatenate([[True], np.diff(offset_K) != width]))
        ends = np.concatenate([begins[1:], [len(offset_K)]])
        reads = list(
            zip(
                (begins * width).tolist(),
                (ends * width).tolist(),
                offset_K[begins].tolist(),
                strict=True,
            )
        )
        # A run of rows never leaves its extent: the window it belongs to is that of its first row.
        stops = np.append(np.searchsorted(begins, extents.rows[WINDOW::WINDOW]), len(reads))
        self._ask(extents, 0, WINDOWS_AHEAD)
        done = 0
        for window, stop in enumerate(stops.tolist()):
            self._ask(extents, window + WINDOWS_AHEAD)
            for begin, end, offset in reads[done:stop]:
                self._read(view[begin:end], offset)
            self._hand_back(extents, window)
            done = stop
        return sum(extents.sizes)

    def _ask(self, extents: Extents, window: int, windows: int = 1) -> None:
        if ADVICE:
            for offset, size in extents.window(window, windows):
                os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def _hand_back(self, extents: Extents, window: int) -> None:
        if ADVICE:
            for offset, size in extents.window(window):
                os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_DONTNEED)

    def _read(self, view: memoryview, offset: int) -> None:
        failures = 0
        while view:
            try:
                count = os.preadv(self._descriptor, [view], offset)
            except OSError as error:
                failures += 1
                if error.errno != errno.EIO or failures == TRIES:
                    raise DataError(
                        f"{self.path}: reading {len(view)} bytes at byte {offset}: {error.strerror}"
                    ) from error
                continue
            if not count:
                raise DataError(
                    f"{self.path}: it ends before byte {offset + len(view)}: "
                    "truncated after it had been opened"
                )
            view, offset = view[count:], offset + count


@functools.cache
def _compiled() -> ModuleType | None:
    if not ADVICE or find_spec("numba") is None:
        return None
    from engram_lm.store import row_file_numba

    return row_file_numba
