"""Random rows of 264 bytes (fp8 with scales) from disk and from memory, beside others in turn.

    pip install --no-deps --target ENGRAMDB engramdb-python==0.3.0
    python benchmarks/gather.py --engramdb ENGRAMDB

Cold: the file's pages are dropped before each reading, and every request is of new rows. Arms: the
disk store; fio (io_uring, depth 32, 4 KiB, direct), which is the ceiling and counts reads, of which
rows that lie across two pages need two; `Store.fetch` of engramdb-python and its IoUringPageReader,
which is given every page once, in order, and does not cut rows out of them. Warm: all rows of a
smaller table are in memory or the page cache. Decoding: rows gathered and turned into bfloat16,
beside torch's index_select of values and scales, cast and multiplied; ceiling: the bytes that are
copied in that time. engramdb-python and the program fio are installed by hand: the package needs
neither. Writes results/gather.json and its figure; the last line printed is its summary.
"""

import engram_lm.openmp  # noqa: F401

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from disk_reads import FORMAT, ROW
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from engram_lm.analysis.figures import BLUE, GRID, save
from engram_lm.store.cache import Cache
from engram_lm.store.disk import Disk
from engram_lm.store.host import Host
from engram_lm.store.region import Region
from engram_lm.store.resident import Resident
from engram_lm.store.row_file import PAGE
from engram_lm.studies.record import Record

ASKED = 65_536
BLOCK = 100_000
"""Rows that are the same but for the number each begins with."""
Taken = dict[str, list[float]]


class Rows:
    """A file of rows whose content is known: where it lies, and what is in it."""

    def __init__(self, path: Path, rows: int) -> None:
        self.path, self.rows = path, rows
        self.random = np.random.default_rng(0)
        self.block = self.random.integers(0, 256, (BLOCK, ROW), dtype=np.uint8)
        with path.open("wb") as file:
            for start in range(0, rows, BLOCK):
                file.write(self.content(np.arange(start, min(start + BLOCK, rows))).data)
            file.flush()
            os.fsync(file.fileno())
        self.descriptor = os.open(path, os.O_RDONLY)

    def content(self, rows_M: NDArray[np.int64]) -> NDArray[np.uint8]:
        bytes_MR = self.block[rows_M % BLOCK]
        bytes_MR[:, :8] = rows_M[:, None].view(np.uint8)
        return bytes_MR

    def ask(self, below: int | None = None) -> NDArray[np.int64]:
        return self.random.choice(below or self.rows, ASKED, replace=False)

    def drop(self) -> None:
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def region(self, rows: int) -> Region:
        return Region(path=self.path, offset=0, rows=rows, row_bytes=ROW)


