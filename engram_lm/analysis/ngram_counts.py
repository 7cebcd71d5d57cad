"""The distinct canonical n-grams of a corpus, order by order, counted exactly.

In: documents as token ids. Out: how many distinct n-grams there are, how often they occur, and how
their number grew. Canonical ids go to a temporary file, 4 bytes each; then the n-grams of an order
are sorted, one share of them at a time, so that memory stays bounded whatever the corpus is. A
share is what falls into one range of a hash: all occurrences of an n-gram are in the same one.

Shapes: T places in the file, M n-grams of one share, U distinct ones among them, F frequencies.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engram_lm.errors import ConfigError, DataError
from engram_lm.memory.canonical import CanonicalMap

SORT_BYTES = 2**30
CHUNK = 2**20
# Odd, from the golden ratio and its square's fraction: spreads n-grams evenly over the shares.
SPREAD = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))

Keys = tuple[npt.NDArray[np.uint64], ...]


@dataclass(frozen=True, kw_only=True)
class OrderCounts:
    """The n-grams of one order. Before a document's first token stands the pad id."""

    order: int
    occurrences: int
    """One for each token."""
    distinct: int
    frequencies_F: npt.NDArray[np.int64]
    """How often an n-gram occurs, ascending."""
    ngrams_F: npt.NDArray[np.int64]
    """How many n-grams occur that often."""
    growth: tuple[tuple[int, int], ...]
    """(tokens read, distinct n-grams among them), ascending; the last is the whole corpus."""

    @property
    def once(self) -> int:
        """N-grams that occur a single time."""
        return int(self.ngrams_F[self.frequencies_F == 1].sum())


