"""Cells of tables: a mean over checkpoints, with what bounds it."""

import statistics
from collections.abc import Sequence

from engram_lm.analysis.findings import Estimate

UNKNOWN = "–"
Bounds = tuple[float | None, float | None]


def mean(values: Sequence[float | None], form: str = ".3f") -> str:
    """UNKNOWN where there is none, or one of them is None."""
    known = [value for value in values if value is not None]
    return format(statistics.mean(known), form) if known and len(known) == len(values) else UNKNOWN


def bounded(
    values: Sequence[float | None], form: str = ".3f", within: Bounds = (None, None)
) -> str:
    """MEAN (LOW to HIGH): of several values the lowest and the highest, of one those of `within`,
    where they are known."""
    told = mean(values, form)
    low, high = within
    if len(values) > 1:
        known = [value for value in values if value is not None]
        low, high = min(known, default=None), max(known, default=None)
    if told == UNKNOWN or low is None or high is None:
        return told
    return f"{told} ({low:{form}} to {high:{form}})"


def estimated(estimates: Sequence[Estimate | None]) -> str:
    """`bounded` of what has an interval of its own."""
    first = estimates[0]
    within: Bounds = (None, None) if first is None else (first["low"], first["high"])
    return bounded([None if each is None else each["mean"] for each in estimates], within=within)
