"""Both ways of keeping rows in places hold the same, place for place."""

import numpy as np
import pytest

from engram_lm.store import sets as sets_module
from engram_lm.store.sets import AGAIN, NOBODY, WAYS, Sets

ROWS, ROW_BYTES = 5000, 21


@pytest.fixture
def both(monkeypatch):
    compiled = Sets(13, ROW_BYTES)
    monkeypatch.setattr(sets_module, "_compiled", lambda: None)
    plain = Sets(13, ROW_BYTES)
    for each in (compiled, plain):
        each.bytes_PR[:] = 0
    return compiled, plain


def equal(compiled, plain):
    assert compiled._compiled is not None and plain._compiled is None
    assert np.array_equal(compiled.tags_SW, plain.tags_SW)
    assert np.array_equal(compiled.used_SW, plain.used_SW)
    assert np.array_equal(compiled.bytes_PR, plain.bytes_PR)


@pytest.mark.parametrize("seed", range(4))
def test_compiled_and_plain_ways_agree_request_by_request(both, seed):
    random = np.random.default_rng(seed)
    table_VR = random.integers(0, 256, (ROWS, ROW_BYTES), np.uint8)
    found = 0
    for request in range(1, 250):
        count = int(random.choice([1, 3, 24, 700]))
        rows_M = np.minimum(random.zipf(1.2, count), ROWS) - 1  # repeats among them
        answers = []
        for each in both:
            into_MR = np.zeros((count, ROW_BYTES), np.uint8)
            missed = each.take(rows_M, request, into_MR)
            hits = np.setdiff1d(np.arange(count), missed)
            assert np.array_equal(into_MR[hits], table_VR[rows_M[hits]])
            answers.append(missed.tolist())
        assert answers[0] == answers[1]
        found += count - len(answers[0])
        # Of a concurrent request some may have come meanwhile; `new` says that this cannot be.
        concurrent = request % 3 == 0
        rows_K = np.unique(rows_M if concurrent else rows_M[answers[0]])
        for each in both:
            each.put(rows_K, table_VR[rows_K], request, new=not concurrent)
        equal(*both)
    assert found > 1000


def test_compiled_and_plain_ways_take_seeds_alike(both):
    random = np.random.default_rng(0)
    table_VR = random.integers(0, 256, (ROWS, ROW_BYTES), np.uint8)
    for request, seeds in ((1, False), (2, True), (3, True), (4, False), (5, True)):
        rows_K = random.permutation(ROWS)[: 60 * request]
        for each in both:
            each.put(rows_K, table_VR[rows_K], request, seeds=seeds)
        equal(*both)
    tags_SW, used_SW = both[0].tags_SW, both[0].used_SW
    assert (tags_SW != NOBODY).all() and (used_SW == AGAIN).any()
    assert all(len(set(tags_W)) == WAYS for tags_W in tags_SW.tolist())
