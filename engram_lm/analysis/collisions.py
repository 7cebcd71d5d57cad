"""How many n-grams share rows, given how many there are: what decides the rows per head.

A head of R rows sends each of D distinct n-grams to a row as good as drawn by chance, so a row is
shared with at least one other with probability q = 1 - (1 - 1/R)^(D - 1). K heads of different
primes draw independently: all of an n-gram's rows are shared with probability q^K, and only then
is there nothing of its own to read. For an n-gram with G more frequent ones, the probability that
one of those reads its row is 1 - (1 - 1/R)^G; over occurrences this is what a reader meets, since
a shared row belongs to its most frequent n-gram. Heads are primes a little above R; R is used, so
that a real memory has slightly fewer collisions.
"""

import math
from dataclasses import dataclass

import numpy as np

from engram_lm.analysis.ngram_counts import OrderCounts
from engram_lm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Collisions:
    """Expected shares, from 0 to 1, for one order at `rows` rows per head."""

    rows: int
    load: float
    """Distinct n-grams per row."""
    used: float
    """Of rows that any n-gram reads."""
    one_head: float
    """Of distinct n-grams whose row in one head another reads too."""
    every_head: float
    """Of distinct n-grams whose rows in all heads others read too."""
    occurrences_one_head: float
    """Of occurrences whose row in one head a more frequent n-gram reads too."""
    occurrences_every_head: float


def collisions(counts: OrderCounts, rows: int, heads: int) -> Collisions:
    """What to expect of `heads` heads of `rows` rows each."""
    assert rows >= 2
    _check_heads(heads)
    above_F = counts.distinct - np.cumsum(counts.ngrams_F)
    occurrences_F = counts.frequencies_F * counts.ngrams_F / counts.occurrences
    met_F = -np.expm1(above_F * math.log1p(-1 / rows))
    return Collisions(
        rows=rows,
        load=counts.distinct / rows,
        used=-math.expm1(counts.distinct * math.log1p(-1 / rows)),
        one_head=shared(counts.distinct, rows),
        every_head=shared(counts.distinct, rows) ** heads,
        occurrences_one_head=float((occurrences_F * met_F).sum()),
        occurrences_every_head=float((occurrences_F * met_F**heads).sum()),
    )


def shared(distinct: int, rows: int) -> float:
    """q, the probability that another of `distinct` n-grams reads an n-gram's row in one head."""
    return -math.expm1((distinct - 1) * math.log1p(-1 / rows))


def rows_for(distinct: int, heads: int, share: float) -> int:
    """The fewest rows per head at which at most `share` of n-grams share their rows in all heads.

    ConfigError for a share that is not between 0 and 1.
    """
    _check_heads(heads)
    if not 0 < share < 1:
        raise ConfigError(f"share={share}: between 0 and 1, both excluded")
    if distinct < 2:
        return 2
    one_head = share ** (1 / heads)
    rows = max(2, round(-1 / math.expm1(math.log1p(-one_head) / (distinct - 1))))
    # Rounding is off by less than one row, give or take the last bits of a float.
    while shared(distinct, rows) > one_head:
        rows += 1
    while rows > 2 and shared(distinct, rows - 1) <= one_head:
        rows -= 1
    return rows


def _check_heads(heads: int) -> None:
    if heads < 1:
        raise ConfigError(f"heads={heads}: at least 1 head per order")
