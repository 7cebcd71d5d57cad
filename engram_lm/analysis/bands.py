"""How often an n-gram stood in the training ids, and a loss split by that.

Shapes: T tokens, K distinct n-grams.
N-grams are of canonical ids and run across document separators, as a memory with the boundary rule
"cross" addresses them. Counts are exact: no hashing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from engram_lm.analysis.student import half_width
from engram_lm.errors import DataError

BANDS = ("never", "1-9", "10-99", "100 and more")
_STARTS = (0, 1, 10, 100)

Integers = npt.NDArray[np.int64]
Keys = npt.NDArray[np.number]
"""N-grams as int64, in positional notation; as complex128, two numbers each below 2 ** 53 and so
exact, where an int64 is too small: 4-grams of the released vocabularies."""


class BandLoss(TypedDict):
    """One band's mean and its standard error, None for too few tokens: see `half`."""

    band: str
    tokens: int
    mean: float | None
    standard_error: float | None


@dataclass(frozen=True, kw_only=True)
class NgramCounts:
    """Every n-gram of one order that a stream of canonical ids holds, and how often."""

    order: int
    base: int
    """Canonical ids lie below it."""
    keys_K: Keys
    """Ascending."""
    counts_K: Integers

    def of(self, canonical_T: npt.NDArray[np.integer]) -> Integers:
        """How often the n-gram that ends at each position was counted, (T,).

        0 at the first order - 1 positions, where no whole n-gram ends.
        """
        counts_T = np.zeros(len(canonical_T), dtype=np.int64)
        keys = ngram_keys(canonical_T, self.order, self.base)
        if not len(keys) or not len(self.keys_K):
            return counts_T
        places = np.searchsorted(self.keys_K, keys).clip(max=len(self.keys_K) - 1)
        counts_T[self.order - 1 :] = np.where(self.keys_K[places] == keys, self.counts_K[places], 0)
        return counts_T


def count_ngrams(canonical_T: npt.NDArray[np.integer], order: int, *, base: int) -> NgramCounts:
    """Counts the n-grams of a stream; base: how many canonical ids there are.

    One sort, about 0.1 s for each million tokens. DataError for ids that are not below base, and
    where n-grams are more than two numbers hold.
    """
    keys_K, counts_K = np.unique(ngram_keys(canonical_T, order, base), return_counts=True)
    return NgramCounts(order=order, base=base, keys_K=keys_K, counts_K=counts_K.astype(np.int64))


def bands(counts: Integers) -> npt.NDArray[np.int8]:
    """Index into BANDS of each count, in its shape."""
    return (np.searchsorted(_STARTS, counts, side="right") - 1).astype(np.int8)


def window_bands(
    counts: NgramCounts,
    canonical_T: npt.NDArray[np.integer],
    context: int,
    starts_T: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.int8]:
    """Bands of the losses that `token_losses` gives of this stream, (T - 1,): by the n-gram that
    ends with the last token read. Where a window begins, or with starts_T a document, memory reads
    padding instead of the stream's n-gram, so those positions belong to no band: -1.
    """
    bands_T = bands(counts.of(canonical_T))[:-1]
    begins_T = np.arange(len(bands_T)) % context == 0
    if starts_T is not None:
        begins_T = begins_T | starts_T[: len(bands_T)]
    places_T = np.arange(len(bands_T))
    since_T = places_T - np.maximum.accumulate(np.where(begins_T, places_T, 0))
    bands_T[since_T < counts.order - 1] = -1
    return bands_T


def loss_by_band(
    losses_T: npt.NDArray[np.floating], bands_T: npt.NDArray[np.int8]
) -> list[BandLoss]:
    """Mean and standard error of the losses in each of BANDS, in their order, empty bands included.

    Differences of two models' losses work as well: the error is then that of the paired difference.
    """
    rows = []
    for index, band in enumerate(BANDS):
        losses = losses_T[bands_T == index].astype(np.float64)
        error = float(losses.std(ddof=1)) / math.sqrt(len(losses)) if len(losses) > 1 else None
        mean = float(losses.mean()) if len(losses) else None
        rows.append(BandLoss(band=band, tokens=len(losses), mean=mean, standard_error=error))
    return rows


def half(row: BandLoss, checkpoints: int) -> float | None:
    """Half the width of the mean's 95 % interval: over several checkpoints, or with one over tokens
    as if they were independent. None where the error is not known."""
    error = row["standard_error"]
    return (
        None
        if error is None
        else half_width(error, checkpoints if checkpoints > 1 else row["tokens"])
    )


def ngram_keys(canonical_T: npt.NDArray[np.integer], order: int, base: int) -> Keys:
    """The n-gram that ends at each position but the first order - 1. DataError: `count_ngrams`."""
    ends = max(0, len(canonical_T) - order + 1)
    return keys_of([canonical_T[place : place + ends] for place in range(order)], base)


def keys_of(canonical_ids: Sequence[npt.NDArray[np.integer]], base: int) -> Keys:
    """Of n-grams whose first ids, second ids and so on these are. DataError: `count_ngrams`."""
    order, half = len(canonical_ids), len(canonical_ids) // 2
    for ids in canonical_ids:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < base:
            raise DataError(f"canonical ids up to {ids.max()}: they must lie below base={base}")
    if base**order <= np.iinfo(np.int64).max:
        return _positional(canonical_ids, base)
    if base ** (order - half) > 2**53:
        raise DataError(f"order={order}: {base} canonical ids give more n-grams than two numbers")
    # Complex numbers sort by their real parts, then by their imaginary ones.
    keys = np.empty(len(canonical_ids[0]), dtype=np.complex128)
    keys.real = _positional(canonical_ids[:half], base)
    keys.imag = _positional(canonical_ids[half:], base)
    return keys


def _positional(canonical_ids: Sequence[npt.NDArray[np.integer]], base: int) -> Integers:
    keys = np.zeros(len(canonical_ids[0]), dtype=np.int64)
    for ids in canonical_ids:
        keys = keys * base + ids
    return keys
