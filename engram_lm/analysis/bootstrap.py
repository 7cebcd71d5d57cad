"""Intervals of a mean over texts, when tokens of a text are alike but texts are not."""

import numpy as np
import numpy.typing as npt

from engram_lm.analysis.student import quantile
from engram_lm.errors import DataError

DRAWS = 2_000
TAILS = (0.025, 0.975)
"""What intervals of 95 % leave out."""


def interval(values_XN: npt.NDArray[np.floating], *, seed: int = 0) -> npt.NDArray[np.float64]:
    """Percentile bootstrap of the mean over the last axis, N texts drawn with replacement.

    (..., 2): the lower and upper bound of 95 %. DataError for fewer than 2 texts, of which nothing
    can be said.
    """
    texts = values_XN.shape[-1]
    if texts < 2:
        raise DataError(f"{texts} text: an interval needs 2 or more")
    drawn_RN = drawn_of(texts, np.random.default_rng(seed))
    means_XR = values_XN.astype(np.float64) @ drawn_RN.T / texts
    return np.stack(np.quantile(means_XR, TAILS, axis=-1), axis=-1)


def interval_over_seeds(values_SXN: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Where S checkpoints read the same N texts: the mean's 95 % interval over other seeds and
    other texts, (..., 2). With S = 1 it is `interval`, and says nothing of seeds.

    Student's t of S - 1 degrees of freedom, for draws of three checkpoints are too often one of
    them thrice. The variances of the mean over checkpoints and over texts are added; what depends
    on both is in each of them, so that it is wide rather than narrow.
    """
    seeds, texts = values_SXN.shape[0], values_SXN.shape[-1]
    if seeds == 1:
        return interval(values_SXN[0])
    if texts < 2:
        raise DataError(f"{texts} text: an interval needs 2 or more")
    values_SXN = values_SXN.astype(np.float64)
    over_seeds_X = values_SXN.mean(-1).var(0, ddof=1) / seeds
    over_texts_X = values_SXN.mean(0).var(-1, ddof=1) / texts
    half_X = quantile(seeds) * np.sqrt(over_seeds_X + over_texts_X)
    mean_X = values_SXN.mean((0, -1))
    return np.stack([mean_X - half_X, mean_X + half_X], axis=-1)


def retained_interval(
    part_N: npt.NDArray[np.floating],
    full_N: npt.NDArray[np.floating],
    chance: float = 0.0,
) -> tuple[float, float]:
    """Of (part - chance) / (full - chance), means over the same N questions, drawn together.

    DataError where the full score is not above chance in every draw within the interval: then what
    is retained of it is not known.
    """
    if interval(full_N)[0] <= chance:
        raise DataError(f"full={full_N.mean():g}: not told from chance={chance:g}")
    both_2N = np.stack([part_N, full_N]).astype(np.float64)
    texts = both_2N.shape[1]
    drawn_RN = drawn_of(texts, np.random.default_rng(0))
    part_R, full_R = both_2N @ drawn_RN.T / texts - chance
    kept_R = part_R / np.where(full_R > 0, full_R, np.nan)
    low, high = np.nanquantile(kept_R, TAILS)
    return float(low), float(high)


def drawn_of(number: int, drawn: np.random.Generator, draws: int = DRAWS) -> npt.NDArray[np.int64]:
    """(draws, number): how often each of `number` is drawn with replacement, `number` times."""
    return drawn.multinomial(number, np.full(number, 1 / number), draws)
