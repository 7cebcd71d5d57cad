"""Figures with a layer on an axis: the logit lens, CKA maps, the alignment index."""

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from engram_lm.analysis.figures import BLUE, GRID, INK, STYLE, VERMILION, blank, named, seeds
from engram_lm.analysis.findings import AlignmentFindings, LensDifference, LensFindings
from engram_lm.analysis.student import bounds as interval

NAMES = {
    "final_to_layer": "KL(final ‖ layer), nats",
    "layer_to_final": "KL(layer ‖ final), nats",
    "loss": "loss of the reading, nats",
    "agreement": "share with the final top token",
}
_LOOKS = ((VERMILION, "s", "-"), (BLUE, "o", "--"))
_OFF = (VERMILION, "^", ":")


def lens_lines(lenses: dict[str, LensFindings], measure: str, *, normed: bool) -> Figure:
    """After each block, with 95 % bands; small open marks: before and after each memory."""
    with matplotlib.rc_context(STYLE):
        figure, axes = blank()
        looks = iter(_LOOKS)
        for name, lens in lenses.items():
            colour, marker, line = _OFF if name.endswith(", memory off") else next(looks)
            values = (lens.normed if normed else lens.plain)[measure]
            blocks = [place for place, at in enumerate(lens.at) if at == "block"]
            layers = [lens.layers[place] for place in blocks]
            means = [values[place]["mean"] for place in blocks]
            axes.plot(
                layers,
                means,
                line,
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=1.4,
                label=f"{named(name)} ({seeds(lens.checkpoints)})",
            )
            bounds = [(values[place]["low"], values[place]["high"]) for place in blocks]
            if all(low is not None for low, _ in bounds):
                lows, highs = np.array(bounds, dtype=np.float64).T
                axes.fill_between(layers, lows, highs, color=colour, alpha=0.2, linewidth=0)
            for shift, at in ((-0.55, "before memory"), (-0.35, "after memory")):
                marked = [place for place, where in enumerate(lens.at) if where == at]
                axes.plot(
                    [lens.layers[place] + shift for place in marked],
                    [values[place]["mean"] for place in marked],
                    linestyle="none",
                    marker="<" if at == "before memory" else ">",
                    markersize=5,
                    markerfacecolor="white",
                    markeredgecolor=colour,
                )
        axes.set_title("with the final norm" if normed else "without the final norm", loc="left")
        axes.set_ylabel(NAMES[measure])
        _layers(axes)
        axes.set_ylim(0, 1.02 if measure == "agreement" else None)
        axes.legend(frameon=False, loc="best", handlelength=2.2)
        return figure


def lens_differences(found: LensDifference, measure: str) -> Figure:
    """Block by block, with 95 % bands, on the same texts and seed by seed."""
    with matplotlib.rc_context(STYLE):
        figure, axes = blank()
        values = found.normed[measure]
        layers = range(len(values))
        axes.axhline(0, color=INK, linewidth=1)
        axes.plot(layers, [each["mean"] for each in values], "s-", color=VERMILION, markersize=4)
        if all(each["low"] is not None for each in values):
            bounds = np.array([(each["low"], each["high"]) for each in values], dtype=np.float64)
            axes.fill_between(layers, *bounds.T, color=VERMILION, alpha=0.2, linewidth=0)
        axes.set_title(f"{named(found.name)}, with the final norm", loc="left")
        axes.set_ylabel(NAMES[measure])
        _layers(axes)
        return figure


def alignment_lines(found: AlignmentFindings) -> Figure:
    """Mean and range over pairs of checkpoints, beside the null of two seeds."""
    with matplotlib.rc_context(STYLE):
        figure, axes = blank()
        layers = range(len(found.index[0]))
        axes.plot(layers, layers, color=GRID, linewidth=1.2)
        drawn = [(found.index, named(f"{found.second} in {found.first}"), _LOOKS[0])]
        if found.null_index:
            drawn.append((found.null_index, named(f"two seeds of {found.first}"), _LOOKS[1]))
        for pairs, label, (colour, marker, line) in drawn:
            values = np.array(pairs)
            places = range(values.shape[1])
            axes.plot(
                places, values.mean(0), line, color=colour, marker=marker, markersize=4, label=label
            )
            if len(values) > 1:
                axes.fill_between(
                    places, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0
                )
        if not found.null_index:
            axes.set_title("one seed: no null to read it against", loc="left")
        axes.set_ylabel("soft alignment index")
        _layers(axes)
        axes.legend(frameon=False, loc="upper left")
        return figure


def above_lines(found: AlignmentFindings) -> Figure:
    """How far the index lies above the null: mean and 95 % over checkpoints of the first."""
    with matplotlib.rc_context(STYLE):
        figure, axes = blank()
        values = np.array(found.above)
        layers = range(values.shape[1])
        axes.axhline(0, color=INK, linewidth=1)
        axes.plot(layers, values.mean(0), "s-", color=VERMILION, markersize=4)
        lows, highs = np.array([interval(each) for each in values.T.tolist()]).T
        axes.fill_between(layers, lows, highs, color=VERMILION, alpha=0.2, linewidth=0)
        axes.set_title(named(f"above two seeds of {found.first}, each in its own"), loc="left")
        axes.set_ylabel("index above the null")
        _layers(axes)
        return figure


def _layers(axes: Axes) -> None:
    axes.set_xlabel("after block (from zero)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=GRID, linewidth=0.7)
