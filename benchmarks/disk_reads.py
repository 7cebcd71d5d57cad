"""Ways to read random rows of 264 bytes from a file that is not in memory, in turn.

    python benchmarks/disk_reads.py

Arms: the disk store (one thread: WILLNEED ahead, preadv, DONTNEED), 32 threads of preadv, 32 of
preadv on a file opened with O_DIRECT, and a mapping with WILLNEED. Every request is of new rows,
read cold: the file's pages are dropped before it. CPU time counts all threads of the process.
Ceiling: the disk's own rate of random 4 KiB reads, which the best arm is the measure of. Writes
results/disk_reads.json; the last line printed is its summary.
"""

import engram_lm.openmp  # noqa: F401

import argparse
import json
import mmap
import os
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engram_lm.memory.rows import RowFormat
from engram_lm.store.disk import Disk
from engram_lm.store.region import Region
from engram_lm.store.row_file import PAGE
from engram_lm.studies.record import Record

FORMAT = RowFormat(dtype=torch.float8_e4m3fn, dim=256, scale_group=32)
ROW = FORMAT.row_bytes
THREADS = 32
Rows = NDArray[np.int64]
Read = Callable[[Rows], NDArray[np.uint8]]


def threads_of_preadv(path: Path, pool: ThreadPoolExecutor) -> Read:
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def read(rows_U: Rows) -> NDArray[np.uint8]:
        bytes_UR = np.empty((len(rows_U), ROW), np.uint8)
        view, offsets = bytes_UR.reshape(-1).data, (rows_U * ROW).tolist()
        step = -(-len(rows_U) // (THREADS * 8))

        def some(start: int) -> None:
            for index in range(start, min(start + step, len(offsets))):
                into = view[index * ROW : (index + 1) * ROW]
                os.preadv(descriptor, [into], offsets[index])

        list(pool.map(some, range(0, len(rows_U), step)))
        return bytes_UR

    return read


def threads_of_direct(path: Path, pool: ThreadPoolExecutor) -> Read:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    own = threading.local()

    def read(rows_U: Rows) -> NDArray[np.uint8]:
        bytes_UR = np.empty((len(rows_U), ROW), np.uint8)
        begin_U = rows_U * ROW
        page_U = begin_U // PAGE * PAGE
        size_U = (begin_U + ROW - 1) // PAGE * PAGE + PAGE - page_U
        step = min(32, -(-len(rows_U) // THREADS))

        def some(start: int) -> None:
            if not hasattr(own, "aligned"):
                own.aligned = mmap.mmap(-1, 32 * 2 * PAGE)
            view = memoryview(own.aligned)
            for index in range(start, min(start + step, len(rows_U))):
                size = int(size_U[index])
                os.preadv(descriptor, [view[:size]], int(page_U[index]))
                place = int(begin_U[index] - page_U[index])
                bytes_UR[index] = np.frombuffer(view[place : place + ROW], np.uint8)

        list(pool.map(some, range(0, len(rows_U), step)))
        return bytes_UR

    return read


def mapping(path: Path, mapped: mmap.mmap) -> Read:
    bytes_VR = np.frombuffer(mapped, np.uint8).reshape(-1, ROW)

    def read(rows_U: Rows) -> NDArray[np.uint8]:
        begin_U = rows_U * ROW
        page_U = begin_U // PAGE * PAGE
        for page, end in zip(page_U.tolist(), (begin_U + ROW).tolist(), strict=True):
            mapped.madvise(mmap.MADV_WILLNEED, page, end - page)
        return bytes_VR[rows_U]

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8_000_000, help="of the file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", type=Path, default=Path("."), help="on the disk to measure")
    arguments = parser.parse_args()
    record, random = Record("disk_reads"), np.random.default_rng(0)
    pool = ThreadPoolExecutor(THREADS)
    taken: dict[str, list[float]] = defaultdict(list)
    with tempfile.NamedTemporaryFile(dir=arguments.directory) as file:
        for _ in range(0, arguments.rows, 100_000):
            file.write(random.bytes(100_000 * ROW))
        file.flush()
        os.fsync(file.fileno())
        path, rows = Path(file.name), arguments.rows
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        mapped.madvise(mmap.MADV_RANDOM)
        region = Region(path=path, offset=0, rows=rows, row_bytes=ROW)
        disk = Disk(FORMAT, [[region]])
        arms: dict[str, Read] = {
            "disk": lambda rows_U: disk.gather(torch.from_numpy(rows_U)).numpy(),
            "threads": threads_of_preadv(path, pool),
            "direct": threads_of_direct(path, pool),
            "mapping": mapping(path, mapped),
        }
        for size, rounds in ((24, 40), (32_768, arguments.rounds)):
            for _ in range(rounds):
                for name, read in arms.items():
                    rows_U = np.sort(random.choice(rows, size, replace=False))
                    mapped.madvise(mmap.MADV_DONTNEED)
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    cpu, wall = time.process_time(), time.perf_counter()
                    bytes_UR = read(rows_U)
                    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                    assert (bytes_UR == arms["mapping"](rows_U)).all()
                    if size == 24:
                        taken[f"{name}_ms_24_rows"].append(1e3 * wall)
                    else:
                        taken[f"{name}_rows_per_second"].append(size / wall)
                    taken[f"{name}_cpu_us_per_row_of_{size}"].append(1e6 * cpu / size)
        disk.close()
    summary = {name: statistics.median(values) for name, values in taken.items()}
    record.write(summary, taken, seeds=[0])
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
