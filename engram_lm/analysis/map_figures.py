"""Figures of numbers from 0 to 1 in cells: CKA of two models' blocks, suites with a part off."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engram_lm.analysis.figures import BLUE, INK, STYLE, blank, named
from engram_lm.analysis.suite_ablation import PartScore

NUMBERED = 144
"""Cells up to which each holds its number."""


def cka_map(cka_AB: Sequence[Sequence[float]], first: str, second: str, title: str) -> Figure:
    """Rows: blocks of the first; columns: of the second."""
    with matplotlib.rc_context(STYLE):
        figure, axes = blank(height=3.6)
        values = np.array(cka_AB)
        _cells(figure, axes, values, "CKA")
        axes.set_title(named(title), loc="left")
        axes.set_xlabel(f"block of {named(second)}")
        axes.set_ylabel(f"block of {named(first)}")
        for axis, blocks in ((axes.xaxis, values.shape[1]), (axes.yaxis, values.shape[0])):
            shown = range(0, blocks, 1 + blocks // 12)
            axis.set_ticks([block + 0.5 for block in shown], [str(block) for block in shown])
        return figure


def suite_map(by_checkpoint: Sequence[Sequence[PartScore]]) -> Figure | None:
    """Rows: parts that are off; columns: what is asked; means over checkpoints. None where no score
    is a share."""
    scores: dict[str, dict[str, list[float]]] = {}
    for row in (
        row for rows in by_checkpoint for row in rows if not row["metric"].startswith("bits")
    ):
        asked = f"{row['kind']}, {row['metric']}"
        if row["kind"] != row["suite"]:
            asked = f"{row['suite']} {asked}"
        scores.setdefault(asked, {}).setdefault(row["part"], []).append(row["value"])
    if not scores:
        return None
    parts = list(next(iter(scores.values())))
    values = np.array([[np.mean(each[part]) for each in scores.values()] for part in parts])
    with matplotlib.rc_context(STYLE):
        figure, axes = blank(height=2.6 + 0.26 * len(parts))
        _cells(figure, axes, values[::-1], "score")
        axes.set_yticks(np.arange(len(parts)) + 0.5, parts[::-1])
        axes.set_xticks(
            np.arange(len(scores)) + 0.5,
            [asked.replace("_", " ") for asked in scores],
            rotation=60,
            ha="right",
            fontsize=8,
        )
        axes.tick_params(length=0)
        return figure


def _cells(figure: Figure, axes: Axes, values: np.ndarray, label: str) -> None:
    """White 0 to blue 1, whatever the values: below 0 shows as 0, above 1 as 1."""
    scale = matplotlib.colors.LinearSegmentedColormap.from_list("shut", ["#ffffff", BLUE])
    # As paths, not as an image, which an SVG would have to load.
    shown = axes.pcolormesh(values, cmap=scale, vmin=0, vmax=1)
    if values.size <= NUMBERED:
        for (row, column), value in np.ndenumerate(values):
            axes.text(
                column + 0.5,
                row + 0.5,
                f"{value:.2f}".replace("0.", "."),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value > 0.6 else INK,
            )
    bar = figure.colorbar(shown, ax=axes, label=label, fraction=0.05)
    if bar.solids is not None:
        bar.solids.set_rasterized(False)
