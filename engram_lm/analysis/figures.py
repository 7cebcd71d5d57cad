"""The figures of a comparison, drawn small enough to be read on a phone, and their files.

Every function gives a matplotlib Figure; nothing here touches pyplot or keeps global state.
"""

import io
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import FuncFormatter, MaxNLocator

from engram_lm.analysis.bands import BandLoss, half
from engram_lm.analysis.findings import Losses
from engram_lm.analysis.results import ArmResult

# Of Okabe and Ito's palette, told apart by all common kinds of colour blindness; the third is open
# and hatched, so that a grey print keeps it apart as well.
BLUE, VERMILION, INK, GRID = "#0072B2", "#D55E00", "#1b1b1b", "#d9d9d9"
_FACES = (BLUE, VERMILION, "#ffffff")
_EDGES = (BLUE, VERMILION, VERMILION)
_HATCHES = ("", "", "////")
_MARKERS = ("o", "s")
# 4.4 inches fill a phone's width at about the size of its text; two stand side by side on a desk.
_SIZE = (4.4, 3.1)
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.titlesize": 10.5,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "text.color": INK,
    "hatch.linewidth": 1.2,
    "svg.fonttype": "path",  # looks alike in every browser, and needs no font there
}


def loss_curves(arms: Sequence[ArmResult], *, last_half: bool) -> Figure:
    """Training loss (line, running mean) and validation loss (markers) over training tokens."""
    with matplotlib.rc_context(STYLE):
        figure, axes = blank()
        ends = []
        end = max(point["tokens"] for arm in arms for point in arm.log.curve)
        start = end / 2 if last_half else 0
        for arm, colour, marker in zip(arms, (BLUE, VERMILION), _MARKERS, strict=True):
            curve = [(point["tokens"], point["loss"]) for point in arm.log.curve]
            smooth = _running_mean([loss for _, loss in curve], smoothing(arm))
            shown = [
                (tokens, loss)
                for (tokens, _), loss in zip(curve, smooth, strict=True)
                if tokens >= start
            ]
            axes.plot(*zip(*shown, strict=True), color=colour, linewidth=1.3, alpha=0.85)
            points = [(p["tokens"], p["loss"]) for p in arm.log.validation if p["tokens"] >= start]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    marker=marker,
                    linestyle="none",
                    markersize=5,
                    markeredgecolor="white",
                    markeredgewidth=0.6,
                )
            ends.append((points or shown)[-1][1])
        axes.set_title("last half of training" if last_half else "all of training", loc="left")
        axes.set_xlabel("training tokens")
        axes.set_ylabel("loss, nats per token")
        axes.xaxis.set_major_formatter(FuncFormatter(thousands))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        _label_ends(axes, [arm.name for arm in arms], (BLUE, VERMILION), ends, end)
        return figure


def validation_bars(losses: dict[str, Losses]) -> Figure:
    """Final validation loss of each, its value written beside the bar."""
    first, *_ = losses.values()
    labels = []
    for row, each in enumerate(losses.values()):
        difference = "" if row == 0 else minus(f"  ({each.loss - first.loss:+.3f})")
        labels.append(f"{each.loss:.3f}{difference}")
    unit = f"validation loss, nats per token (against {next(iter(losses))})"
    return _bars(list(losses), [each.loss for each in losses.values()], labels, unit)


def throughput_bars(arms: Sequence[ArmResult]) -> Figure:
    """Training tokens per second of each arm."""
    speeds = [arm.log.tokens_per_second for arm in arms]
    labels = [f"{speed:,.0f}" for speed in speeds]
    return _bars([arm.name for arm in arms], speeds, labels, "training tokens per second")


def band_bars(losses: dict[str, Losses], order: int, index: int, *, against: str | None) -> Figure:
    """Loss by how often the n-gram of `order` stood in the corpus, with 95 % intervals: blue what
    is compared with, orange the model, hatched the same with memory off."""
    with matplotlib.rc_context(STYLE):
        figure, axes = blank()
        width = 0.8 / len(losses)
        for place, (name, each) in enumerate(losses.items()):
            look = 0 if name == against else 2 if name.endswith(", memory off") else 1
            for column, row in enumerate(each.bands[index]):
                if row["mean"] is None:
                    continue
                axes.bar(
                    column + (place - (len(losses) - 1) / 2) * width,
                    row["mean"],
                    width * 0.92,
                    yerr=half(row, len(each.by_checkpoint)),
                    color=_FACES[look],
                    edgecolor=_EDGES[look],
                    hatch=_HATCHES[look],
                    error_kw={"elinewidth": 1, "capsize": 1.5, "ecolor": INK},
                    label=named(name) if column == _first_filled(each.bands[index]) else None,
                )
        axes.set_title(f"{order}-gram before the predicted token", loc="left")
        axes.set_ylabel("loss, nats per token")
        _band_axis(axes, next(iter(losses.values())).bands[index])
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        short = sum(map(len, losses)) < 32
        figure.legend(
            loc="outside upper left",
            ncols=len(losses) if short else 1,  # long names stand below one another
            frameon=False,
            handlelength=1.4,
            handletextpad=0.5,
            columnspacing=1.2,
        )
        return figure


