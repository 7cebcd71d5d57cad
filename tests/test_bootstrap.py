"""Bootstrap intervals hold the mean as often as they say, and are as wide as theory has them."""

import numpy as np
import pytest

from engram_lm.analysis.bootstrap import interval
from engram_lm.errors import DataError


def test_intervals_are_those_of_the_normal_law_where_it_holds():
    values = np.random.default_rng(0).normal(3, 2, (2, 400))
    found = interval(values)
    for row, (low, high) in zip(values, found, strict=True):
        error = row.std(ddof=1) / 400**0.5
        # 2,000 draws place a 2.5 % quantile to about 4 % of the interval's width.
        assert low == pytest.approx(row.mean() - 1.96 * error, abs=0.25 * error)
        assert high == pytest.approx(row.mean() + 1.96 * error, abs=0.25 * error)


def test_they_hold_the_true_mean_nineteen_times_in_twenty():
    drawn = np.random.default_rng(1).exponential(1.0, (400, 60))
    found = interval(drawn)
    held = ((found[:, 0] < 1) & (found[:, 1] > 1)).mean()
    assert 0.90 < held < 0.98  # a skewed law of 60 texts holds it a little less often than 95 %


def test_the_same_seed_gives_the_same_interval_and_one_text_gives_none():
    values = np.arange(9.0)
    assert np.array_equal(interval(values), interval(values))
    assert not np.array_equal(interval(values), interval(values, seed=1))
    with pytest.raises(DataError, match="1 text: an interval needs 2 or more"):
        interval(np.ones((3, 1)))
