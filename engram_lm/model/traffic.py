"""What sharded tables send: bytes and messages of every All-to-All.

Shapes: W workers, H heads of a layer. A worker asks each owner for the distinct rows of its tokens
that the owner holds. First it says how many, then which (int64 row numbers), the values come back,
and after the backward pass their gradients go the same way as the numbers did.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

COUNT_BYTES = 8
ID_BYTES = 8
"""int64: a table may have more than 2^31 rows."""


def owned(rows: int, workers: int) -> list[tuple[int, int]]:
    """First row and the one past the last of each worker, cut as torch.chunk cuts.

    All are ceil(rows / workers) long; what is left is the last one's, and it may be nothing.
    """
    size = -(-rows // workers)
    return [(min(worker * size, rows), min((worker + 1) * size, rows)) for worker in range(workers)]


class Load(NamedTuple):
    """Rows that all workers together ask for in one layer."""

    asked: float
    local: float
    """Of them those that the asking worker owns itself: they cross no link."""
    busiest: float
    """Rows that cross the link of the worker with most to send or receive, in that direction."""

    @property
    def sent(self) -> float:
        return self.asked - self.local


def counted(requests_WW: npt.NDArray[np.int64]) -> Load:
    """The load of requests that are known: how many rows each worker (first) asks each owner."""
    local_W = np.diagonal(requests_WW)
    asked_W, owner_W = requests_WW.sum(1) - local_W, requests_WW.sum(0) - local_W
    busiest = max(int(asked_W.max()), int(owner_W.max()))
    return Load(int(requests_WW.sum()), int(local_W.sum()), busiest)


def expected(rows_H: npt.ArrayLike, primes_H: npt.ArrayLike, rows: int, workers: int) -> Load:
    """The load when every worker asks for `rows_H` rows of each head, anywhere in the head's part.

    Heads stand behind each other and longer n-grams repeat less, so owners of their heads have
    more to do.
    """
    ends_H = np.cumsum(primes_H, dtype=np.float64)
    # Rows asked for below each bound, a straight line within every head.
    bounds_W = np.array([0, *(last for _, last in owned(rows, workers))], dtype=np.float64)
    below_W = np.interp(bounds_W, [0, *ends_H], [0, *np.cumsum(rows_H)])
    owner_W = np.diff(below_W)
    asked = float(owner_W.sum())
    busiest = max((workers - 1) * float(owner_W.max()), asked - float(owner_W.min()))
    # Every worker asks the same, so all workers' own rows are one worker's requests once over.
    return Load(workers * asked, asked, busiest if workers > 1 else 0.0)


class Exchange(NamedTuple):
    """One All-to-All of one layer, all workers together."""

    name: str
    bytes: float
    """Handed to the collective, with what a worker hands to itself."""
    link_bytes: float
    """Of them those that cross a link."""
    busiest_bytes: float
    """Through the busiest worker's link, in its busier direction."""
    messages: int
    """From one worker to another."""

    def seconds(self, workers: int, link: float, latency: float) -> float:
        """A worker's messages leave one after another, each way at `link` bytes a second."""
        return latency * (workers - 1) + self.busiest_bytes / link


def exchanges(
    load: Load, workers: int, row_bytes: int, gradient_bytes: int
) -> tuple[Exchange, ...]:
    """Counts, ids, rows and gradients of one layer, in the order in which they are sent."""
    messages = workers * (workers - 1)
    counts = Exchange(
        "counts",
        COUNT_BYTES * workers**2,
        COUNT_BYTES * messages,
        COUNT_BYTES * (workers - 1),
        messages,
    )
    sizes = {"ids": ID_BYTES, "rows": row_bytes, "gradients": gradient_bytes}
    return counts, *(
        Exchange(name, size * load.asked, size * load.sent, size * load.busiest, messages)
        for name, size in sizes.items()
    )