def band_differences(rows: Sequence[BandLoss], order: int, title: str, checkpoints: int) -> Figure:
    """Difference of two arms in each band, with the paired difference's 95 % interval."""
    with matplotlib.rc_context(STYLE):
        figure, axes = blank()
        axes.axhline(0, color=INK, linewidth=1)
        for column, row in enumerate(rows):
            if row["mean"] is None:
                continue
            error = half(row, checkpoints) or 0.0
            colour = VERMILION if row["mean"] < 0 else BLUE
            axes.errorbar(
                column, row["mean"], yerr=error, color=colour, marker="s", capsize=3, markersize=4.5
            )
            axes.annotate(
                minus(f"{row['mean']:+.3f}"),
                (column, row["mean"]),
                xytext=(9, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_title(f"{named(title)}, by {order}-gram", loc="left")
        axes.set_ylabel("difference, nats per token")
        axes.margins(y=0.18)
        axes.set_xlim(-0.5, len(rows) - 0.1)  # room for the last number
        _band_axis(axes, rows)
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        return figure


def smoothing(arm: ArmResult) -> int:
    """How many points of the training curve one point of its drawn line is the mean of."""
    return max(1, len(arm.log.curve) // 40)


def save(figure: Figure, directory: Path, name: str) -> str:
    """Writes name.svg and name.png, and gives the SVG for a page that may hold others beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(directory / f"{name}.png", dpi=200, metadata={"Software": None})
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    (directory / f"{name}.svg").write_text(svg, encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # In one page every id exists once, and the size is the page's business.
    svg = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("xlink:href", "href")
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1">', svg, count=1)


def blank(height: float = _SIZE[1]) -> tuple[Figure, Axes]:
    """Inside a `matplotlib.rc_context(STYLE)`: one pair of axes, as wide as all figures are."""
    figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
    return figure, figure.add_subplot()


def _bars(
    names: Sequence[str], values: Sequence[float], labels: Sequence[str], unit: str
) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure, axes = blank(height=0.85 + 0.5 * len(names))
        bars = axes.barh(range(len(names)), values, height=0.62)
        for bar, face, edge, hatch in zip(bars, _FACES, _EDGES, _HATCHES, strict=False):
            bar.set(facecolor=face, edgecolor=edge, hatch=hatch)
        axes.bar_label(bars, labels, padding=4)
        axes.set_yticks(range(len(names)), [named(name).replace(", ", ",\n") for name in names])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, max(values) * 1.5)  # room for the labels
        axes.xaxis.set_major_formatter(FuncFormatter(thousands))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(unit)
        return figure


def _band_axis(axes: Axes, rows: Sequence[BandLoss]) -> None:
    labels = [
        f"{row['band'].replace(' and more', '+')}\n({thousands(row['tokens'])})" for row in rows
    ]
    axes.set_xticks(range(len(rows)), labels)
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("times in the corpus (number of tokens)")


def _first_filled(rows: Sequence[BandLoss]) -> int:
    return next((column for column, row in enumerate(rows) if row["mean"] is not None), 0)


def _running_mean(values: Sequence[float], points: int) -> list[float]:
    # Of the latest points, fewer at the start.
    return [
        sum(values[max(0, end - points) : end]) / min(end, points)
        for end in range(1, len(values) + 1)
    ]


def _label_ends(
    axes: Axes, names: Sequence[str], colours: Sequence[str], ends: Sequence[float], x: float
) -> None:
    # Beside the last points, moved apart where they are too close to be read.
    low, high = axes.get_ylim()
    gap = 0.08 * (high - low)
    places = sorted(range(len(ends)), key=ends.__getitem__)
    heights = dict(zip(places, [ends[place] for place in places], strict=True))
    for lower, upper in pairwise(places):
        overlap = gap - (heights[upper] - heights[lower])
        if overlap > 0:
            heights[lower] -= overlap / 2
            heights[upper] += overlap / 2
    for place, height in heights.items():
        axes.annotate(
            names[place],
            (x, height),
            xytext=(8, 0),
            textcoords="offset points",
            color=colours[place],
            weight="bold",
            va="center",
            annotation_clip=False,
        )


def minus(text: str) -> str:
    """With true minus signs."""
    return text.replace("-", "\u2212")


def named(name: str) -> str:
    """A model's name as matplotlib shows it: no formula, no hidden legend, "?" for a character that
    its font does not have."""
    font = get_font(findfont("DejaVu Sans"))
    shown = "".join(each if font.get_char_index(ord(each)) else "?" for each in name)
    shown = shown.replace("\\", "\\\\").replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def thousands(value: float, _position: int = 0) -> str:
    """1234 as 1.23k; a formatter of axes too."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def seeds(checkpoints: int) -> str:
    """As figures and tables say it."""
    return "one seed" if checkpoints == 1 else f"{checkpoints} seeds"


def over_seeds(checkpoints: int) -> str:
    """What an interval over several checkpoints is, for a reader."""
    return f"95 % of the mean over {seeds(checkpoints)} (Student's t)"
