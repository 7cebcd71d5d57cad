"""Intervals of a mean over texts, when tokens of a text are alike but texts are not."""

import numpy as np
import numpy.typing as npt

from engram_lm.errors import DataError

DRAWS = 2_000
COVERAGE = 0.95


def interval(
    values_XN: npt.NDArray[np.floating],
    *,
    seed: int = 0,
    weights_N: npt.NDArray[np.floating] | None = None,
) -> npt.NDArray[np.float64]:
    """Percentile bootstrap of the mean over the last axis, N texts drawn with replacement.

    (..., 2): the lower and upper bound of 95 %. weights_N: tokens of each text, where they differ.
    DataError for fewer than 2 texts, of which nothing can be said.
    """
    texts = values_XN.shape[-1]
    if texts < 2:
        raise DataError(f"{texts} text: an interval needs 2 or more")
    weights_N = np.ones(texts) if weights_N is None else np.asarray(weights_N, dtype=np.float64)
    drawn_RN = np.random.default_rng(seed).multinomial(texts, np.full(texts, 1 / texts), DRAWS)
    weighted_RN = drawn_RN * weights_N
    means_XR = (values_XN.astype(np.float64) @ weighted_RN.T) / weighted_RN.sum(axis=1)
    tail = (1 - COVERAGE) / 2
    return np.stack(np.quantile(means_XR, (tail, 1 - tail), axis=-1), axis=-1)
