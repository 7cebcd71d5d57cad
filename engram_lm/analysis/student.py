"""Intervals of the mean of a few independent values, such as seeds: Student's t.

Of three values the 95 % interval is 2.5 standard deviations to each side, where a standard error is
0.58 of one: whoever prints a number behind a sign of plus or minus says which of these it is.
"""

import math
import statistics
from collections.abc import Sequence
from functools import cache

from mpmath import betainc, findroot

from engram_lm.errors import DataError

CONFIDENCE = 0.95
PLUS_MINUS = "± half the 95 % interval of the mean over seeds (Student's t)"
"""What stands behind that sign, for a reader."""


@cache
def quantile(values: int) -> float:
    """Half the width of the 95 % interval of a mean of so many values, in standard errors: 4.303
    for 3. DataError for fewer than 2, of whose spread nothing is known."""
    if values < 2:
        raise DataError(f"{values} value: an interval needs 2 or more")
    degrees = values - 1

    def outside(t: float) -> float:
        share = degrees / (degrees + t * t)
        return float(betainc(degrees / 2, 0.5, 0, share, regularized=True)) - (1 - CONFIDENCE)

    return float(findroot(outside, (1.9, 13), solver="anderson"))


def half_width(standard_error: float, values: int) -> float:
    """Half the width of the 95 % interval of a mean of so many values, of which this is the
    standard error. DataError for fewer than 2."""
    return quantile(values) * standard_error


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean. DataError for fewer than 2 values."""
    half = quantile(len(values)) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.mean(values)
    return mean - half, mean + half


def spread(values: Sequence[float]) -> dict[str, float]:
    """mean; of several values also sd, their standard deviation, and t95, half the width of the
    mean's 95 % interval."""
    found = {"mean": statistics.mean(values)}
    if len(values) < 2:
        return found
    sd = statistics.stdev(values)
    return {**found, "sd": sd, "t95": half_width(sd / math.sqrt(len(values)), len(values))}
