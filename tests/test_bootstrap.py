"""Bootstrap intervals hold the mean as often as they say, and are as wide as theory has them."""

import numpy as np
import pytest

from engram_lm.analysis.bootstrap import interval, interval_over_seeds, retained_interval
from engram_lm.analysis.student import bounds, half_width, quantile, spread
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


def test_intervals_over_seeds_hold_the_mean_of_other_seeds_and_texts():
    drawn = np.random.default_rng(0)
    studies, seeds, texts = 2_000, 3, 20
    seed_S = drawn.normal(size=(seeds, studies, 1))
    values = (
        seed_S
        + 2 * drawn.normal(size=(studies, texts))
        + drawn.normal(size=(seeds, studies, texts))
    )
    low, high = interval_over_seeds(values).T
    assert ((low < 0) & (high > 0)).mean() > 0.94
    assert (interval_over_seeds(values[:1, :9]) == interval(values[0, :9])).all()
    only_seeds = np.repeat(seed_S[:, :9], texts, axis=-1)
    wanted = [bounds(each) for each in seed_S[:, :9, 0].T.tolist()]
    assert interval_over_seeds(only_seeds) == pytest.approx(np.array(wanted))
    with pytest.raises(DataError, match="1 text: an interval needs 2 or more"):
        interval_over_seeds(np.ones((3, 4, 1)))


def test_what_is_retained_has_an_interval_and_needs_a_score_above_chance():
    drawn = np.random.default_rng(0)
    full, part = (drawn.random(400) < 0.8).astype(float), (drawn.random(400) < 0.4).astype(float)
    low, high = retained_interval(part, full, 0.2)
    assert low < (part.mean() - 0.2) / (full.mean() - 0.2) < high and high - low < 0.25
    assert retained_interval(full, full, 0.2) == pytest.approx((1, 1))
    with pytest.raises(DataError, match="not told from chance"):
        retained_interval(part, (drawn.random(400) < 0.21).astype(float), 0.2)


def test_a_mean_of_few_values_has_students_interval():
    # Tables of Student's t, 2.5 % above, for 1, 2, 4, 9 and 60 degrees of freedom.
    table = {2: 12.706, 3: 4.303, 5: 2.776, 10: 2.262, 61: 2.000}
    assert {values: round(quantile(values), 3) for values in table} == table
    assert quantile(100_000) == pytest.approx(1.96, abs=1e-3)
    found = spread([0.5, 1.0, 1.5])
    assert found == pytest.approx({"mean": 1.0, "sd": 0.5, "t95": 4.3027 * 0.5 / 3**0.5}, rel=1e-4)
    assert found["t95"] == half_width(0.5 / 3**0.5, 3)
    assert spread([2.0]) == {"mean": 2.0}  # one value says nothing of another
    with pytest.raises(DataError, match="1 value: an interval needs 2 or more"):
        half_width(0.1, 1)


def test_students_interval_of_three_holds_the_mean_where_a_bootstrap_of_three_does_not():
    drawn = np.random.default_rng(2).normal(size=(2_000, 3))
    halves = np.array([spread(values)["t95"] for values in drawn.tolist()])
    assert (abs(drawn.mean(1)) < halves).mean() == pytest.approx(0.95, abs=0.015)
    low, high = interval(drawn[:400]).T
    assert ((low < 0) & (high > 0)).mean() < 0.8
