"""Tables of random bytes, and stores of all kinds over them."""

from pathlib import Path

import numpy as np
import torch

from engram_lm.memory.rows import RowFormat, RowStore
from engram_lm.memory.table import Table
from engram_lm.store.cache import Cache
from engram_lm.store.disk import Disk
from engram_lm.store.host import Host
from engram_lm.store.overlay import Overlay
from engram_lm.store.region import Region
from engram_lm.store.resident import Resident

FORMATS = {
    "fp32": RowFormat(dtype=torch.float32, dim=20),
    "bf16": RowFormat(dtype=torch.bfloat16, dim=160),  # 320 bytes, as in Qwen4-Exp
    "fp16": RowFormat(dtype=torch.float16, dim=3),
    "fp8": RowFormat(dtype=torch.float8_e4m3fn, dim=256, scale_group=32),  # 264, as in V4.1
    "long": RowFormat(dtype=torch.float32, dim=1100),  # over two pages
}


def content(format: RowFormat, rows: int = 3000) -> torch.Tensor:
    """(V, R) uint8."""
    return torch.randint(0, 256, (rows, format.row_bytes), dtype=torch.uint8)


def write(path: Path, bytes_VR: torch.Tensor, offset: int = 0) -> Region:
    """A file with these rows behind `offset` other bytes, and one more behind them."""
    with path.open("wb") as file:
        file.write(b"\x01" * offset)
        file.write(bytes_VR.numpy().tobytes() + b"\x02")
    rows, row_bytes = bytes_VR.shape
    return Region(path=path, offset=offset, rows=rows, row_bytes=row_bytes)


def shards(path: Path, bytes_VR: torch.Tensor, offset: int = 13) -> list[Region]:
    """The same, cut in three files of unequal length, the middle one empty."""
    cut = len(bytes_VR) // 3
    pieces = bytes_VR[:cut], bytes_VR[cut:cut], bytes_VR[cut:]
    return [write(path.with_suffix(f".{i}"), piece, offset) for i, piece in enumerate(pieces)]


def table(bytes_VR, format, _):
    store = Table(len(bytes_VR), format.dim, dtype=format.dtype)
    store.weight.data = bytes_VR.clone().view(format.dtype)
    return store


def resident(bytes_VR, format, _):
    return Resident(bytes_VR, format)


def host(bytes_VR, format, _):
    return Host.of(Resident(bytes_VR, format))


def disk(bytes_VR, format, directory):
    return Disk(format, [[write(directory / "rows", bytes_VR)]])


def sharded_disk(bytes_VR, format, directory):
    return Disk(format, [shards(directory / "rows", bytes_VR)])


def split_disk(bytes_VR, format, directory):
    """Values and scales apart, each in shards of its own."""
    cut = format.value_bytes if format.scale_group else format.row_bytes // 3
    columns = bytes_VR[:, :cut], bytes_VR[:, cut:]
    return Disk(format, [shards(directory / f"part{i}", c) for i, c in enumerate(columns)])


def changed(base_of):
    """Some rows are wrong in the base, and right in the overlay."""

    def overlay(bytes_VR, format, directory):
        rows_K = torch.randperm(len(bytes_VR))[:100]
        wrong_VR = bytes_VR.clone()
        wrong_VR[rows_K] ^= 255
        return Overlay(base_of(wrong_VR, format, directory), rows_K, bytes_VR[rows_K])

    overlay.__name__ = f"overlay_{base_of.__name__}"
    return overlay


def cached(slower_of, share: float = 0.25):
    def cache(bytes_VR, format, directory):
        slower = slower_of(bytes_VR, format, directory)
        return Cache(slower, int(bytes_VR.nbytes * share) + 16 * 16 + 16 * format.row_bytes)

    cache.__name__ = f"cache_{slower_of.__name__}"
    return cache


PARAMETERS = [table, cached(table)]
"""These have no scales."""
PLAIN = [table, resident, host, disk, sharded_disk, split_disk]
STORES = [
    *PLAIN,
    *map(changed, PLAIN[1:]),
    PARAMETERS[1],
    *map(cached, PLAIN[1:]),
    *(cached(changed(store)) for store in PLAIN[1:]),
    changed(cached(disk)),
    cached(cached(disk, 0.5), 0.1),
    changed(changed(disk)),
]


def zipf(rows: int, size: int) -> torch.Tensor:
    """Row numbers with repeats, some far more frequent than others."""
    ranks = np.random.default_rng(torch.randint(0, 2**31, ()).item()).zipf(1.3, size) - 1
    return torch.from_numpy(ranks * 2_654_435_761 % rows)


def claim_same_bits(store: RowStore, bytes_VR: torch.Tensor) -> None:
    for size in (0, 1, 24, 2000):
        rows_M = zipf(len(bytes_VR), size)
        assert torch.equal(store.gather(rows_M), bytes_VR[rows_M])
