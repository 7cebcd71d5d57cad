"""AUROC against counting pairs; its interval against direct bootstraps."""

import numpy as np
import pytest

from engram_lm.analysis.auroc import auroc, auroc_interval
from engram_lm.errors import DataError


def test_auroc_is_the_share_of_pairs_in_order():
    drawn = np.random.default_rng(1)
    scores, positive = drawn.integers(0, 12, 80) / 12, drawn.random(80) < 0.3
    pairs = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    assert auroc(scores, positive) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert auroc(np.array([0.1, 0.2, 0.9]), np.array([False, False, True])) == 1
    assert auroc(np.array([0.9, 0.2, 0.1]), np.array([False, True, True])) == 0
    assert auroc(np.ones(4), np.array([True, False, True, False])) == 0.5
    with pytest.raises(DataError, match="0 positive and 3 negative"):
        auroc(np.ones(3), np.zeros(3, dtype=bool))


def test_an_auroc_interval_holds_what_direct_bootstraps_give():
    drawn = np.random.default_rng(0)
    scores = drawn.integers(0, 5, (12, 9)) / 4
    positive = scores + drawn.normal(size=scores.shape) > 0.6
    low, high = auroc_interval(scores, positive)
    direct = []
    for picked in np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), 500):
        windows = np.repeat(np.arange(12), picked)
        direct.append(auroc(scores[windows].ravel(), positive[windows].ravel()))
    assert (low, high) == pytest.approx(tuple(np.quantile(direct, (0.025, 0.975))))
    with pytest.raises(DataError, match="both kinds"):
        auroc_interval(scores, np.ones_like(positive))
    among = drawn.random(scores.shape) < 0.7
    kept = np.where(among, scores, 9.0)  # whatever the others score
    inside = auroc_interval(kept, positive, among)
    assert inside != (low, high) and inside == auroc_interval(scores, positive, among)
