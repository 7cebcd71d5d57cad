"""Rows looked up in tiers that stand before one another: counts only, no bytes and no time.

Shapes: G layers with a memory, T tokens, H heads, M rows asked for, U distinct ones of them.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engram_lm.errors import ConfigError
from engram_lm.simulate.recent import Recent, Rows
from engram_lm.simulate.tiers import Queue, Tier


class Tiers:
    """What stands in which tier. The first that has a row reads it, and those before take it in."""

    def __init__(self, tiers: Sequence[Tier], rows: Sequence[int], row_bytes: int) -> None:
        if not tiers or tiers[-1].size is not None or any(t.size is None for t in tiers[:-1]):
            sizes = ", ".join(f"{tier.name} {tier.size}" for tier in tiers)
            raise ConfigError(
                f"tiers={sizes or '()'}: every tier but the last needs a size, and the last holds "
                "all rows, so it has none"
            )
        self.queues = [Queue(tier, row_bytes) for tier in tiers]
        self._firsts = np.concatenate([[0], np.cumsum(rows)])
        total = int(self._firsts[-1])
        self._kept = [Recent(total, (tier.size or 0) // row_bytes) for tier in tiers[:-1]]
        self._stamp_V = np.full(total, -1, np.int64)
        self._ahead_V = np.zeros(total, np.bool_)
        self.ahead = 0
        """Rows that have been read ahead and not been asked for yet."""
        self.ahead_hits = 0

    def distinct(self, rows_GTH: npt.NDArray[np.int32]) -> list[Rows]:
        """Of each layer the distinct rows, as numbers over all layers."""
        found = []
        for first, rows_TH in zip(self._firsts, rows_GTH, strict=False):
            rows_M = rows_TH.reshape(-1) + first
            place_M = np.arange(len(rows_M))
            self._stamp_V[rows_M] = place_M
            found.append(rows_M[self._stamp_V[rows_M] == place_M])
        return found

    def take(self, rows_U: Rows) -> list[int]:
        """How many of these distinct rows each tier reads; all are used now."""
        ahead_U = self._ahead_V[rows_U]
        if self.ahead:
            self._ahead_V[rows_U] = False
            here = int(np.count_nonzero(ahead_U))
            self.ahead -= here
            self.ahead_hits += here
        reads, coming_U = [], np.ones(len(rows_U), np.bool_)
        for kept in self._kept:
            hit_U = kept.holds(rows_U) & coming_U
            reads.append(int(np.count_nonzero(hit_U & ~ahead_U)))
            kept.use(rows_U[coming_U])
            coming_U &= ~hit_U
        reads.append(int(np.count_nonzero(coming_U & ~ahead_U)))
        return reads

    def look_ahead(self, rows_U: Rows, room: int, seconds: tuple[float, float]) -> tuple[int, bool]:
        """Reads of these rows those that only the last tier has, as many as there is room and, in
        idle time from .. until, time for. How many, and whether that was all."""
        missing = ~self._ahead_V[rows_U]
        for kept in self._kept:
            missing &= ~kept.holds(rows_U)
        since, until = seconds
        wanted_U = rows_U[missing]
        wanted = wanted_U[: min(room - self.ahead, self.queues[-1].spare(until, since))]
        self.queues[-1].read(since, len(wanted))
        self._ahead_V[wanted] = True
        self.ahead += len(wanted)
        return len(wanted), len(wanted) == len(wanted_U)