class NgramCounter:
    """Takes documents, then counts. A context manager: the temporary file goes at its end."""

    def __init__(self, canonical: CanonicalMap, max_order: int) -> None:
        if max_order < 2:
            raise ConfigError(f"max_order={max_order}: the shortest n-gram is 2")
        self.canonical_V = canonical.ids_V.numpy().astype(np.uint32)
        self.max_order = max_order
        self.tokens = 0
        # A value that no token has: it stands before documents, and marks the places to pass over.
        self.pad = canonical.canonical_ids
        self.bits = self.pad.bit_length()
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - __exit__ closes it

    def __enter__(self) -> "NgramCounter":
        return self

    def __exit__(self, *raised: object) -> None:
        self._file.close()

    def add(self, token_ids: npt.NDArray[np.integer] | list[int], *, starts: bool = True) -> None:
        """The next token ids; `starts`: they begin a document. DataError outside the vocabulary."""
        ids_T = np.asarray(token_ids, dtype=np.int64)
        if len(ids_T) and not 0 <= ids_T.min() <= ids_T.max() < len(self.canonical_V):
            raise DataError(
                f"token ids {ids_T.min()} to {ids_T.max()}: the tokenizer's run from 0 to "
                f"{len(self.canonical_V) - 1}"
            )
        pads_T = np.full(self.max_order - 1 if starts or not self.tokens else 0, self.pad)
        try:
            self._file.write(np.concatenate([pads_T, self.canonical_V[ids_T]]).astype("<u4").data)
        except OSError as error:
            raise DataError(f"{tempfile.gettempdir()}: {error.strerror}") from error
        self.tokens += len(ids_T)

    def count(
        self,
        order: int,
        *,
        points: tuple[int, ...] = (),
        sort_bytes: int = SORT_BYTES,
        progress: Callable[[float], None] | None = None,
    ) -> OrderCounts:
        """The n-grams of one order. points: token counts at which to note the growth, ascending.

        sort_bytes: what sorting may hold at once. progress: called with the share that is done.
        """
        assert 2 <= order <= self.max_order
        if not self.tokens:
            raise DataError("no tokens: there is nothing to count")
        words = -(-order // (64 // self.bits))
        # Keys, their first places, and what sorting makes of them.
        shares = 1
        while self.tokens * (16 * words + 32) > shares * sort_bytes:
            shares *= 2
        limits = np.array(sorted({*(p for p in points if p < self.tokens), self.tokens}))
        new = np.zeros(len(limits) + 1, dtype=np.int64)
        frequencies: Counter[int] = Counter()
        for share in range(shares):
            firsts_U, counts_U = _distinct(*self._share(order, share, shares))
            new += np.bincount(
                np.searchsorted(limits, firsts_U, side="right"), minlength=len(limits) + 1
            )
            for frequency, ngrams in zip(*np.unique(counts_U, return_counts=True), strict=True):
                frequencies[int(frequency)] += int(ngrams)
            if progress is not None:
                progress((share + 1) / shares)
        frequencies_F = np.array(sorted(frequencies), dtype=np.int64)
        return OrderCounts(
            order=order,
            occurrences=self.tokens,
            distinct=frequencies.total(),
            frequencies_F=frequencies_F,
            ngrams_F=np.array([frequencies[int(f)] for f in frequencies_F], dtype=np.int64),
            growth=tuple(zip(limits.tolist(), np.cumsum(new)[:-1].tolist(), strict=True)),
        )

    def _share(self, order: int, share: int, shares: int) -> "_Share":
        found = [
            _Share(tuple(key[mine_T] for key in keys), tokens_T[mine_T])
            for keys, tokens_T in self._chunks(order)
            for mine_T in [_hash(keys) % np.uint64(shares) == share]
        ]
        keys = zip(*(part.keys for part in found), strict=True)
        return _Share(
            tuple(np.concatenate(word) for word in keys),
            np.concatenate([part.tokens_M for part in found]),
        )

    def _chunks(self, order: int) -> Iterator[tuple[Keys, npt.NDArray[np.int64]]]:
        """Keys of the n-grams that end at each token, and the tokens' numbers."""
        self._file.flush()
        stream_T = np.memmap(self._file, dtype="<u4", mode="r")
        per_word, token = 64 // self.bits, 0
        for first in range(self.max_order - 1, len(stream_T), CHUNK):
            last = min(first + CHUNK, len(stream_T))
            ids_T = stream_T[first - order + 1 : last].astype(np.uint64)
            real_T = ids_T[order - 1 :] != self.pad
            keys = []
            for begin in range(0, order, per_word):
                key_T = np.zeros(last - first, dtype=np.uint64)
                for back in range(begin, min(begin + per_word, order)):
                    key_T <<= np.uint64(self.bits)
                    key_T |= ids_T[order - 1 - back : len(ids_T) - back]
                keys.append(key_T[real_T])
            tokens = int(real_T.sum())
            yield tuple(keys), np.arange(token, token + tokens)
            token += tokens


class _Share(NamedTuple):
    """N-grams of a share as words of 64 bits, and the number of the token that ends each."""

    keys: Keys
    tokens_M: npt.NDArray[np.int64]


def _hash(keys: Keys) -> npt.NDArray[np.uint64]:
    mix_M = keys[0] * SPREAD[0]
    for key in keys[1:]:
        mix_M = (mix_M ^ (mix_M >> np.uint64(32)) ^ key) * SPREAD[1]
    # The low bits of a product depend on the low bits of its factors only: take the high ones.
    return mix_M >> np.uint64(40)


def _distinct(
    keys: Keys, tokens_M: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of each distinct n-gram the first token that ends it, and how often it occurs."""
    if not len(tokens_M):
        return tokens_M, tokens_M
    order_M = np.argsort(keys[0]) if len(keys) == 1 else np.lexsort(keys)
    new_M = np.zeros(len(order_M), dtype=bool)
    new_M[0] = True
    for key in keys:
        sorted_M = key[order_M]
        new_M[1:] |= sorted_M[1:] != sorted_M[:-1]
    begins_U = np.flatnonzero(new_M)
    firsts_U = np.minimum.reduceat(tokens_M[order_M], begins_U)
    return firsts_U, np.diff(begins_U, append=len(order_M))
