"""Places that rows are read from, and the queue before each: bytes, seconds, dollars.

Tiers stack. Each but the last keeps the rows that were asked of it last; the last holds all
of them. The presets are one node of eight GPUs; docs/serving.md says where each figure is from.
"""

import math
from dataclasses import dataclass

from engram_lm.errors import ConfigError

PAGE = 4096


@dataclass(frozen=True, kw_only=True)
class Tier:
    """One place. Raises ConfigError for what no place has."""

    name: str
    size: int | None = None
    """Bytes of rows that it keeps; None: all there are."""
    latency: float = 0.0
    """Seconds of one read that waits for nobody."""
    bandwidth: float = math.inf
    """Bytes a second."""
    iops: float = math.inf
    """Reads a second, at the depth that suits it."""
    block: int = 1
    """Bytes that it reads in whole multiples of: 4096 of a disk, 1 where a row moves alone."""
    cpu: float = 0.0
    """CPU seconds that reading a row takes, decoding it among them."""
    request_cpu: float = 0.0
    """CPU seconds of a layer's request, however few its rows."""
    dollars: float = 0.0
    """A GB."""

    def __post_init__(self) -> None:
        for name in ("latency", "cpu", "request_cpu", "dollars"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{self.name}.{name}={getattr(self, name)}: 0 or more")
        for name in ("bandwidth", "iops"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{self.name}.{name}={getattr(self, name)}: above 0")
        if self.block < 1:
            raise ConfigError(f"{self.name}.block={self.block}: 1 or more bytes")
        if self.size is not None and self.size < 1:
            raise ConfigError(f"{self.name}.size={self.size}: 1 or more bytes")

    def moved(self, row_bytes: int) -> int:
        """Bytes that reading one row moves, on average: a row lies anywhere in its blocks."""
        return self.block + row_bytes - 1

    def row_seconds(self, row_bytes: int) -> float:
        """Between one row and the next where reads queue: the slower of reads and bytes."""
        return max(1 / self.iops, self.moved(row_bytes) / self.bandwidth)


class Queue:
    """Reads of one tier, first come, first served. `busy`: seconds that it has worked in all."""

    def __init__(self, tier: Tier, row_bytes: int) -> None:
        self.tier, self.row_seconds = tier, tier.row_seconds(row_bytes)
        self.free = self.busy = 0.0

    def read(self, asked: float, rows: int) -> float:
        """When the last of so many rows is there that are asked for at `asked`."""
        if not rows:
            return asked
        work = rows * self.row_seconds
        self.free = max(asked, self.free) + work
        self.busy += work
        return self.free + max(0.0, self.tier.latency - self.row_seconds)

    def spare(self, until: float, since: float) -> int:
        """Rows that it could read besides what it was asked for, all there by `until`."""
        last = until - max(0.0, self.tier.latency - self.row_seconds)
        idle = last - max(since, self.free)
        return max(0, int(idle / self.row_seconds)) if self.row_seconds else 2**62


def hbm() -> Tier:
    """Memory of 8 H200: 4.8 TB/s each, half of it for rows apart from each other; a GPU's price
    over its memory, because what tables take is not there for the KV cache."""
    return Tier(name="hbm", latency=1e-6, bandwidth=8 * 2.4e12, block=32, dollars=220.0)


def dram() -> Tier:
    """Pinned host memory in huge pages, read by 8 GPUs over PCIe 5.0 x16 (50 GB/s each)."""
    return Tier(
        name="dram", latency=3e-6, bandwidth=8 * 50e9, iops=8 * 35e6, block=64, dollars=10.0
    )


def nvme() -> Tier:
    """One PCIe 5.0 data-centre disk, as Samsung states its PM1743."""
    return Tier(name="nvme", latency=80e-6, bandwidth=13e9, iops=2.5e6, block=PAGE, dollars=0.15)


def remote() -> Tier:
    """Host memory of other nodes over 8 ports of 400 Gb/s RDMA."""
    return Tier(name="remote", latency=10e-6, bandwidth=8 * 45e9, iops=8 * 10e6, dollars=10.0)


TIERS = {function.__name__: function for function in (hbm, dram, nvme, remote)}
