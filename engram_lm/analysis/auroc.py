"""How well a score tells two kinds of tokens apart."""

import numpy as np
import numpy.typing as npt

from engram_lm.errors import DataError


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
