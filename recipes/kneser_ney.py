"""Modified Kneser-Ney: the n-gram model that a learned memory has to beat.

Interpolated, three discounts an order, estimated from counts of counts (Chen and Goodman 1998,
https://dash.harvard.edu/handle/1/25104739, section 3): with c the count of an n-gram hw,

    p_n(w | h) = max(c(hw) - D_n(c), 0) / c(h) + lambda(h) p_{n-1}(w | h without its first id)
    D_n(i) = i - (i + 1) Y n_{i+1} / n_i for i = 1, 2 and 3 or more, with Y = n_1 / (n_1 + 2 n_2)

c counts occurrences in the highest order and distinct ids to the left in the lower ones; n_i is how
many n-grams have the count i; lambda(h) is what the discounts have taken, over c(h); p_0 is
uniform. A context that was never counted leaves all to the lower order.

Shapes: N rows that see nothing of one another, T ids in a row, K distinct n-grams, H contexts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engram_lm.analysis.bands import keys_of
from engram_lm.errors import ConfigError, DataError

Ids = npt.NDArray[np.integer]
Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

FEW = (0.5, 1.0, 1.5)
"""Discounts where the text is too small to estimate them, KenLM's."""


class _Order(NamedTuple):
    """Counts of one order. Keys are ids in positional notation, ascending."""

    keys_K: Integers
    discounted_K: Floats
    """c - D(c)."""
    contexts_H: Integers
    totals_H: Integers
    """c(h)."""
    left_H: Floats
    """lambda(h)."""


class KneserNey:
    """A model of the orders 1 to `order`, fitted."""

    def __init__(self, vocabulary: int, orders: list[_Order]) -> None:
        self.vocabulary, self.orders = vocabulary, orders

    def log_probabilities(self, rows_NT: Ids) -> Floats:
        """(N, T - 1): natural logarithm of the probability of each id but a row's first, given
        those before it in its row. DataError for ids outside of the vocabulary."""
        rows, ids = rows_NT.shape
        p_NT = np.full((rows, ids - 1), 1 / self.vocabulary)
        for number, order in enumerate(self.orders, start=1):
            if ids < max(number, 2):
                break  # no row is as long
            keys = ngrams(rows_NT, number, self.vocabulary)
            contexts, known = _places(order.contexts_H, keys // self.vocabulary)
            places, seen = _places(order.keys_K, keys)
            counted = np.where(seen, order.discounted_K[places], 0) / order.totals_H[contexts]
            lower = p_NT[:, max(number - 2, 0) :]  # where a row has a context as long
            own = counted + order.left_H[contexts] * lower.ravel()
            lower[...] = np.where(known, own, lower.ravel()).reshape(lower.shape)
        return np.log(p_NT)


def fit(rows_NT: Ids, order: int, *, vocabulary: int) -> KneserNey:
    """Counts rows; a row's first id is a context only, as models that predict the next id have it.

    Seconds for a million ids and order 4. ConfigError for an order below 1 or n-grams that 64 bits
    do not hold, DataError for rows of fewer than max(order, 2) ids or ids outside the vocabulary.
    """
    if order < 1 or vocabulary**order > np.iinfo(np.int64).max:
        raise ConfigError(f"order={order}, vocabulary={vocabulary}: 1 or more, n-grams of 64 bits")
    if rows_NT.shape[1] < max(order, 2) or not len(rows_NT):
        raise DataError(f"rows of shape {rows_NT.shape}: a row of {max(order, 2)} ids is needed")
    keys_K, counts_K = np.unique(ngrams(rows_NT, order, vocabulary), return_counts=True)
    orders = [_order(keys_K, counts_K, vocabulary)]
    for lower in range(order - 1, 0, -1):
        keys_K, counts_K = np.unique(keys_K % vocabulary**lower, return_counts=True)
        orders.insert(0, _order(keys_K, counts_K, vocabulary))
    return KneserNey(vocabulary, orders)


def ngrams(rows_NT: Ids, order: int, vocabulary: int) -> Integers:
    """Keys of the n-grams that end at each id but a row's first, row behind row."""
    first, ends = int(order == 1), rows_NT.shape[1] - max(order, 2) + 1
    columns = [rows_NT[:, at : at + ends].ravel() for at in range(first, first + order)]
    return keys_of(columns, vocabulary).astype(np.int64)


def discounts(counts_K: Integers) -> Floats:
    """(4,): what is taken from counts of 0, 1, 2, and 3 or more. FEW where a count of counts is 0
    or makes one that is no discount."""
    n = np.bincount(np.minimum(counts_K, 5), minlength=6)[1:5].tolist()
    taken: Sequence[float] = FEW
    if all(n):
        y = n[0] / (n[0] + 2 * n[1])
        estimated = [i - (i + 1) * y * n[i] / n[i - 1] for i in (1, 2, 3)]
        if all(0 <= each <= i for i, each in enumerate(estimated, start=1)):
            taken = estimated
    return np.array([0.0, *taken])


def _order(keys_K: Integers, counts_K: Integers, vocabulary: int) -> _Order:
    taken_K = discounts(counts_K)[np.minimum(counts_K, 3)]
    contexts_H, place_K = np.unique(keys_K // vocabulary, return_inverse=True)
    totals_H = np.bincount(place_K, counts_K).astype(np.int64)
    return _Order(
        keys_K=keys_K,
        discounted_K=counts_K - taken_K,
        contexts_H=contexts_H,
        totals_H=totals_H,
        left_H=np.bincount(place_K, taken_K) / totals_H,
    )


def _places(sorted_K: Integers, wanted: Integers) -> tuple[Integers, npt.NDArray[np.bool_]]:
    """Where each wanted key is, and whether it is there."""
    places = np.searchsorted(sorted_K, wanted).clip(max=len(sorted_K) - 1)
    return places, sorted_K[places] == wanted
