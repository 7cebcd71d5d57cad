"""recipes/kneser_ney.py against the formulas of Chen and Goodman, one count at a time."""

import sys
from collections import Counter
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engram_lm.errors import ConfigError, DataError

RECIPES = Path(__file__).parents[1] / "recipes"
VOCABULARY = 7


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(RECIPES))
    try:
        import count_model
        import kneser_ney

        yield SimpleNamespace(study=count_model, model=kneser_ney)
    finally:
        sys.path.remove(str(RECIPES))


def text(rows: int, ids: int, *, alike: float = 0.3) -> np.ndarray:
    """Ids of a skewed law that often repeat what follows another."""
    drawn = np.random.default_rng(0)
    law = np.arange(1, VOCABULARY) ** -1.2
    found = drawn.choice(VOCABULARY - 1, (rows, ids), p=law / law.sum())  # the last id: never
    for at in range(1, ids):
        same = drawn.random(rows) < alike
        found[same, at] = (2 * found[same, at - 1] + 1) % (VOCABULARY - 1)
    return found


class Reference:
    """The definition: dictionaries, and a loop over the whole text for every number."""

    def __init__(self, rows: np.ndarray, order: int, few: tuple[float, ...]) -> None:
        self.counts: dict[int, Counter] = {order: Counter()}
        for row in rows.tolist():
            for end in range(max(order - 1, 1), len(row)):
                self.counts[order][tuple(row[end - order + 1 : end + 1])] += 1
        for lower in range(order - 1, 0, -1):
            left = {(ngram[0], ngram[1:]) for ngram in self.counts[lower + 1]}
            self.counts[lower] = Counter(ngram for _, ngram in left)
        self.order, self.few = order, few

    def discount(self, order: int, count: int) -> float:
        n = [sum(c == i for c in self.counts[order].values()) for i in (1, 2, 3, 4)]
        if not all(n):
            return self.few[min(count, 3) - 1]
        y = n[0] / (n[0] + 2 * n[1])
        taken = [1 - 2 * y * n[1] / n[0], 2 - 3 * y * n[2] / n[1], 3 - 4 * y * n[3] / n[2]]
        if not all(0 <= each <= i for i, each in enumerate(taken, start=1)):
            taken = list(self.few)
        return taken[min(count, 3) - 1]

    def probability(self, context: tuple[int, ...], word: int) -> float:
        order = len(context) + 1
        lower = self.probability(context[1:], word) if context else 1 / VOCABULARY
        with_context = {
            ngram: count for ngram, count in self.counts[order].items() if ngram[:-1] == context
        }
        if not with_context:
            return lower
        total = sum(with_context.values())
        count = with_context.get((*context, word), 0)
        own = count - self.discount(order, count) if count else 0.0
        left = sum(self.discount(order, each) for each in with_context.values())
        return own / total + left / total * lower


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(40, 30), (2, 9)], ids=["estimated", "few"])
def test_probabilities_are_those_of_the_definition(recipe, order, shape):
    rows = text(*shape)
    fitted = recipe.model.fit(rows, order, vocabulary=VOCABULARY)
    slow = Reference(rows, order, recipe.model.FEW)
    other = np.random.default_rng(1).integers(VOCABULARY, size=(3, 11))
    logs = fitted.log_probabilities(other)
    assert logs.dtype == np.float64 and logs.shape == (3, 10)
    for row, found in zip(other.tolist(), logs, strict=True):
        for end in range(1, len(row)):
            context = tuple(row[max(0, end - order + 1) : end])
            assert np.exp(found[end - 1]) == pytest.approx(
                slow.probability(context, row[end]), rel=1e-12
            )


@pytest.mark.parametrize("order", [1, 3, 4])
def test_probabilities_of_the_whole_vocabulary_sum_to_one(recipe, order):
    rows = text(40, 30)
    fitted = recipe.model.fit(rows, order, vocabulary=VOCABULARY)
    seen, unseen = rows[:5, :3].tolist(), [[VOCABULARY - 1] * 3, [0, VOCABULARY - 1, 0], [6, 0, 1]]
    for context in [*seen, *unseen, [0]]:
        asked = np.array([[*context, word] for word in range(VOCABULARY)])
        p = np.exp(fitted.log_probabilities(asked)[:, -1])
        assert p.sum() == pytest.approx(1, abs=1e-14) and (p > 0).all()


def test_discounts_are_estimated_where_the_text_is_large_enough(recipe):
    rows = text(40, 30)
    taken = [
        recipe.model.discounts(np.unique(keys, return_counts=True)[1])[1:]
        for keys in (recipe.model.ngrams(rows, order, VOCABULARY) for order in (3, 4))
    ]
    assert any(tuple(each) != recipe.model.FEW for each in taken)
    assert tuple(recipe.model.discounts(np.array([1, 1]))) == (0, *recipe.model.FEW)


def test_rows_see_nothing_of_one_another(recipe):
    rows = text(6, 10)
    fitted = recipe.model.fit(rows, 4, vocabulary=VOCABULARY)
    shuffled = recipe.model.fit(rows[::-1], 4, vocabulary=VOCABULARY)
    assert np.array_equal(fitted.log_probabilities(rows), shuffled.log_probabilities(rows))
    together = recipe.model.fit(rows.reshape(1, -1), 4, vocabulary=VOCABULARY)
    assert len(together.orders[-1].keys_K) > len(fitted.orders[-1].keys_K)


def test_windows_are_those_of_token_losses(recipe):
    ids = np.arange(12)
    whole, rest = recipe.study.windows(ids, 4)
    assert whole.tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]] and rest.tolist() == [
        [8, 9, 10, 11]
    ]
    assert len(recipe.study.windows(ids[:9], 4)) == 1
    each = recipe.study.judged(
        recipe.model.KneserNey(VOCABULARY, []), [whole, rest], np.arange(12) + 1
    )
    nats = np.log(VOCABULARY)
    assert each["tokens"] == 11 and each["nats"] == pytest.approx(nats)
    assert each["bpb"] == pytest.approx(11 * nats / np.log(2) / sum(range(2, 13)))


@pytest.mark.parametrize(
    ("shape", "order", "error"),
    [
        ((2, 9), 0, ConfigError),
        ((2, 9), 23, ConfigError),
        ((2, 3), 4, DataError),
        ((0, 9), 2, DataError),
    ],
)
def test_what_cannot_be_counted_is_refused(recipe, shape, order, error):
    with pytest.raises(error, match="order=|rows of shape"):
        recipe.model.fit(np.zeros(shape, np.int64), order, vocabulary=VOCABULARY)
    with pytest.raises(DataError, match="must lie below"):
        recipe.model.fit(np.full((1, 9), VOCABULARY), 2, vocabulary=VOCABULARY)


def test_short_rows_are_read_by_a_model_of_a_higher_order(recipe):
    rows = text(40, 30)
    fitted = recipe.model.fit(rows, 4, vocabulary=VOCABULARY)
    for first, second in product(range(2), repeat=2):
        short = fitted.log_probabilities(np.array([[first, second]]))[0, 0]
        assert short == fitted.log_probabilities(np.array([[first, second, 0, 0, 0]]))[0, 0]
