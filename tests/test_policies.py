"""Replays of traces: each policy against a slow one, and against the cache that works by it."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from stores import content

from engram_lm.memory.rows import RowFormat
from engram_lm.store.cache import Cache
from engram_lm.store.resident import Resident
from engram_lm.store.sets import PROBATION, WAYS

SMALL = RowFormat(dtype=torch.float32, dim=4)
ROWS = 3000


@pytest.fixture(scope="module")
def policies():
    pytest.importorskip("numba")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        import policies

        yield policies


def requests(size: int, number: int) -> list[np.ndarray]:
    """Distinct rows, ascending, some far more frequent than others."""
    draw = np.random.default_rng(7)
    ranks = draw.zipf(1.2, (number, size)) - 1
    return [np.unique(rows * 2_654_435_761 % ROWS) for rows in ranks]


def trace_of(policies, asked: list[np.ndarray]):
    begins = np.cumsum([0, *map(len, asked[:-1])])
    return policies.Trace(np.concatenate(asked).astype(np.int32), begins)


@pytest.mark.parametrize("hot", [0, 160])
@pytest.mark.parametrize(("size", "places"), [(24, 160), (24, 1600), (400, 160), (400, 1600)])
def test_the_replay_finds_what_the_cache_finds(policies, size, places, hot):
    asked = requests(size, 300)
    trace = trace_of(policies, asked)
    counts_V = np.bincount(trace.rows_M, minlength=ROWS)
    hot_K = np.argsort(-counts_V, kind="stable")[:hot]
    hit_M = policies.in_sets(trace, places, probation=PROBATION, seeds=hot_K.astype(np.int32))
    bytes_VR = content(SMALL, ROWS)
    cache = Cache(Resident(bytes_VR, SMALL), places * (SMALL.row_bytes + 16))
    assert cache._sets.count == places // WAYS
    for piece in (slice(0, 100), slice(100, hot)) if hot else ():
        rows_K = torch.from_numpy(hot_K[piece])
        cache.seed(rows_K, bytes_VR[rows_K])
    for rows, begin in zip(asked, trace.begins_Q, strict=True):
        before = cache.hits
        cache.gather(torch.from_numpy(rows))
        assert cache.hits - before == hit_M[begin : begin + len(rows)].sum()
    assert 0 < cache.hits < cache.asked


def test_lru_is_that_of_an_ordered_dict(policies):
    trace = trace_of(policies, requests(24, 300))
    for places in (1, 16, 300):
        held: OrderedDict[int, None] = OrderedDict()
        for row, hit in zip(trace.rows_M.tolist(), policies.slru(trace, places, ROWS), strict=True):
            assert hit == (row in held)
            held[row] = None
            held.move_to_end(row)
            if len(held) > places:
                held.popitem(last=False)
    # One set of 16 ways, a row a request: the same.
    single = policies.Trace(trace.rows_M, np.arange(len(trace.rows_M)))
    assert (policies.in_sets(single, 16) == policies.slru(single, 16, ROWS)).all()


def test_segmented_lru_is_that_of_two_lists(policies):
    trace = trace_of(policies, requests(24, 300))
    new: OrderedDict[int, None] = OrderedDict()
    again: OrderedDict[int, None] = OrderedDict()
    hit_M = policies.slru(trace, 200, ROWS, protected=0.75)
    for row, hit in zip(trace.rows_M.tolist(), hit_M, strict=True):
        assert hit == (row in new or row in again)
        if hit:
            new.pop(row, None)
            again[row] = None
            again.move_to_end(row)
            if len(again) > 150:
                new[again.popitem(last=False)[0]] = None
        else:
            if len(new) + len(again) == 200:
                (new or again).popitem(last=False)
            new[row] = None


def test_clock_is_that_of_a_list(policies):
    trace = trace_of(policies, requests(24, 200))
    held: list[list] = [[None, False] for _ in range(100)]
    hand = 0
    for row, hit in zip(trace.rows_M.tolist(), policies.clock(trace, 100, ROWS), strict=True):
        found = next((entry for entry in held if entry[0] == row), None)
        assert hit == (found is not None)
        if found is not None:
            found[1] = True
            continue
        while held[hand][1]:
            held[hand][1] = False
            hand = (hand + 1) % 100
        held[hand][0] = row
        hand = (hand + 1) % 100


def test_no_policy_beats_the_best_possible_one(policies):
    trace = trace_of(policies, requests(24, 300))
    rows = trace.rows_M.tolist()
    later = [next((k for k in range(m + 1, 1500) if rows[k] == rows[m]), 9999) for m in range(1500)]
    held: dict[int, int] = {}
    hits = 0
    for row, use in zip(rows, later, strict=False):
        hits += row in held
        held[row] = use
        if len(held) > 64:
            del held[max(held, key=held.__getitem__)]
    short = policies.Trace(trace.rows_M[:1500], trace.begins_Q)
    assert policies.optimal(short, 64, ROWS).sum() == hits
    best = policies.optimal(trace, 320, ROWS).sum()
    for other in (policies.slru, policies.clock, policies.tiny_lfu):
        assert other(trace, 320, ROWS).sum() < best
    assert policies.in_sets(trace, 320, probation=PROBATION).sum() < best


def test_pinned_rows_stay_and_rows_behind_the_door_wait(policies):
    trace = trace_of(policies, requests(24, 300))
    seeds = np.arange(64, dtype=np.int32)
    hit_M = policies.in_sets(trace, 160, seeds=seeds, pinned=True)
    assert hit_M[trace.rows_M < 64].all()
    # Eight ways of the one set are pinned, the others go round among all other rows.
    single = policies.Trace(trace.rows_M, np.arange(len(trace.rows_M)))
    pinned_M = policies.in_sets(single, 16, seeds=seeds[:8], pinned=True)
    rest_M = trace.rows_M >= 8
    rest = policies.Trace(trace.rows_M[rest_M], single.begins_Q)
    assert pinned_M[~rest_M].all()
    assert (pinned_M[rest_M] == policies.slru(rest, 8, ROWS)).all()
    never_M = policies.in_sets(trace, 160, door=1000)
    assert not never_M[trace.rows_M >= 1000].any() and never_M.any()
    second_M = policies.in_sets(trace, 3200, door=0, ghost=2 * ROWS)
    seen: dict[int, int] = {}
    for row, hit in zip(trace.rows_M.tolist(), second_M, strict=True):
        assert hit == (seen.get(row, 0) >= 2)
        seen[row] = seen.get(row, 0) + 1
