"""Token ids -> row numbers on a CPU, compiled: the fast twin of ngrams.py, equal to it everywhere.

Shapes: as in ngrams.py, and P positions a block, J = P * H rows that one block reads in one layer.

A division may take tens of cycles, and there is one for each row. But every divisor is known before
the first token, so `mix mod prime` becomes a multiplication by the prime's reciprocal, which a
processor does for several heads at once. Reciprocals are values, not code: one compiled kernel,
which numba keeps on disk, serves every specification.

Importing this module needs numba (the extra `fast`) and compiles, some seconds the first time.
"""

import math
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engram_lm.errors import ConfigError
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.specification import INT64_MAX, Specification
from engram_lm.memory.window import EMPTY, Window

try:
    from numba import njit, prange

    from engram_lm.memory.numba_threads import follow_torch
except ImportError as error:
    raise ConfigError(
        "CompiledAddresses: numba is not installed; pip install 'engram-lm[fast]', or use Addresses"
    ) from error

Uint64s = npt.NDArray[np.uint64]
Int64s = npt.NDArray[np.int64]

BLOCK = 16
"""P. Constants are repeated so often that one loop runs over all heads of P positions, and the
constants of a layer or two still fit the processor's first cache."""

POSITIONS_PER_THREAD = 4_096
"""Fewer take less time than it takes to wake another thread."""

SPARE_VALUES = 2**17
"""Of 8 bytes: less than a megabyte comes from memory that the allocator has at hand anyway."""

_HALF, _LOW = np.uint64(32), np.uint64(2**32 - 1)
_MODULO = np.uint64(INT64_MAX)
"""A mix is taken modulo 2^63: its high half is then below 2^31 (see _remainder)."""


