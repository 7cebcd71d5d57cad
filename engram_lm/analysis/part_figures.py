"""Figures of a memory's parts: what each is worth, and how rows are shared."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from engram_lm.analysis.ablation_losses import AblationLoss
from engram_lm.analysis.figures import BLUE, GRID, INK, STYLE, VERMILION, blank, minus
from engram_lm.analysis.findings import GateScore
from engram_lm.analysis.row_sharing import OrderSharing
from engram_lm.analysis.student import bounds


def ablation_dots(by_checkpoint: Sequence[Sequence[AblationLoss]]) -> Figure:
    """Change in loss of each part; whiskers, 95 %: over windows with one checkpoint, over
    checkpoints with several."""
    with matplotlib.rc_context(STYLE):
        names = [part.name for part in by_checkpoint[0]]
        figure, axes = blank(height=0.9 + 0.26 * len(names))
        changes = np.array([[part.change for part in parts] for parts in by_checkpoint])
        if len(by_checkpoint) == 1:
            lows = np.array([part.low for part in by_checkpoint[0]])
            highs = np.array([part.high for part in by_checkpoint[0]])
        else:
            lows, highs = np.array([bounds(each) for each in changes.T.tolist()]).T
        means = changes.mean(0)
        axes.axvline(0, color=INK, linewidth=1)
        for row, (mean, low, high) in enumerate(zip(means, lows, highs, strict=True)):
            axes.plot([low, high], [row, row], color=VERMILION, linewidth=1.4)
            axes.plot(mean, row, "s", color=VERMILION, markersize=4)
            axes.annotate(
                minus(f"{mean:+.3f}"),
                (high, row),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.grid(axis="x", color=GRID, linewidth=0.7)
        axes.set_xlabel("change in loss without it, nats per token")
        return figure


def sharing_dots(orders: Sequence[OrderSharing]) -> Figure:
    """Of each head: share of distinct n-grams that share their row, expected and counted."""
    with matplotlib.rc_context(STYLE):
        figure, axes = blank()
        axes.plot([0, 1], [0, 1], color=GRID, linewidth=1.2)
        looks = ("o", "s", "^", "D")
        for place, order in enumerate(sorted({each.order for each in orders})):
            heads = [head for each in orders if each.order == order for head in each.heads]
            axes.plot(
                [head.shared_expected for head in heads],
                [head.shared for head in heads],
                linestyle="none",
                marker=looks[place % len(looks)],
                markersize=5,
                markerfacecolor="none",
                markeredgecolor=(VERMILION, BLUE)[place % 2],
                label=f"{order}-grams, a mark a head",
            )
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
        axes.set_xlabel("expected share of n-grams that share a row")
        axes.set_ylabel("counted")
        axes.legend(frameon=False, loc="upper left")
        return figure


def auroc_dots(by_checkpoint: Sequence[Sequence[GateScore]]) -> Figure:
    """What each gate tells apart, 0 to 1; whiskers, 95 %: over windows with one checkpoint, over
    checkpoints with several."""
    with matplotlib.rc_context(STYLE):
        gates = list(zip(*by_checkpoint, strict=True))
        figure, axes = blank(height=1.2 + 0.4 * len(gates))
        axes.axvline(0.5, color=INK, linewidth=1)
        named: dict[str, tuple[str, str]] = {}
        for row, together in enumerate(gates):
            for name, shift, marker, colour in (
                ("auroc_names", -0.15, "s", VERMILION),
                ("auroc_frequent", 0.15, "o", BLUE),
            ):
                known = [value for score in together if (value := score[name]) is not None]
                if not known:
                    continue
                means = [value["mean"] for value in known]
                low, high = known[0]["low"], known[0]["high"]
                if len(known) > 1:
                    low, high = bounds(means)
                axes.plot([low, high], [row + shift] * 2, color=colour, linewidth=1.4)
                axes.plot(np.mean(means), row + shift, marker, color=colour, markersize=4.5)
                named[name.removeprefix("auroc_")] = marker, colour
        for name, (marker, colour) in named.items():
            axes.plot([], [], marker, color=colour, markersize=4.5, label=name)
        first = [together[0] for together in gates]
        axes.set_yticks(
            range(len(first)),
            [
                f"layer {each['layer']}, stream {each['stream'] + 1},\n{each['order']}-gram"
                for each in first
            ],
        )
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.grid(axis="x", color=GRID, linewidth=0.7)
        axes.set_xlabel("AUROC of the gate")
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside upper left", ncols=2, frameon=False)
        return figure
