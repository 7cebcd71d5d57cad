"""What each part of a memory is worth in the suites of engram_lm/evaluate/suites.

The paper's section 6.3 has retained performance with memory off; here for every part, raw and above
chance, on the same questions as the model as it is.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any, TypedDict

from engram_lm.analysis import ablation
from engram_lm.analysis.ablation_losses import Ablation, ablations, retention
from engram_lm.analysis.bootstrap import interval, retained_interval
from engram_lm.errors import DataError
from engram_lm.evaluate.suite_scores import Suite, SuiteScore, name_of, suite_scores

WHOLE = "as it is"


class PartScore(TypedDict):
    """One metric of one kind of question, with one part taken away."""

    part: str
    suite: str
    kind: str
    metric: str
    chance: float | None
    questions: int
    value: float
    low: float | None
    """95 % of bootstraps over questions; None for one."""
    high: float | None
    retained: float | None
    """Of the model as it is; None where 95 % of bootstraps do not tell that from a guess, or from 0
    where no chance is known."""
    above_chance: float | None
    """The same above chance; None where that is not known."""
    above_chance_low: float | None
    """95 % of bootstraps over questions, both scores drawn together."""
    above_chance_high: float | None


def suite_ablation(
    model: Any,
    tokenizer: Any,
    suites: Sequence[Suite],
    *,
    questions: int,
    heads: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[PartScore]:
    """Suite by suite: the model as it is, then each part off, its layers and orders one by one, and
    with `heads` its heads.

    Gates and updates are held at their means over the suite's own questions. progress: told what
    begins. ConfigError for a model without memory or a suite that it cannot be asked.
    """
    found: list[PartScore] = []
    for suite in suites:

        def scores(name: str, made: Ablation, suite: Suite = suite) -> list[SuiteScore]:
            if progress is not None:
                progress(f"{name_of(suite)}, {name}")
            with made():
                return suite_scores(model, tokenizer, suite, questions=questions)

        with ablation.mean_gates(model) as gates, ablation.mean_updates(model) as updates:
            plain = scores(WHOLE, nullcontext)
        whole = {(score.kind, score.metric): score for score in plain}
        found += [_row(WHOLE, score, whole) for score in plain]
        for name, made in ablations(model, gates, updates, heads=heads).items():
            found += [_row(name, score, whole) for score in scores(name, made)]
    return found


def _row(part: str, score: SuiteScore, whole: dict[tuple[str, str], SuiteScore]) -> PartScore:
    full, chance = whole[score.kind, score.metric], score.chance
    several = len(score.values_N) > 1
    low, high = interval(score.values_N).tolist() if several else (None, None)
    kept: tuple[float, float] | None = None
    if several:
        with suppress(DataError):  # no better than a guess: there is nothing to retain
            kept = retained_interval(score.values_N, full.values_N, chance or 0.0)
    told = chance is not None and kept is not None
    return PartScore(
        part=part,
        suite=score.suite,
        kind=score.kind,
        metric=score.metric,
        chance=chance,
        questions=len(score.values_N),
        value=score.mean,
        low=low,
        high=high,
        retained=retention(score.mean, full.mean) if kept else None,
        above_chance=retention(score.mean, full.mean, chance or 0.0) if told else None,
        above_chance_low=kept[0] if kept and told else None,
        above_chance_high=kept[1] if kept and told else None,
    )
