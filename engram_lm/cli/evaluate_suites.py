"""Our own suites, as `engram eval` asks for them and shows them.

Shapes: C checkpoints, N questions.
"""

import statistics
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_lm.cli.settings import changed_fields, progress_bars
from engram_lm.errors import ConfigError, MismatchError

if TYPE_CHECKING:
    from engram_lm.evaluate.suite_scores import SuiteScore

NAMES = (
    "two_source",
    "people",
    "variables",
    "needles",
    "mqar",
    "induction",
    "wordnet_facts",
    "minimal_pairs",
    "frequency_bands",
)
QUESTIONS = 200
"""Of each kind, where nothing else is set."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Which suites, how they are set, and how much is asked."""

    names: tuple[str, ...]
    changes: dict[str, dict[str, Any]]
    """Suite -> field -> value, where it is not the default."""
    files: str | list[str] | None
    """Of minimal pairs."""
    questions: int
    seed: int
    batch: int

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"suites.seed={self.seed}: 0 or more")


def named(names: str | None, changes: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """Of "a,b". ConfigError for others than NAMES, and for changes to one that is not named."""
    found = tuple(dict.fromkeys(name for name in (names or "").split(",") if name))
    for name in found:
        if name not in NAMES:
            raise ConfigError(f"suite {name!r}: unknown; accepted are {', '.join(NAMES)}")
    if names is not None and not found:
        raise ConfigError(f"suites={names!r}: none is named")
    for name, fields in changes.items():
        if fields and name not in found:
            raise ConfigError(f"--set {name}.{next(iter(fields))}: --suites does not name {name}")
    return found


def suites(asking: Asking, model: Any = None, tokenizer: Any = None) -> dict[str, Any]:
    """Name -> suite. Random ids are as many as the model has, unless --set says otherwise."""
    from engram_lm.evaluate.suite_scores import SUITES, ordinary_ids
    from engram_lm.studies.frequency_bands import FrequencyBands

    if (asking.files is not None) != ("minimal_pairs" in asking.names):
        raise ConfigError("minimal_pairs needs its files, and they it: --set minimal_pairs.files=")
    found: dict[str, Any] = {}
    for name in asking.names:
        if name == "minimal_pairs":
            found[name] = _pairs(asking.files)
            continue
        kind: Any = FrequencyBands if name == "frequency_bands" else SUITES[name]
        changes = dict(asking.changes[name])
        if name in ("mqar", "induction") and model is not None:
            changes.setdefault("vocabulary", len(ordinary_ids(model, tokenizer)))
        try:
            found[name] = changed_fields(name, kind(), changes)
        except ConfigError as error:
            prefix = "" if str(error).startswith(f"{name}.") else f"{name}."
            raise ConfigError(f"{prefix}{error}") from error
    return found


def _pairs(files: Any) -> Any:
    from engram_lm.evaluate.suites.minimal_pairs import MinimalPairs, read_pairs

    paths = [files] if isinstance(files, str) else files
    if not paths or not all(isinstance(path, str) for path in paths):
        raise ConfigError(f"minimal_pairs.files={files!r}: one path or more is needed")
    return MinimalPairs(pairs=tuple(pair for path in paths for pair in read_pairs(Path(path))))


def described(suite: Any) -> dict[str, Any]:
    """What it says of itself and how it is set."""
    from engram_lm.evaluate.suite_scores import statement
    from engram_lm.evaluate.suites.minimal_pairs import MinimalPairs

    pairs = isinstance(suite, MinimalPairs)
    return {
        "statement": statement(suite),
        "settings": {"pairs": len(suite.pairs)} if pairs else asdict(suite),
    }


def scored(
    model: Any,
    tokenizer: Any,
    suites: dict[str, Any],
    columns: tuple[str, ...],
    asking: Asking,
) -> "dict[str, list[SuiteScore]]":
    """Column -> scores of one model."""
    from engram_lm.analysis.material import trained_apart
    from engram_lm.evaluate.suite_scores import suite_scores
    from engram_lm.studies.frequency_bands import FrequencyBands

    found: dict[str, list[SuiteScore]] = {column: [] for column in columns}
    with progress_bars() as bars:

        def bar(name: str) -> Any:
            task = bars.add_task(name, total=None, note="")
            return lambda done, of: bars.update(task, completed=done, total=of)

        for name, suite in suites.items():
            judged = None
            if isinstance(suite, FrequencyBands):
                told = bar(f"{name}, counting n-grams")
                judged = suite.read(tokenizer, apart=trained_apart(model), progress=told)
            for column in columns:
                told = bar(f"{name}, memory {column}")
                with nullcontext() if column == "on" else model.base_model.without_memory():
                    if judged is not None:
                        scores = suite.scores(model, judged, batch=asking.batch, progress=told)
                    else:
                        scores = suite_scores(
                            model,
                            tokenizer,
                            suite,
                            questions=asking.questions,
                            seed=asking.seed,
                            batch=asking.batch,
                            progress=told,
                        )
                found[column] += scores
    return found


def rows(columns: "dict[str, list[list[SuiteScore]]]") -> list[dict[str, Any]]:
    """A record a metric of a kind; the same ones in every column, of which each has a list a model.

    Values are means over the models, sd: over them; low and high: 95 % of bootstraps over
    questions, of the mean over the models.
    """
    import numpy as np

    first = next(iter(columns.values()))[0]
    found = []
    for place, score in enumerate(first):
        row: dict[str, Any] = {
            "suite": score.suite,
            "kind": score.kind,
            "metric": score.metric,
            "chance": score.chance,
            "questions": len(score.values_N),
        }
        asked = {}
        for column, models in columns.items():
            if any(_shape(scores) != _shape(first) for scores in models):
                raise MismatchError("the models' tokenizers make different questions of a suite")
            values_CN = np.stack([scores[place].values_N for scores in models])
            asked[column] = values_CN
            row |= _summary("" if column == next(iter(columns)) else f"{column}_", values_CN)
        if len(asked) == 2:
            row |= _retained(score, asked["on"], asked["off"])
        found.append(row)
    return found


def _shape(scores: "list[SuiteScore]") -> list[tuple[str, str, str, int]]:
    return [(each.suite, each.kind, each.metric, len(each.values_N)) for each in scores]


def _summary(prefix: str, values_CN: Any) -> dict[str, Any]:
    from engram_lm.analysis.bootstrap import interval

    checkpoints = values_CN.mean(axis=1).tolist()
    low, high = interval(values_CN.mean(axis=0)).tolist() if values_CN.shape[1] > 1 else (None,) * 2
    return {
        f"{prefix}value": statistics.fmean(checkpoints),
        f"{prefix}low": low,
        f"{prefix}high": high,
        f"{prefix}sd": statistics.stdev(checkpoints) if len(checkpoints) > 1 else None,
        f"{prefix}checkpoints": checkpoints,
    }


def _retained(score: "SuiteScore", on_CN: Any, off_CN: Any) -> dict[str, Any]:
    """What is left without memory, raw and above chance: means over models; None where 95 % of
    bootstraps do not tell some model's score from a guess (from 0 where no chance is known), and of
    bits per byte, where less is better."""
    from engram_lm.analysis.ablation_losses import retention
    from engram_lm.analysis.bootstrap import interval

    chance, single = score.chance, on_CN.shape[1] < 2
    lower_is_better = score.metric == "bits_per_byte"
    if lower_is_better or single or (interval(on_CN)[:, 0] <= (chance or 0.0)).any():
        return {"retained": None, "above_chance": None}
    both = list(zip(off_CN.mean(axis=1).tolist(), on_CN.mean(axis=1).tolist(), strict=True))
    return {
        "retained": statistics.fmean(retention(*pair) for pair in both),
        "above_chance": None
        if chance is None
        else statistics.fmean(retention(*pair, chance) for pair in both),
    }


def show(record: dict[str, Any], columns: tuple[str, ...]) -> None:
    """A table: a line a metric of a kind."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Column, Table

    seeds = len(record["models"])
    spread = (
        "one seed" if seeds == 1 else f"means of {seeds} seeds, sd: standard deviation over them"
    )
    grid = Table(
        Column("suite", no_wrap=True),
        title=", ".join(record["models"]),
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption=f"{spread}; below a value 95 % of bootstraps over questions",
    )
    titles = [f"memory {column}" for column in columns] if record["memory"] else ["value"]
    kept = ["retained", "above\nchance"] if len(columns) > 1 else []
    for title in ["chance", "of", *titles, *kept]:
        grid.add_column(title, justify="right", no_wrap=title in titles)
    for suite, of_suite in groupby(record["suite_scores"], lambda row: row["suite"]):
        grid.add_row(suite)
        for row in of_suite:
            cells = [_value(row, prefix) for prefix in ("", "off_")[: len(columns)]]
            if kept:
                cells += [_share(row["retained"]), _share(row["above_chance"])]
            chance = "" if row["chance"] is None else f"{row['chance']:.2g}"
            kind = f"  {row['kind']}\n    {row['metric']}"
            grid.add_row(kind, chance, f"{row['questions']:,}", *cells)
    Console().print(grid)


def _value(row: dict[str, Any], prefix: str) -> str:
    value, low, high, sd = (row[f"{prefix}{part}"] for part in ("value", "low", "high", "sd"))
    lines = [f"{value:.3f}"]
    if low is not None:
        lines.append(f"{low:.3f}–{high:.3f}")
    if sd is not None:
        lines.append(f"sd {sd:.3f}")
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