def read_bytes() -> int:
    """That this process has had read from disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def fio(path: Path, seconds: int) -> float:
    """Its 4 KiB random reads a second."""
    options = "--rw=randread --randrepeat=0 --bs=4k --direct=1 --ioengine=io_uring --iodepth=32"
    options += " --readonly --time_based --output-format=json"
    said = subprocess.run(
        ["fio", "--name=rows", f"--filename={path}", f"--runtime={seconds}", *options.split()],
        capture_output=True,
        check=True,
    )
    return float(json.loads(said.stdout)["jobs"][0]["read"]["iops"])


def cold(rows: Rows, db: Any, rounds: int, taken: Taken) -> None:
    disk = Disk(FORMAT, [[rows.region(rows.rows)]])
    store = db.Store(str(rows.path.parent), 1, rows.rows, ROW)
    pages = db.IoUringPageReader(PAGE)
    assert pages.backend == "io_uring"

    def pages_of(rows_M: NDArray[np.int64]) -> list[int]:
        ends = np.concatenate([rows_M * ROW // PAGE, (rows_M * ROW + ROW - 1) // PAGE])
        return (np.unique(ends) * PAGE).tolist()

    def read_pages(offsets: list[int]) -> list[bytes]:
        return pages.read_pages([rows.descriptor] * len(offsets), offsets)

    arms: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
        "disk": (torch.from_numpy, lambda rows_M: disk.gather(rows_M).numpy()),
        "fetch": (lambda rows_M: rows_M.tolist(), store.fetch),
        "pages": (pages_of, read_pages),
    }
    for _ in range(rounds):
        taken["cold_fio_reads_per_second"].append(fio(rows.path, 3))
        for name, (given, read) in arms.items():
            rows_M = rows.ask()
            request = given(rows_M)
            rows.drop()
            before, cpu, begun = read_bytes(), time.process_time(), time.perf_counter()
            found = read(request)
            seconds = time.perf_counter() - begun
            taken[f"cold_{name}_rows_per_second"].append(ASKED / seconds)
            taken[f"cold_{name}_cpu_us_per_row"].append(1e6 * (time.process_time() - cpu) / ASKED)
            taken[f"cold_{name}_bytes_read_per_row"].append((read_bytes() - before) / ASKED)
            if name == "pages":
                continue
            bytes_MR = np.frombuffer(memoryview(found).cast("B"), np.uint8).reshape(-1, ROW)
            assert (bytes_MR == rows.content(rows_M)).all(), name
    taken["cold_disk_bytes_counted_per_row"].append(disk.bytes_read / disk.rows_read)
    disk.close()


def warm(rows: Rows, db: Any, few: int, rounds: int, taken: Taken) -> Tensor:
    """Returns the bytes of the smaller table."""
    region = rows.region(few)
    with Disk(FORMAT, [[region]]) as disk:
        resident = Resident.of(disk)
    cache = Cache(Disk(FORMAT, [[region]]), 2 * few * ROW)
    for rows_M in torch.arange(few).split(ASKED):
        cache.gather(rows_M)
    host = Host.of(resident)
    store = db.Store(str(rows.path.parent), 1, rows.rows, ROW)
    for start in range(0, few * ROW, 2**24):  # into the page cache, which its fetch reads
        os.pread(rows.descriptor, 2**24, start)
    arms: dict[str, Callable[[Any], Any]] = {
        "fetch": store.fetch,
        "cache": cache.gather,
        "resident": resident.gather,
        "host": host.gather,
    }
    for _ in range(rounds):
        rows_M = rows.ask(few)
        given = torch.from_numpy(rows_M)
        requests = {"fetch": rows_M.tolist(), "cache": given, "resident": given, "host": given}
        for name, request in requests.items():
            begun = time.perf_counter()
            arms[name](request)
            taken[f"warm_{name}_rows_per_second"].append(ASKED / (time.perf_counter() - begun))
    with cache, host:
        assert cache.asked - cache.hits == few, "the cache had not all rows"
    return resident.bytes_VR


def decoding(bytes_VR: Tensor, random: np.random.Generator, rounds: int, taken: Taken) -> None:
    bytes_VR[:, FORMAT.value_bytes :] = bytes_VR[:, FORMAT.value_bytes :] % 20 + 117
    values_VE = bytes_VR[:, : FORMAT.dim].contiguous()
    scales_VG = bytes_VR[:, FORMAT.dim :].contiguous()
    table = Resident(bytes_VR, FORMAT)
    copied = torch.empty(2, 2**28, dtype=torch.uint8).zero_()

    def by_torch(rows_M: Tensor) -> Tensor:
        values_ME = values_VE.index_select(0, rows_M).view(torch.float8_e4m3fn).bfloat16()
        scales_MG = scales_VG.index_select(0, rows_M).view(torch.float8_e8m0fnu).bfloat16()
        return (values_ME.unflatten(1, (-1, FORMAT.scale_group)) * scales_MG[..., None]).flatten(1)

    arms: dict[str, Callable[[Tensor], Tensor]] = {
        "decoded_torch": by_torch,
        "decoded_plain": lambda rows_M: FORMAT.decode_plainly(table.gather(rows_M)),
        "decoded_resident": lambda rows_M: FORMAT.decode(table.gather(rows_M)),
    }
    for _ in range(rounds):
        rows_M = torch.from_numpy(random.choice(len(bytes_VR), ASKED, replace=False))
        found = {}
        for name, values_of in arms.items():
            begun = time.perf_counter()
            found[name] = values_of(rows_M)
            seconds = time.perf_counter() - begun
            taken[f"{name}_rows_per_second"].append(ASKED / seconds)
        plain = found["decoded_plain"].view(torch.int16)
        assert torch.equal(found["decoded_resident"].view(torch.int16), plain)
        number = ~found["decoded_plain"].isnan()
        assert torch.equal(found["decoded_torch"][number], found["decoded_plain"][number])
        begun = time.perf_counter()
        copied[0].copy_(copied[1])
        # Read and written, as rows and values are.
        taken["copy_bytes_per_second"].append(copied.nbytes / (time.perf_counter() - begun))


def drawn(summary: dict[str, float]) -> Figure:
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    for axes, (title, names) in zip(
        figure.subplots(1, 3),
        {
            "cold, from disk": {
                "disk store": "cold_disk_rows_per_second",
                "fio, depth 32\n(reads)": "cold_fio_reads_per_second",
                "IoUringPageReader": "cold_pages_rows_per_second",
                "Store.fetch": "cold_fetch_rows_per_second",
            },
            "warm, from memory": {
                "resident": "warm_resident_rows_per_second",
                "host": "warm_host_rows_per_second",
                "cache": "warm_cache_rows_per_second",
                "Store.fetch": "warm_fetch_rows_per_second",
            },
            "memory, decoded to bf16": {
                "resident": "decoded_resident_rows_per_second",
                "without numba": "decoded_plain_rows_per_second",
                "torch": "decoded_torch_rows_per_second",
            },
        }.items(),
        strict=True,
    ):
        speeds = [summary[name] for name in names.values()]
        unit, scale = ("million", 1e6) if max(speeds) > 1e6 else ("thousand", 1e3)
        ours = ("disk store", "resident", "host", "cache")
        colors = [BLUE if name in ours else GRID for name in names]
        bars = axes.barh(list(names), [speed / scale for speed in speeds], color=colors)
        axes.bar_label(bars, fmt="%.3g", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(f"{unit} rows a second")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=48_000_000, help="of the file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", type=Path, default=Path("."), help="on the disk to measure")
    parser.add_argument("--engramdb", type=Path, required=True, help="where it is installed")
    arguments = parser.parse_args()
    record, taken = Record("gather"), defaultdict[str, list[float]](list)
    sys.path.insert(0, str(arguments.engramdb))
    db = importlib.import_module("engramdb")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        rows = Rows(Path(directory) / "shard_000.bin", arguments.rows)
        cold(rows, db, arguments.rounds, taken)
        bytes_VR = warm(rows, db, min(arguments.rows, 4_000_000), 3 * arguments.rounds, taken)
    decoding(bytes_VR, rows.random, 3 * arguments.rounds, taken)
    summary = {name: statistics.median(values) for name, values in taken.items()}
    summary |= {
        "file_bytes": float(arguments.rows * ROW),
        "cold_disk_over_fio": ratio(taken, "cold_disk_rows", "cold_fio_reads"),
        "cold_disk_over_fetch": ratio(taken, "cold_disk_rows", "cold_fetch_rows"),
        "cold_disk_over_pages": ratio(taken, "cold_disk_rows", "cold_pages_rows"),
        **{
            f"warm_{name}_over_fetch": ratio(taken, f"warm_{name}_rows", "warm_fetch_rows")
            for name in ("cache", "resident", "host")
        },
        "decoded_over_torch": ratio(taken, "decoded_resident_rows", "decoded_torch_rows"),
        "decoded_share_of_copy": (ROW + 2 * FORMAT.dim)
        * summary["decoded_resident_rows_per_second"]
        / summary["copy_bytes_per_second"],
    }
    record.write(summary, taken, seeds=[0])
    save(drawn(summary), record.path.parent, "gather")
    print(json.dumps(summary))


def ratio(taken: Taken, ours: str, theirs: str) -> float:
    """Median of the ratios round by round."""
    pairs = zip(taken[f"{ours}_per_second"], taken[f"{theirs}_per_second"], strict=True)
    return statistics.median(our / their for our, their in pairs)


if __name__ == "__main__":
    main()
