"""How many distinct rows a batch of text asks for: measured on text, or assumed by Zipf's law.

Shapes: L layers with a memory, H heads of a layer, B sequences, T tokens, K ranks.
A batch of t tokens makes t requests of each head. Merged, those for the same row are one, and how
many remain depends on the text alone: on how often its n-grams repeat.
"""

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engram_lm.errors import ConfigError
from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.specification import Specification

Counts = npt.NDArray[np.float64]

EXPONENTS = (1.1, 1.04, 1.02)


class Profile(Protocol):
    """A frequency profile. It answers one question: how much does merging leave?"""

    def distinct(self, tokens: float) -> Counts:
        """Distinct rows of each head among the requests of a batch of `tokens` tokens, (L, H)."""
        ...


class ZipfProfile:
    """The n-gram of rank k has the share k^-s / zeta(s) of all: assumed, one s for each order.

    Raises ConfigError for s <= 1, where the shares of endless ranks have no sum.
    """

    def __init__(
        self, specification: Specification, exponents: tuple[float, ...] = EXPONENTS
    ) -> None:
        orders = len(specification.rows_per_head)
        if any(not exponent > 1 for exponent in exponents) or not exponents:
            raise ConfigError(f"zipf={exponents}: an exponent above 1 for each order from 2 up")
        # Longer n-grams repeat less: taking the last exponent again counts too many rows, not few.
        self.exponents = (*exponents, *[exponents[-1]] * orders)[:orders]
        self.primes_LH = _primes(specification)
        self.heads = specification.heads

    def distinct(self, tokens: float) -> Counts:
        ngrams_H = np.repeat(
            [zipf_distinct(exponent, tokens) for exponent in self.exponents], self.heads
        )
        # N-grams fall on rows as if at random, and two on the same row are one request.
        rows_LH: Counts = -self.primes_LH * np.expm1(ngrams_H * np.log1p(-1 / self.primes_LH))
        return np.minimum(rows_LH, tokens)


def zipf_distinct(exponent: float, tokens: float) -> float:
    """Expected distinct values among so many draws of Zipf's law over endless ranks."""
    # The first ranks one by one, then bins that grow by 1 %: p hardly changes within one.
    firsts_K = np.concatenate([np.arange(1.0, 1000.0), 1000.0 * 1.01 ** np.arange(0, 6000)])
    widths_K = np.diff(firsts_K)
    middles_K = firsts_K[:-1] + (widths_K - 1) / 2
    weights_K = middles_K**-exponent
    tail = firsts_K[-1] ** (1 - exponent) / (exponent - 1)
    zeta = float((weights_K * widths_K).sum()) + tail
    expected_K = -np.expm1(tokens * np.log1p(-np.minimum(weights_K / zeta, 1 - 1e-15)))
    return min(float((expected_K * widths_K).sum()) + tokens * tail / zeta, tokens)


class Point(NamedTuple):
    """What batches of one size asked for. rows_LH: distinct ones, summed over `batches`."""

    batches: int
    rows_LH: npt.NDArray[np.int64]


class MeasuredProfile:
    """Distinct rows counted on text: exact at the sizes measured.

    In between, straight lines on logarithmic axes. Beyond them the last line is continued, which
    counts too many rows rather than too few: the more text, the more of it repeats.
    """

    def __init__(self, specification: Specification, points: Mapping[int, Point]) -> None:
        if not points:
            raise ConfigError("points={}: at least one size must have been measured")
        self.primes_LH = _primes(specification)
        self.points = {size: points[size] for size in sorted(points)}
        self.means = {size: point.rows_LH / point.batches for size, point in self.points.items()}

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens per batch that were measured, ascending."""
        return tuple(self.means)

    def distinct(self, tokens: float) -> Counts:
        if tokens in self.means:
            return self.means[int(tokens)]
        # One token asks for one row of each head.
        known = {1: np.ones_like(self.primes_LH), **self.means}
        lines = [*pairwise(known)]
        low, high = next((line for line in lines if tokens < line[1]), lines[-1])
        power_LH = np.log(known[high] / known[low]) / math.log(high / low)
        rows_LH: Counts = known[low] * (tokens / low) ** power_LH
        return np.minimum(rows_LH, np.minimum(self.primes_LH, tokens))


def measure(addresses: Addresses, batches: Iterable[tuple[Tensor, Tensor | None]]) -> Point:
    """Counts the distinct rows of batches of one size: token ids and document starts, (B, T).

    AddressError for ids that the specification does not know.
    """
    specification = addresses.specification
    counted, total_LH = 0, np.zeros(_primes(specification).shape, dtype=np.int64)
    for ids_BT, starts_BT in batches:
        rows_LBTH = addresses.rows(ids_BT, document_starts=starts_BT)
        total_LH += [
            [len(torch.unique(rows_M)) for rows_M in rows_BTH.flatten(0, 1).T]
            for rows_BTH in rows_LBTH
        ]
        counted += 1
    return Point(counted, total_LH)


def _primes(specification: Specification) -> Counts:
    return np.array(
        [
            [prime for order in specification.primes[layer] for prime in order]
            for layer in specification.layers
        ],
        dtype=np.float64,
    )
