"""Which n-grams of a corpus share rows: counted, beside what chance gives (analysis/collisions.py).

Shapes: T token ids, U distinct n-grams of one order, K heads of an order, R rows of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engram_lm.analysis.bands import Integers, Keys, keys_of
from engram_lm.analysis.collisions import shared
from engram_lm.errors import DataError
from engram_lm.memory.ngrams import Addresses

CHUNK = 2**16
"""Positions that are addressed at once."""


@dataclass(frozen=True, kw_only=True)
class HeadSharing:
    """One head: what was counted, and what chance gives for as many n-grams and rows."""

    rows: int
    load: float
    """Distinct n-grams per row."""
    untouched: int
    """Rows that no n-gram of the corpus reads."""
    untouched_expected: float
    shared: float
    """Share of distinct n-grams whose row another reads too."""
    shared_expected: float
    most: int
    """N-grams on the fullest row."""


@dataclass(frozen=True, kw_only=True)
class OrderSharing:
    """One order of one layer."""

    layer: int
    order: int
    distinct: int
    heads: tuple[HeadSharing, ...]
    every_head: float
    """Share of distinct n-grams that share their row in every head: nothing there is their own."""
    every_head_expected: float

    @property
    def load(self) -> float:
        """Distinct n-grams per row, of all heads together."""
        return self.distinct * len(self.heads) / sum(head.rows for head in self.heads)

    @property
    def untouched(self) -> float:
        """Share of rows that no n-gram of the corpus reads."""
        of = sum(head.rows for head in self.heads)
        return sum(head.untouched for head in self.heads) / of

    @property
    def untouched_expected(self) -> float:
        """The same by chance."""
        of = sum(head.rows for head in self.heads)
        return sum(head.untouched_expected for head in self.heads) / of


class RowSharing:
    """How many of a corpus's distinct n-grams read each row of one layer and order.

    ids_T: the corpus as token ids, in one stream. starts_T: True where a document starts; only the
    boundary rule "document" heeds it. N-grams are those that the rule addresses: what it shuts out
    is pad, so that those that begin behind a boundary alike are one. None ends at the stream's
    first order - 1 ids. DataError for fewer ids than the order.
    """

    def __init__(
        self,
        addresses: Addresses,
        ids_T: npt.NDArray[np.integer],
        layer: int,
        order: int,
        starts_T: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        specification = addresses.specification
        if len(ids_T) < order:
            raise DataError(f"{len(ids_T)} token ids: an n-gram of order {order} needs as many")
        self.layer, self.order = layer, order
        keys = _addressed(addresses, ids_T, order, starts_T)
        ends_U = np.unique(keys, return_index=True)[1] + order - 1
        self.distinct = len(ends_U)
        place = addresses.layers.index(layer)
        self.columns = slice((order - 2) * specification.heads, (order - 1) * specification.heads)
        self.sizes = specification.primes[layer][order - 2]
        self.first_K = np.array(specification.offsets(layer)[self.columns])
        before = specification.lookback
        rows = []
        for begin in range(0, len(ids_T), CHUNK):
            ends = ends_U[(ends_U >= begin) & (ends_U < begin + CHUNK)]
            first = max(0, begin - before)
            part, starts = (
                None if each_T is None else torch.from_numpy(each_T[first : begin + CHUNK])[None]
                for each_T in (ids_T.astype(np.int64), starts_T)
            )
            assert part is not None
            rows_LBTH = addresses.rows(part, document_starts=starts)
            rows.append(rows_LBTH[place, 0, :, self.columns].numpy()[np.sort(ends) - first])
        self.rows_UK: Integers = np.concatenate(rows) - self.first_K
        """Of each distinct n-gram, in the order of their first ends."""
        self.readers = tuple(
            np.bincount(self.rows_UK[:, head], minlength=size)
            for head, size in enumerate(self.sizes)
        )
        """Head -> (R,): distinct n-grams that read each row."""

    def of(self, rows_NK: Integers) -> Integers:
        """How many distinct n-grams of the corpus read these rows of the layer's table, (N, K)."""
        own_NK = rows_NK - self.first_K
        counts = [readers[own_NK[:, head]] for head, readers in enumerate(self.readers)]
        return np.stack(counts, axis=1)

    def on(self, head: int, row: int) -> int:
        """How many read one row of the layer's table, which is this head's."""
        return int(self.readers[head][row - self.first_K[head]])

    def summary(self) -> OrderSharing:
        """Counted, and expected."""
        counts_UK = self.of(self.rows_UK + self.first_K)
        heads = tuple(
            HeadSharing(
                rows=size,
                load=self.distinct / size,
                untouched=int((readers == 0).sum()),
                untouched_expected=size * (1 - 1 / size) ** self.distinct,
                shared=float((counts_UK[:, head] > 1).mean()),
                shared_expected=shared(self.distinct, size),
                most=int(readers.max()),
            )
            for head, (size, readers) in enumerate(zip(self.sizes, self.readers, strict=True))
        )
        return OrderSharing(
            layer=self.layer,
            order=self.order,
            distinct=self.distinct,
            heads=heads,
            every_head=float((counts_UK > 1).all(axis=1).mean()),
            every_head_expected=float(np.prod([head.shared_expected for head in heads])),
        )


def _addressed(
    addresses: Addresses,
    ids_T: npt.NDArray[np.integer],
    order: int,
    starts_T: npt.NDArray[np.bool_] | None,
) -> Keys:
    """N-grams as the boundary rule has them, at all ids but the first order - 1."""
    canonical, specification = addresses.canonical, addresses.specification
    canonical_T = canonical.ids_V.numpy()[ids_T]
    begins_T = np.zeros(len(ids_T), dtype=bool)
    if specification.boundary_rule == "document" and starts_T is not None:
        begins_T = starts_T
    elif specification.boundary_rule == "eos":
        begins_T[1:] = ids_T[:-1] == specification.pad_id
    places_T = np.arange(len(ids_T))
    since_T = places_T - np.maximum.accumulate(np.where(begins_T, places_T, -order))
    pad = canonical.ids_V.numpy()[specification.pad_id]
    ends_T = places_T[order - 1 :]
    back = range(order - 1, -1, -1)
    parts = [np.where(since_T[ends_T] < n, pad, canonical_T[ends_T - n]) for n in back]
    return keys_of(parts, canonical.canonical_ids)


def sharing_of(
    addresses: Addresses,
    ids_T: npt.NDArray[np.integer],
    starts_T: npt.NDArray[np.bool_] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[tuple[int, int], RowSharing]:
    """(layer, order) -> who reads its rows, of every table (`RowSharing`). progress: tables
    so far, of all."""
    orders = range(2, addresses.specification.max_order + 1)
    tables = [(layer, order) for layer in addresses.layers for order in orders]
    found = {}
    for done, (layer, order) in enumerate(tables):
        if progress is not None:
            progress(done, len(tables))
        found[layer, order] = RowSharing(addresses, ids_T, layer, order, starts_T)
    return found
