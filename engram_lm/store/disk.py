"""Rows in files, read in place.

Shapes: M rows asked for, U distinct rows among them, ascending, K of these in one region, R bytes
per row, W of them in one part.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram_lm.errors import ConfigError, DataError, MismatchError, instance, whole_number
from engram_lm.memory.rows import RowFormat, RowStore, TierCounts, ascending, check_rows
from engram_lm.memory.table import Merged
from engram_lm.store.ahead import Ahead
from engram_lm.store.door import Door
from engram_lm.store.region import Region
from engram_lm.store.row_file import PAGE, RowFile

SLICE = 8192
"""Rows read before the next ones are looked at: bounds the lists that a request makes."""
HINTED_AT_ONCE = 64
"""Rows that a hint starts reading by itself: a disk's queue takes them without waiting. The rest is
started by a thread."""


class Disk(RowStore):
    """A RowStore over regions of files. Costs no memory but for what is on its way.

    parts: lists of regions. Within a list rows go on from region to region; lists stand side by
    side, as values and scales do in files that keep them apart. ahead_bytes: pages that hints may
    keep in the page cache until they are gathered; what is hinted beyond is read when gathered.
    MismatchError where parts differ in rows, or do not add up to the format's bytes; DataError for
    files that are missing, shorter than their regions say, or changed while open; ConfigError for
    a negative ahead_bytes.
    """

    rows_read = 0
    """Rows, a request's repeats once."""
    bytes_read = 0
    """Of the pages that these lay on, values and scales: what the disk read for them."""

    def __init__(
        self,
        format: RowFormat,
        parts: Sequence[Sequence[Region]],
        *,
        ahead_bytes: int = 64 * 2**20,
    ) -> None:
        instance("format", format, RowFormat)
        instance("parts", parts, Sequence)
        for place, part in enumerate(parts):
            instance(f"parts[{place}]", part, Sequence)
            for region in part:
                instance(f"a region of parts[{place}]", region, Region)
        ahead_bytes = whole_number("ahead_bytes", ahead_bytes)
        self.format = format
        widths = [{region.row_bytes for region in part} for part in parts]
        if any(len(width) != 1 for width in widths) or sum(map(sum, widths)) != format.row_bytes:
            raise MismatchError(
                f"parts of {widths} bytes a row: the format has {format.row_bytes} in all"
            )
        counts = [sum(region.rows for region in part) for part in parts]
        if len(set(counts)) != 1:
            raise MismatchError(f"parts of {counts} rows stand side by side: equally many needed")
        if ahead_bytes < 0:
            raise ConfigError(f"ahead_bytes={ahead_bytes}: 0 or more")
        self.rows = counts[0]
        self._files = _open({region for part in parts for region in part})
        self._parts = [_Part.of(part, self._files) for part in parts]
        names = ", ".join(str(path) for path in self._files)
        self._door = Door(f"the table in {names}")
        self._counting = threading.Lock()
        pages = sum(-(-part.width // PAGE) for part in self._parts)
        self._ahead = Ahead(ahead_bytes // (pages * PAGE))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rows-ahead")

    def gather(self, rows_M: Tensor) -> Tensor:
        """(M,) int64 -> (M, R) uint8 in host memory; each row is read once."""
        rows_M = rows_M.cpu()
        with self._door.inside():
            check_rows(rows_M, self.rows)
            if ascending(rows_M):
                return self._read(rows_M)
            merged = Merged.of(rows_M)
            return self._read(merged.rows_U).index_select(0, merged.position_M)

    def prefetch(self, rows_M: Tensor) -> None:
        """Starts reading, in the order asked; a gather waits for what is on its way."""
        rows_M = rows_M.cpu()
        with self._door.inside():
            check_rows(rows_M, self.rows)
            self._ahead.add(rows_M.numpy())
            if self._hint_next() == HINTED_AT_ONCE:
                self._thread.submit(self._hint_all)

    def close(self) -> None:
        """Closes the files, after those who read from them."""
        if self._door.shut():
            self._ahead.clear()
            self._thread.shutdown()
            for file in self._files.values():
                file.close()

    def tiers(self) -> list[TierCounts]:
        """This one, which has all rows."""
        return [TierCounts("disk", self.rows_read, self.rows_read, self.bytes_read)]

    def _read(self, rows_U: Tensor) -> Tensor:
        self._ahead.gathered(rows_U.numpy())
        bytes_UR = torch.empty(len(rows_U), self.format.row_bytes, dtype=torch.uint8)
        bytes_read = 0
        for start in range(0, len(rows_U), SLICE):
            some_U, into_UR = rows_U[start : start + SLICE], bytes_UR[start : start + SLICE]
            first = 0
            for part in self._parts:
                # Only a part that is the whole row can be read to where it belongs.
                into_UW = into_UR[:, first : first + part.width].contiguous().numpy()
                for file, offset_K, where in part.places(some_U.numpy()):
                    bytes_read += file.read_rows(offset_K, into_UW[where])
                if len(self._parts) > 1:
                    into_UR[:, first : first + part.width] = torch.from_numpy(into_UW)
                first += part.width
        with self._counting:
            self.rows_read += len(rows_U)
            self.bytes_read += bytes_read
        return bytes_UR

    def _hint_next(self) -> int:
        rows_U = self._ahead.begin(HINTED_AT_ONCE)
        for part in self._parts:
            for file, offset_K, _ in part.places(rows_U):
                file.hint(offset_K, part.width)
        return len(rows_U)

    def _hint_all(self) -> None:
        while self._hint_next():
            pass


class _Part(NamedTuple):
    """One list of regions: the row each begins with (and the row after the last), their files."""

    width: int
    firsts: NDArray[np.int64]
    regions: Sequence[Region]
    files: Sequence[RowFile]

    @classmethod
    def of(cls, regions: Sequence[Region], files: dict[Path, RowFile]) -> "_Part":
        firsts = np.cumsum([0, *(region.rows for region in regions)])
        width = regions[0].row_bytes
        return cls(width, firsts, regions, [files[region.path] for region in regions])

    def places(
        self, rows_U: NDArray[np.int64]
    ) -> Iterator[tuple[RowFile, NDArray[np.int64], slice]]:
        """Of ascending rows: each file that has some, their offsets in it, and which they are."""
        cuts = np.searchsorted(rows_U, self.firsts).tolist()
        for index, (region, file) in enumerate(zip(self.regions, self.files, strict=True)):
            where = slice(cuts[index], cuts[index + 1])
            if where.start < where.stop:
                rows_K = rows_U[where] - self.firsts[index]
                yield file, region.offset + rows_K * region.row_bytes, where


def _open(regions: set[Region]) -> dict[Path, RowFile]:
    """Each file once. All or none stay open."""
    sizes: dict[Path, int] = {}
    for region in regions:
        sizes[region.path] = max(region.end, sizes.get(region.path, 0))
    files: dict[Path, RowFile] = {}
    try:
        for path, size in sorted(sizes.items()):
            files[path] = RowFile(path, size)
    except DataError:
        for file in files.values():
            file.close()
        raise
    return files
