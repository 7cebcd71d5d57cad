"""Which requests for rows a cache would have answered, by policy.

Every function takes a trace and says which of its entries were hits. A trace is rows asked for, one
request behind another; within a request rows are distinct and ascending, since repeats are merged
before anything is fetched.

Shapes: M rows of a trace, Q requests, S sets, W ways, G places of a ghost, V rows of the table.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from engram_lm.store.sets import NOBODY, WAYS

Rows = NDArray[np.int32]
Hits = NDArray[np.bool_]
AGAIN, PINNED = 2**32, 2**48
"""Added to the number of the request that used a row last: it was used again, or must stay."""
AGING = 10
"""TinyLFU halves its counts after so many requests a place."""


class Trace(NamedTuple):
    """rows_M: of all requests. begins_Q: where each request begins."""

    rows_M: Rows
    begins_Q: NDArray[np.int64]


def in_sets(
    trace: Trace,
    places: int,
    *,
    probation: int = WAYS,
    seeds: Rows | None = None,
    pinned: bool = False,
    door: int | None = None,
    ghost: int = 0,
) -> Hits:
    """As store/cache.py works: a row stands in one of the 16 ways of its set.

    probation: ways of a set from which the least recently used row goes; the others are for rows
    that were used again, the last of them; 16: LRU. seeds: rows that are there at first, as if used
    again, hottest first; pinned: and stay. door: rows from this number on are taken in when they
    are missed for the second time, as far as a ghost of so many numbers remembers; without one
    never.
    """
    sets = max(1, places // WAYS)
    tags_SW = np.full((sets, WAYS), NOBODY, np.int32)
    used_SW = np.zeros((sets, WAYS), np.int64)
    if seeds is not None:
        _seed(seeds, tags_SW, used_SW, PINNED if pinned else AGAIN)
    hit_M = np.zeros(len(trace.rows_M), np.bool_)
    ghost_G = np.full(ghost, NOBODY, np.int32)
    last = np.iinfo(np.int32).max if door is None else door
    _in_sets(trace.rows_M, trace.begins_Q, tags_SW, used_SW, probation, last, ghost_G, hit_M)
    return hit_M


@njit(cache=True)
def _seed(rows_K, tags_SW, used_SW, used):  # type: ignore[no-untyped-def]
    sets = len(tags_SW)
    taken_S = np.zeros(sets, np.int32)
    for row in rows_K:
        index = row % sets
        if taken_S[index] < tags_SW.shape[1]:
            tags_SW[index, taken_S[index]] = row
            used_SW[index, taken_S[index]] = used
            taken_S[index] += 1


@njit(cache=True)
def _in_sets(rows_M, begins_Q, tags_SW, used_SW, probation, door, ghost_G, hit_M):  # type: ignore[no-untyped-def]
    sets, ways = tags_SW.shape
    low_W = np.empty(ways, np.int64)
    for request in range(len(begins_Q)):
        begin = begins_Q[request]
        end = begins_Q[request + 1] if request + 1 < len(begins_Q) else len(rows_M)
        now = request + 1
        for m in range(begin, end):
            row = rows_M[m]
            index = row % sets
            for way in range(ways):
                if tags_SW[index, way] == row:
                    hit_M[m] = True
                    if used_SW[index, way] < PINNED:
                        used_SW[index, way] = AGAIN + now
                    break
        for m in range(begin, end):
            if hit_M[m]:
                continue
            row = rows_M[m]
            if row >= door:
                if not len(ghost_G):
                    continue
                place = row % len(ghost_G)
                if ghost_G[place] != row:
                    ghost_G[place] = row
                    continue
            index = row % sets
            fresh = 0
            for way in range(ways):
                fresh += used_SW[index, way] == now
            oldest = -1
            if probation == ways:  # what follows comes to the same, slower
                for way in range(ways):
                    used = used_SW[index, way]
                    if used < PINNED and (
                        oldest < 0 or used % AGAIN < used_SW[index, oldest] % AGAIN
                    ):
                        oldest = way
                if oldest >= 0 and used_SW[index, oldest] % AGAIN < now:
                    tags_SW[index, oldest] = row
                    used_SW[index, oldest] = now
                continue
            # The lowest few in ascending order; the least recently used of them goes.
            most, found = max(probation - fresh, 1), 0
            for way in range(ways):
                used = used_SW[index, way]
                if used == now or used >= PINNED:
                    continue
                if found == most and used >= used_SW[index, low_W[found - 1]]:
                    continue
                if found < most:
                    found += 1
                place = found - 1
                while place and used_SW[index, low_W[place - 1]] > used:
                    low_W[place] = low_W[place - 1]
                    place -= 1
                low_W[place] = way
            for way in low_W[:found]:
                if oldest < 0 or used_SW[index, way] % AGAIN < used_SW[index, oldest] % AGAIN:
                    oldest = way
            if oldest >= 0:
                tags_SW[index, oldest] = row
                used_SW[index, oldest] = now


def slru(trace: Trace, places: int, table_rows: int, *, protected: float = 0.0) -> Hits:
    """Exact LRU; with a protected part, segmented: a second use moves a row there."""
    hit_M = np.zeros(len(trace.rows_M), np.bool_)
    slot_V = np.full(table_rows, NOBODY, np.int32)
    _slru(trace.rows_M, places, int(places * protected), slot_V, hit_M)
    return hit_M


@njit(cache=True)
def _slru(rows_M, places, protected, slot_V, hit_M):  # type: ignore[no-untyped-def]
    # Two rings with a head each: place `places` for rows used once, `places + 1` for the others.
    before = np.empty(places + 2, np.int32)
    after = np.empty(places + 2, np.int32)
    row_at = np.full(places, -1, np.int32)
    segment = np.zeros(places, np.int8)
    for head in (places, places + 1):
        before[head] = after[head] = head
    filled, kept = 0, 0
    for m in range(len(rows_M)):
        row = rows_M[m]
        slot = slot_V[row]
        if slot >= 0:
            hit_M[m] = True
        elif filled < places:
            slot = filled
            filled += 1
        else:
            slot = before[places] if before[places] != places else before[places + 1]
            slot_V[row_at[slot]] = -1
            kept -= segment[slot]
        if hit_M[m] or row_at[slot] >= 0:
            after[before[slot]] = after[slot]
            before[after[slot]] = before[slot]
        target = places
        if hit_M[m]:
            if protected and not segment[slot]:
                segment[slot] = 1
                kept += 1
            target = places + segment[slot]
        else:
            segment[slot] = 0
            row_at[slot] = row
            slot_V[row] = slot
        after[slot] = after[target]
        before[slot] = target
        before[after[target]] = slot
        after[target] = slot
        if kept > protected:
            oldest = before[places + 1]
            after[before[oldest]] = places + 1
            before[places + 1] = before[oldest]
            segment[oldest] = 0
            kept -= 1
            after[oldest] = after[places]
            before[oldest] = places
            before[after[places]] = oldest
            after[places] = oldest


def clock(trace: Trace, places: int, table_rows: int) -> Hits:
    """A hand passes over rows used since it last came by, and takes the next."""
    hit_M = np.zeros(len(trace.rows_M), np.bool_)
    _clock(trace.rows_M, places, np.full(table_rows, NOBODY, np.int32), hit_M)
    return hit_M


@njit(cache=True)
def _clock(rows_M, places, slot_V, hit_M):  # type: ignore[no-untyped-def]
    row_at = np.full(places, -1, np.int32)
    used = np.zeros(places, np.bool_)
    hand = 0
    for m in range(len(rows_M)):
        row = rows_M[m]
        slot = slot_V[row]
        if slot >= 0:
            hit_M[m] = used[slot] = True
            continue
        while used[hand]:
            used[hand] = False
            hand = (hand + 1) % places
        if row_at[hand] >= 0:
            slot_V[row_at[hand]] = -1
        row_at[hand] = row
        slot_V[row] = hand
        hand = (hand + 1) % places


def tiny_lfu(trace: Trace, places: int, table_rows: int) -> Hits:
    """16 ways; a missed row takes the oldest's place if it was asked for more often of late.

    Counted exactly, a byte a row of the table, halved as time goes: kinder than a sketch would be.
    """
    sets = max(1, places // WAYS)
    tags_SW = np.full((sets, WAYS), NOBODY, np.int32)
    used_SW = np.zeros((sets, WAYS), np.int64)
    hit_M = np.zeros(len(trace.rows_M), np.bool_)
    count_V, age_V = np.zeros(table_rows, np.uint8), np.zeros(table_rows, np.uint16)
    _tiny_lfu(trace.rows_M, tags_SW, used_SW, AGING * places, count_V, age_V, hit_M)
    return hit_M


@njit(cache=True)
def _recent(row, age, count_V, age_V):  # type: ignore[no-untyped-def]
    count_V[row] >>= min(age - age_V[row], 8)
    age_V[row] = age
    return count_V[row]


@njit(cache=True)
def _tiny_lfu(rows_M, tags_SW, used_SW, period, count_V, age_V, hit_M):  # type: ignore[no-untyped-def]
    sets, ways = tags_SW.shape
    for m in range(len(rows_M)):
        row, age = rows_M[m], m // period
        count = min(_recent(row, age, count_V, age_V) + 1, 255)
        count_V[row] = count
        index = row % sets
        oldest = 0
        for way in range(ways):
            if tags_SW[index, way] == row:
                hit_M[m] = True
                used_SW[index, way] = m + 1
                break
            if used_SW[index, way] < used_SW[index, oldest]:
                oldest = way
        if not hit_M[m]:
            victim = tags_SW[index, oldest]
            if victim < 0 or count > _recent(victim, age, count_V, age_V):
                tags_SW[index, oldest] = row
                used_SW[index, oldest] = m + 1


def optimal(trace: Trace, places: int, table_rows: int) -> Hits:
    """Belady's bound: what is not needed for longest goes, or is not taken in at all."""
    next_M = np.empty(len(trace.rows_M), np.int64)
    hit_M = np.zeros(len(trace.rows_M), np.bool_)
    _next_use(trace.rows_M, np.full(table_rows, -1, np.int64), next_M)
    _optimal(trace.rows_M, next_M, places, np.zeros(table_rows, np.bool_), hit_M)
    return hit_M


