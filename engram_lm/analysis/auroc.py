"""How well a score tells two kinds of tokens apart."""

import numpy as np
import numpy.typing as npt

from engram_lm.analysis.bootstrap import TAILS, drawn_of
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
    scores_NT: npt.NDArray[np.floating],
    positive_NT: npt.NDArray[np.bool_],
    among_NT: npt.NDArray[np.bool_] | None = None,
) -> tuple[float, float]:
    """95 % of bootstraps over the N windows, whose tokens are alike. among_NT: tokens that count;
    None: all. Draws in which one kind has no token are left out; DataError where there are only
    such."""
    windows, tokens = scores_NT.shape
    _, place = np.unique(scores_NT.ravel(), return_inverse=True)
    groups = int(place.max()) + 1
    positive = positive_NT.ravel()
    counted = np.ones(scores_NT.size) if among_NT is None else among_NT.ravel().astype(np.float64)
    drawn_RN = drawn_of(windows, np.random.default_rng(0), DRAWS)
    found = []
    for drawn_N in drawn_RN:
        weights = np.repeat(drawn_N, tokens) * counted
        above = np.bincount(place, weights * positive, groups)
        below = np.bincount(place, weights * ~positive, groups)
        pairs = above.sum() * below.sum()
        if pairs:
            found.append(float(above @ (below.cumsum() - below / 2)) / pairs)
    if not found:
        raise DataError("no draw of windows holds tokens of both kinds")
    low, high = np.quantile(found, TAILS)
    return float(low), float(high)
