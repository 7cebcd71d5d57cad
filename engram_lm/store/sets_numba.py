"""What `Sets` does with its places, compiled: one pass over the rows, beside the interpreter.

A token's few dozen rows cost numpy dozens of calls, each of which the model's own thread waits for;
of a prompt's many rows it would read and write everything several times. Places and what they hold
are those of the plain way, number for number.

Importing this module needs numba (the extra `fast`) and compiles, some seconds the first time.
Shapes as in sets.py, L rows looked up before any is copied.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

from engram_lm.store.sets import AGAIN, NOBODY, PROBATION, WAYS

Numbers = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

LOOKED_UP = 32
"""Rows whose tags are fetched from memory side by side."""


@njit(
    "int64(int64[::1], int64, int64[:, ::1], int64[:, ::1], uint8[:, ::1], uint8[:, ::1],"
    " int64[::1])",
    nogil=True,
    cache=True,
)
def take(
    rows_M: Numbers,
    used: int,
    tags_SW: Numbers,
    used_SW: Numbers,
    bytes_PR: Bytes,
    into_MR: Bytes,
    missed_M: Numbers,
) -> int:
    """Copies what is here and marks it as used; writes which are not, and returns how many."""
    place_L = np.empty(LOOKED_UP, np.int64)
    missed = 0
    for first in range(0, rows_M.size, LOOKED_UP):
        count = min(LOOKED_UP, rows_M.size - first)
        for ahead in range(count):
            row = rows_M[first + ahead]
            set = row % tags_SW.shape[0]
            place = np.int64(NOBODY)
            for way in range(WAYS):
                if tags_SW[set, way] == row:
                    place = set * WAYS + way
            place_L[ahead] = place
        for ahead in range(count):
            place = place_L[ahead]
            if place == NOBODY:
                missed_M[missed] = first + ahead
                missed += 1
            else:
                used_SW[place // WAYS, place % WAYS] = used
                for byte in range(bytes_PR.shape[1]):
                    into_MR[first + ahead, byte] = bytes_PR[place, byte]
    return missed


@njit("void(int64[::1], int64[::1], int64)", nogil=True, cache=True)
def _sort(keys: Numbers, ways: Numbers, count: int) -> None:
    """The first `count` ways by their keys; of equal ones the first stays first."""
    for end in range(1, count):
        way, place = ways[end], end
        while place and keys[ways[place - 1]] > keys[way]:
            ways[place] = ways[place - 1]
            place -= 1
        ways[place] = way


@njit(
    "void(int64[::1], int64[::1], uint8[:, ::1], int64, boolean, int64[:, ::1], int64[:, ::1],"
    " uint8[:, ::1])",
    nogil=True,
    cache=True,
)
def put(
    rows_K: Numbers,
    order_K: Numbers,
    bytes_KR: Bytes,
    used: int,
    seeds: bool,
    tags_SW: Numbers,
    used_SW: Numbers,
    bytes_PR: Bytes,
) -> None:
    """Puts rows that are not here in places of their sets, set by set as in order_K."""
    leaving_W, last_W = np.empty(WAYS, np.int64), np.empty(WAYS, np.int64)
    before, rank, room = np.int64(NOBODY), 0, 0
    for index in order_K:
        set = rows_K[index] % tags_SW.shape[0]
        if set != before:
            before, rank, room = set, 0, 0 if seeds else WAYS
            for way in range(WAYS):
                leaving_W[way], last_W[way] = way, used_SW[set, way] % AGAIN
                if seeds and tags_SW[set, way] == NOBODY:
                    room += 1
            _sort(used_SW[set], leaving_W, WAYS)
            _sort(last_W, leaving_W, PROBATION)
        if rank < room:
            way = leaving_W[rank]
            rank += 1
            tags_SW[set, way], used_SW[set, way] = rows_K[index], used
            for byte in range(bytes_PR.shape[1]):
                bytes_PR[set * WAYS + way, byte] = bytes_KR[index, byte]