@njit(cache=True)
def _next_use(rows_M, next_V, next_M):  # type: ignore[no-untyped-def]
    for m in range(len(rows_M) - 1, -1, -1):
        later = next_V[rows_M[m]]
        next_M[m] = later if later >= 0 else len(rows_M)
        next_V[rows_M[m]] = m


@njit(cache=True)
def _optimal(rows_M, next_M, places, held_V, hit_M):  # type: ignore[no-untyped-def]
    # A heap of next uses, latest on top. One that has passed sinks, so none need be removed.
    heap = np.empty(len(rows_M) + 1, np.int64)
    size, held = 0, 0
    for m in range(len(rows_M)):
        row, later = rows_M[m], next_M[m]
        if held_V[row]:
            hit_M[m] = True
            if later == len(rows_M):
                held_V[row] = False
                held -= 1
                continue
        elif later == len(rows_M):
            continue
        elif held < places:
            held_V[row] = True
            held += 1
        elif heap[0] > later:
            held_V[row], held_V[rows_M[heap[0]]] = True, False
            size -= 1
            last, hole = heap[size], 0
            while 2 * hole + 1 < size:
                child = 2 * hole + 1
                if child + 1 < size and heap[child + 1] > heap[child]:
                    child += 1
                if heap[child] <= last:
                    break
                heap[hole] = heap[child]
                hole = child
            heap[hole] = last
        else:
            continue
        hole = size
        size += 1
        while hole and heap[(hole - 1) // 2] < later:
            heap[hole] = heap[(hole - 1) // 2]
            hole = (hole - 1) // 2
        heap[hole] = later
