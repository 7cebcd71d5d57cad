"""Cells of tables: a mean over checkpoints, and its interval."""

import statistics
from collections.abc import Sequence

from engram_lm.analysis.findings import Estimate
from engram_lm.analysis.student import bounds

UNKNOWN = "–"
Bounds = tuple[float | None, float | None]


def mean(values: Sequence[float | None], form: str = ".3f") -> str:
    """UNKNOWN where there is none, or one of them is None."""
    known = [value for value in values if value is not None]
    return format(statistics.mean(known), form) if known and len(known) == len(values) else UNKNOWN


def bounded(
    values: Sequence[float | None], form: str = ".3f", within: Bounds = (None, None)
) -> str:
    """MEAN (LOW to HIGH): the mean's 95 % interval over several independent values, such as seeds
    (Student's t); of one value `within`, where that is known."""
    told = mean(values, form)
    low, high = within
    if len(values) > 1 and told != UNKNOWN:
        low, high = bounds([value for value in values if value is not None])
    if told == UNKNOWN or low is None or high is None:
        return told
    return f"{told} ({low:{form}} to {high:{form}})"


def ranged(values: Sequence[float], form: str) -> str:
    """MEAN (LOWEST to HIGHEST) of values that depend on one another, so that their spread bounds
    nothing; UNKNOWN where there is none."""
    if not values:
        return UNKNOWN
    return f"{mean(values, form)} ({min(values):{form}} to {max(values):{form}})"


def estimated(estimates: Sequence[Estimate | None]) -> str:
    """`bounded` of what has an interval of its own."""
    first = estimates[0]
    within: Bounds = (None, None) if first is None else (first["low"], first["high"])
    return bounded([None if each is None else each["mean"] for each in estimates], within=within)
