"""How well a score tells two kinds of tokens apart."""

import numpy as np
import numpy.typing as npt

from engram_lm.analysis.bootstrap import COVERAGE
from engram_lm.errors import DataError

DRAWS = 500


def auroc(scores_T: npt.NDArray[np.floating], positive_T: npt.NDArray[np.bool_]) -> float:
    """Probability that a positive token scores higher than a negative one; equal scores count half.

    The area under the ROC curve, by ranks (Mann and Whitney 1947). DataError where one kind has no
    token.
    """
    positives = int(positive_T.sum())
    negatives = len(positive_T) - positives
    if not positives or not negatives:
        raise DataError(f"{positives} positive and {negatives} negative tokens: both are needed")
    _, place_T, counts = np.unique(scores_T, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # equal scores share their mean rank
    total = float(ranks[place_T][positive_T].sum())
    return (total - positives * (positives + 1) / 2) / (positives * negatives)


def auroc_interval(
    scores_NT: npt.NDArray[np.floating], positive_NT: npt.NDArray[np.bool_], *, seed: int = 0
) -> tuple[float, float]:
    """95 % of bootstraps over the N windows, whose tokens are alike. Draws in which one kind has no
    token are left out; DataError where there are only such."""
    windows, tokens = scores_NT.shape
    _, place = np.unique(scores_NT.ravel(), return_inverse=True)
    groups = int(place.max()) + 1
    positive = positive_NT.ravel()
    even = np.full(windows, 1 / windows)
    drawn_RN = np.random.default_rng(seed).multinomial(windows, even, DRAWS)
    found = []
    for drawn_N in drawn_RN:
        weights = np.repeat(drawn_N, tokens).astype(np.float64)
        above = np.bincount(place, weights * positive, groups)
        below = np.bincount(place, weights * ~positive, groups)
        pairs = above.sum() * below.sum()
        if pairs:
            found.append(float(above @ (below.cumsum() - below / 2)) / pairs)
    if not found:
        raise DataError("no draw of windows holds tokens of both kinds")
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(found, (tail, 1 - tail))
    return float(low), float(high)