class CompiledAddresses(Addresses):
    """Addresses with compiled rows for ids on a CPU, in as many threads as torch has.

    Ids on a GPU take the torch path of Addresses, which runs there. Raises ConfigError without
    numba.
    """

    def __init__(self, specification: Specification, canonical: CanonicalMap) -> None:
        super().__init__(specification, canonical)
        constants = self._constants(torch.device("cpu"))
        primes_LH = constants.primes_NLK.transpose(0, 1).flatten(1)
        reciprocals_LH = [[2**64 // prime for prime in primes] for primes in primes_LH.tolist()]
        # Half the bytes: with 100,000 ids the map then fits the processor's second cache.
        self._canonical_V = constants.canonical_V.numpy().astype(np.uint32)
        self._multipliers_LN = _unsigned(constants.multipliers_NL.T)
        self._primes_LJ = np.tile(_unsigned(primes_LH), BLOCK)
        self._reciprocals_LJ = np.tile(np.array(reciprocals_LH, dtype=np.uint64), BLOCK)
        self._offsets_LJ = np.tile(_unsigned(constants.offsets_LH), BLOCK)
        self._spare: list[Int64s] = []

    def window_rows(self, window: Window) -> Tensor:
        """Row numbers of the T tokens of a window, (L, B, T, H) int64."""
        if window.ids_BW.device.type != "cpu":
            return super().window_rows(window)
        ids_BW, starts_BW = window.packed_ids_BW, self._packed_starts(window)
        if starts_BW is None:
            starts_BW = torch.zeros_like(ids_BW, dtype=torch.bool)
        B, T = ids_BW.shape[0], window.tokens
        if window.order_BW is None:
            places_BT = torch.arange(window.earlier, ids_BW.shape[1]).expand(B, T)
        else:
            places_BT = torch.argsort(window.order_BW, dim=1)[:, window.earlier :]
        L, H = len(self.layers), self.specification.heads_per_layer
        rows_LBTH = self._empty((L, B, T, H))
        rows_LM = rows_LBTH.reshape(L, B * T * H)
        inputs = (
            ids_BW.numpy(),
            starts_BW.numpy(),
            places_BT.numpy(),
            self._canonical_V,
            np.uint64(self._canonical_V[self.specification.pad_id]),
            self._multipliers_LN,
            self._primes_LJ,
            self._reciprocals_LJ,
            self._offsets_LJ,
        )
        shares = min(torch.get_num_threads(), B * T // POSITIONS_PER_THREAD)
        if shares > 1:
            follow_torch()
            _write_in_shares(inputs, shares, rows_LM)
        else:
            _write_rows(inputs, 0, B * T, rows_LM)
        return torch.from_numpy(rows_LBTH)

    def _empty(self, shape: tuple[int, ...]) -> Int64s:
        """An array for rows, in memory that rows had before if nobody holds them any more.

        Rows are large and short-lived, and the pages of new memory cost nearly as much time as what
        is written into them.
        """
        size = math.prod(shape)
        if size < SPARE_VALUES:
            return np.empty(shape, dtype=np.int64)
        memory = self._spare.pop() if self._spare else np.empty(0, dtype=np.int64)
        if memory.size < size:
            memory = np.empty(size, dtype=np.int64)
        rows = memory[:size].reshape(shape)
        # The tensor made of it, and every view of that, keeps this very object alive.
        weakref.finalize(rows, self._keep, memory).atexit = False
        return rows

    def _keep(self, memory: Int64s) -> None:
        if len(self._spare) < 2:  # one call's rows may still be held while the next one's are made
            self._spare.append(memory)


def _unsigned(values: Tensor) -> Uint64s:
    return np.ascontiguousarray(values.numpy()).view(np.uint64)


@njit("uint64(uint64, uint64, uint64)", inline="always")
def _remainder(mix: np.uint64, prime: np.uint64, reciprocal: np.uint64) -> np.uint64:
    """mix mod prime, for mix < 2^63, prime >= 2 and reciprocal = floor(2^64 / prime).

    Of the product's four partial products the lowest is left out, which no vector unit can carry
    cheaply. With the reciprocal's own rounding that is less than 1 + mix / 2^64 < 1.5 below the
    true quotient, so after rounding down the quotient is at most 2 too small and never too large.
    No sum overflows: mix's high half is below 2^31, and the reciprocal's is at most 2^31.
    """
    mix_low, mix_high = mix & _LOW, mix >> _HALF
    low, high = reciprocal & _LOW, reciprocal >> _HALF
    quotient = mix_high * high + ((mix_high * low + mix_low * high) >> _HALF)
    remainder = mix - quotient * prime
    # Below zero an unsigned number wraps round to a huge one, so the smaller is the right one.
    remainder = min(remainder, remainder - prime)
    return min(remainder, remainder - prime)


_INPUTS = (
    "Tuple((int64[:, ::1], boolean[:, ::1], int64[:, :], uint32[::1], uint64, uint64[:, ::1], "
    "uint64[:, ::1], uint64[:, ::1], uint64[:, ::1]))"
)


@njit(f"void({_INPUTS}, int64, int64, int64[:, ::1])", cache=True)
def _write_rows(inputs: tuple[Any, ...], first: int, last: int, rows_LM: Int64s) -> None:
    """Writes the rows of tokens `first` to `last`, counted through all sequences.

    places_BT of the inputs: where each token stands in its window, once padding is out of the way.
    """
    ids_BW, starts_BW, places_BT, canonical_V, pad, multipliers_LN = inputs[:6]
    primes_LJ, reciprocals_LJ, offsets_LJ = inputs[6:]
    L, N = multipliers_LN.shape
    T = places_BT.shape[1]
    H = primes_LJ.shape[1] // BLOCK
    lookback = N - 1
    values_W = np.empty(BLOCK + lookback, np.uint64)
    values_NP = np.empty((N, BLOCK), np.uint64)
    mix_P = np.empty(BLOCK, np.uint64)
    mix_PNK = np.empty((BLOCK, N - 1, H // (N - 1)), np.uint64)
    mix_J = mix_PNK.reshape(-1)
    b, t = divmod(first, max(T, 1))
    for begin in range(first, last, BLOCK):
        positions = min(BLOCK, last - begin)
        p = 0
        while p < positions:
            # A run of neighbouring places, each of which is looked up once for all that look back
            # on it; padding between tokens ends a run, and so does a sequence.
            first_place = places_BT[b, t]
            run = 1
            while (
                p + run < positions and t + run < T and places_BT[b, t + run] == first_place + run
            ):
                run += 1
            seen = -1  # how many places back belong to the text: -1 where there is no token at all
            for w in range(lookback + run):
                place = first_place - lookback + w
                if place < 0 or ids_BW[b, place] == EMPTY:
                    seen, values_W[w] = -1, pad
                else:
                    # What is older than a start is another document.
                    seen = 0 if starts_BW[b, place] else min(seen + 1, lookback)
                    values_W[w] = canonical_V[ids_BW[b, place]]
                if w >= lookback:
                    for back in range(N):
                        values_NP[back, p + w - lookback] = (
                            values_W[w - back] if back <= seen else pad
                        )
            p, t = p + run, t + run
            if t == T:
                b, t = b + 1, 0
        for layer in range(L):
            for p in range(positions):
                mix_P[p] = values_NP[0, p] * multipliers_LN[layer, 0]
            for back in range(1, N):
                for p in range(positions):
                    mix_P[p] ^= values_NP[back, p] * multipliers_LN[layer, back]
                for p in range(positions):
                    mix_PNK[p, back - 1, :] = mix_P[p] & _MODULO
            rows_J = rows_LM[layer, begin * H : (begin + positions) * H]
            for j in range(rows_J.size):
                remainder = _remainder(mix_J[j], primes_LJ[layer, j], reciprocals_LJ[layer, j])
                rows_J[j] = np.int64(remainder + offsets_LJ[layer, j])


@njit(f"void({_INPUTS}, int64, int64[:, ::1])", parallel=True, cache=True)
def _write_in_shares(inputs: tuple[Any, ...], shares: int, rows_LM: Int64s) -> None:
    """Writes the rows of all tokens in equal shares, a thread each."""
    tokens = inputs[2].size
    for share in prange(shares):
        first, last = tokens * share // shares, tokens * (share + 1) // shares
        _write_rows(inputs, first, last, rows_LM)
