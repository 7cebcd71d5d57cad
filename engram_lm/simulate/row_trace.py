"""Which rows every token of a load reads: addressed from real text, or drawn by Zipf's law.

Shapes: T positions of all requests behind one another, G layers with a memory, H heads of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from engram_lm.errors import ConfigError, DataError
from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.specification import Specification
from engram_lm.model.row_profile import EXPONENTS
from engram_lm.simulate.batching import Request

MOST_ROWS = 2**31 - 1
PIECE = 65_536
"""Positions addressed together."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of prompts and continuations: uniform from half the mean to one and a half times it,
    so that requests do not march in step. Raises ConfigError."""

    prompt: int = 2048
    output: int = 256

    def __post_init__(self) -> None:
        for name in ("prompt", "output"):
            if getattr(self, name) < 1:
                raise ConfigError(f"load.{name}={getattr(self, name)}: at least 1 token")

    def draw(self, requests: int, seed: int) -> npt.NDArray[np.int64]:
        """(requests, 2): the prompt's tokens and the continuation's."""
        generator = np.random.default_rng(seed)
        means = np.array([self.prompt, self.output])
        return generator.integers(-(-means // 2), means + means // 2 + 1, (requests, 2))


def requests_of(
    lengths: npt.NDArray[np.int64], *, first: int, rate: float | None, seed: int
) -> list[Request]:
    """Requests behind one another from position `first` on, arriving as a Poisson process of `rate`
    a second (all at once where it is None)."""
    gaps = np.random.default_rng(seed).exponential(0 if rate is None else 1 / rate, len(lengths))
    firsts = first + np.concatenate([[0], np.cumsum(lengths.sum(1))])
    return [
        Request(arrival=float(arrival), first=int(begin), prompt=int(prompt), output=int(output))
        for arrival, begin, (prompt, output) in zip(
            np.cumsum(gaps), firsts[:-1], lengths, strict=True
        )
    ]


class RowTrace:
    """Rows of every position, those that occur numbered from 0 on in each layer: what stands where
    in a table is of no matter to who counts reads."""

    def __init__(self, rows_GTH: npt.NDArray[np.int32], rows: Sequence[int]) -> None:
        self.rows_GTH, self.rows = rows_GTH, tuple(rows)
        """Of each layer, how many distinct ones the trace reads."""

    def __len__(self) -> int:
        return self.rows_GTH.shape[1]

    @classmethod
    def of_text(
        cls, addresses: Addresses, ids_T: npt.NDArray[np.integer], starts: Sequence[int]
    ) -> "RowTrace":
        """Of token ids, texts beginning at `starts`. Each text is addressed from its own start, as
        a request is. AddressError for ids that are not in the vocabulary."""
        specification = addresses.specification
        shape = (len(specification.layers), specification.heads_per_layer, len(ids_T))
        rows_GHT = np.empty(shape, _dtype(specification))
        bounds = [*starts, len(ids_T)]
        for begin, end in pairwise(bounds):
            for first in range(begin, end, PIECE):
                last = min(first + PIECE, end)
                known = max(begin, first - specification.lookback)
                ids_BT = torch.from_numpy(ids_T[first:last].astype(np.int64))[None]
                past_BH = torch.from_numpy(ids_T[known:first].astype(np.int64))[None]
                rows_GTH = addresses.rows(ids_BT, past_BH)[:, 0].numpy()
                rows_GHT[:, :, first:last] = rows_GTH.transpose(0, 2, 1)
        return cls._numbered(rows_GHT)

    @classmethod
    def of_zipf(
        cls,
        specification: Specification,
        tokens: int,
        *,
        exponents: tuple[float, ...] = EXPONENTS,
        seed: int = 0,
    ) -> "RowTrace":
        """Of n-grams drawn by Zipf's law, one exponent for each order, the last taken again for
        longer ones; each falls on a row of every head as if at random. ConfigError for s <= 1."""
        if not exponents or min(exponents) <= 1:
            raise ConfigError(f"zipf={exponents}: an exponent above 1 for each order from 2 up")
        generator = np.random.default_rng(seed)
        orders = len(specification.rows_per_head)
        exponents = (*exponents, *[exponents[-1]] * orders)[:orders]
        ranks_OT = [zipf_ranks(exponent, tokens, generator) for exponent in exponents]
        shape = (len(specification.layers), specification.heads_per_layer, tokens)
        rows_GHT = np.empty(shape, _dtype(specification))
        for layer, rows_HT in zip(specification.layers, rows_GHT, strict=True):
            primes = specification.primes[layer]
            heads = [(order, prime) for order in range(orders) for prime in primes[order]]
            for head, (order, prime) in enumerate(heads):
                salt = np.uint64(generator.integers(2**63))
                rows_HT[head] = _mixed(ranks_OT[order], salt) % np.uint64(prime)
        return cls._numbered(rows_GHT)

    @classmethod
    def _numbered(cls, rows_GHT: npt.NDArray[np.integer]) -> "RowTrace":
        numbers_GTH = np.empty(rows_GHT.transpose(0, 2, 1).shape, np.int32)
        counts = []
        for rows_HT, numbers_TH in zip(rows_GHT, numbers_GTH, strict=True):
            count = 0
            # Heads have parts of the table of their own, so no row is another head's.
            for head, rows_T in enumerate(rows_HT):
                distinct, inverse_T = np.unique(rows_T, return_inverse=True)
                if count + len(distinct) > MOST_ROWS:
                    raise DataError(f"a trace of {len(rows_T)} tokens reads too many rows: cut it")
                numbers_TH[:, head] = inverse_T + count
                count += len(distinct)
            counts.append(count)
        return cls(numbers_GTH, counts)


def _dtype(specification: Specification) -> type[np.int32] | type[np.int64]:
    """The narrower of the two that holds every row number."""
    most = max(specification.table_rows(layer) for layer in specification.layers)
    return np.int32 if most <= MOST_ROWS else np.int64


def zipf_ranks(
    exponent: float, draws: int, generator: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Ranks k with the share k^-s / zeta(s), endless: far ones are floats too large to be exact,
    and still apart from each other. Devroye's rejection (1986, X.6.1)."""
    below, found, ranks = exponent - 1, 0, np.empty(draws)
    bound = 2**below
    while found < draws:
        u, v = generator.random((2, draws - found))
        with np.errstate(over="ignore"):
            rank = np.floor(np.minimum((1 - u) ** (-1 / below), 1e300))
        # t = (1 + 1/k)^(s-1), and k (t - 1) exact where t is 1 to rounding
        t = np.exp(below * np.log1p(1 / rank))
        taken = v * rank * np.expm1(below * np.log1p(1 / rank)) / (bound - 1) <= t / bound
        some = rank[taken]
        ranks[found : found + len(some)] = some
        found += len(some)
    return ranks


def _mixed(ranks_T: npt.NDArray[np.float64], salt: np.uint64) -> npt.NDArray[np.uint64]:
    """SplitMix64's finish on the ranks' bits."""
    bits = ranks_T.view(np.uint64) ^ salt
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = bits ^ (bits >> np.uint64(31))
    return mixed
