"""Intervals of a mean over texts, when tokens of a text are alike but texts are not."""

import numpy as np
import numpy.typing as npt

from engram_lm.errors import DataError

DRAWS = 2_000
COVERAGE = 0.95


def interval(values_XN: npt.NDArray[np.floating], *, seed: int = 0) -> npt.NDArray[np.float64]:
    """Percentile bootstrap of the mean over the last axis, N texts drawn with replacement.

    (..., 2): the lower and upper bound of 95 %. DataError for fewer than 2 texts, of which nothing
    can be said.
    """
    texts = values_XN.shape[-1]
    if texts < 2:
        raise DataError(f"{texts} text: an interval needs 2 or more")
    drawn_RN = np.random.default_rng(seed).multinomial(texts, np.full(texts, 1 / texts), DRAWS)
    means_XR = values_XN.astype(np.float64) @ drawn_RN.T / texts
    tail = (1 - COVERAGE) / 2
    return np.stack(np.quantile(means_XR, (tail, 1 - tail), axis=-1), axis=-1)


def interval_over_seeds(
    values_SXN: npt.NDArray[np.floating], *, seed: int = 0
) -> npt.NDArray[np.float64]:
    """The same where S checkpoints read the same N texts: both are drawn with replacement, each
    draw's texts for all its checkpoints. (..., 2). With S = 1 it says nothing of seeds.

    Few checkpoints give too narrow an interval: of three, a ninth of all draws are one thrice.
    """
    seeds, texts = values_SXN.shape[0], values_SXN.shape[-1]
    if seeds == 1:
        return interval(values_SXN[0], seed=seed)
    drawn = np.random.default_rng(seed)
    texts_RN = drawn.multinomial(texts, np.full(texts, 1 / texts), DRAWS)
    seeds_RS = drawn.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS)
    means_SXR = values_SXN.astype(np.float64) @ texts_RN.T / texts
    means_XR = np.einsum("s...r,rs->...r", means_SXR, seeds_RS) / seeds
    tail = (1 - COVERAGE) / 2
    return np.stack(np.quantile(means_XR, (tail, 1 - tail), axis=-1), axis=-1)


def retained_interval(
    part_N: npt.NDArray[np.floating],
    full_N: npt.NDArray[np.floating],
    chance: float = 0.0,
    *,
    seed: int = 0,
) -> tuple[float, float]:
    """Of (part - chance) / (full - chance), means over the same N questions, drawn together.

    DataError where the full score is not above chance in every draw within the interval: then what
    is retained of it is not known.
    """
    if interval(full_N, seed=seed)[0] <= chance:
        raise DataError(f"full={full_N.mean():g}: not told from chance={chance:g}")
    both_2N = np.stack([part_N, full_N]).astype(np.float64)
    texts = both_2N.shape[1]
    drawn_RN = np.random.default_rng(seed).multinomial(texts, np.full(texts, 1 / texts), DRAWS)
    part_R, full_R = both_2N @ drawn_RN.T / texts - chance
    kept_R = (part_R / np.where(full_R > 0, full_R, np.nan)).astype(np.float64)
    tail = (1 - COVERAGE) / 2
    low, high = np.nanquantile(kept_R, (tail, 1 - tail))
    return float(low), float(high)
