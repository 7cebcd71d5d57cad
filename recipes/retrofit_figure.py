"""The figure of recipes/retrofit.py: what an arm gains on the new domain, and what it forgets; and
the frontier, runs that no other run beats in both.

Redrawn from the record alone, with the frontier's table for docs/ecosystem.md on standard output:
python recipes/retrofit_figure.py
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from retrofit_arms import ARMS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from engram_lm.analysis.figures import BLUE, VERMILION, save
from engram_lm.analysis.student import PLUS_MINUS, spread

COLOURS = {
    "memory": BLUE,
    "lora_flops": "#E69F00",
    "lora_parameters": VERMILION,
    "full": "#444444",
    "memory_lora": "#56B4E9",
}
"""That colour-blind readers tell apart (Okabe and Ito)."""
ON_THE_LEFT = ("memory_lora", "memory")
"""Labels that would else stand in another arm's."""


class Point(NamedTuple):
    """One run of the first seed: an arm with one of the rates that were searched. Bits per byte."""

    arm: str
    lr: float
    taken: bool
    """The arm's best rate on validation modules, with which the other seeds ran."""
    gain: float
    forgetting: float

    def beats(self, other: "Point") -> bool:
        """As much gained and as little forgotten, and more or less of one."""
        ahead = self.gain >= other.gain and self.forgetting <= other.forgetting
        return ahead and self[-2:] != other[-2:]


def points(found: dict[str, Any]) -> list[Point]:
    """Every run of the first seed, the least forgetful first."""
    first = next(iter(found.values()))
    before = first["backbone"]
    return sorted(
        (
            Point(
                arm,
                each["lr"],
                each["lr"] == first["arms"][arm]["lr"],
                before["new_bpb"] - each["new_bpb"],
                each["old_bpb"] - before["old_bpb"],
            )
            for arm in ARMS
            for each in first["searched"][arm]
        ),
        key=lambda point: point.forgetting,
    )


def frontier(runs: list[Point]) -> list[Point]:
    """Those that none of the others beats."""
    return [run for run in runs if not any(other.beats(run) for other in runs)]


def table(runs: list[Point]) -> str:
    """Markdown, the least forgetful first."""
    lines = ["| | learning rate | gain | forgetting | beaten by |", "|---|---:|---:|---:|---|"]
    for run in runs:
        better = [other for other in runs if other.beats(run)]
        by = {f"{ARMS[other.arm]}, {other.lr:g}": other.gain for other in better}
        rate = f"**{run.lr:g}**" if run.taken else f"{run.lr:g}"
        lines.append(
            f"| {ARMS[run.arm]} | {rate} | {run.gain:.3f} | {run.forgetting:.3f} "
            f"| {max(by, key=by.__getitem__) if by else 'none: on the frontier'} |"
        )
    return "\n".join(lines)


def draw(found: dict[str, Any], record: Path) -> None:
    """Beside the record, as SVG and PNG. Small hollow points: the rates searched, one seed."""
    figure, axis = plt.subplots(figsize=(5.6, 4.2))
    runs = points(found)
    for arm, colour in COLOURS.items():
        searched = sorted((run for run in runs if run.arm == arm), key=lambda run: run.lr)
        forgotten, gained = ([run[at] for run in searched] for at in (-1, -2))
        axis.plot(forgotten, gained, "o-", color=colour, mfc="white", ms=3, lw=0.6, alpha=0.6)
        across, up = (
            spread(
                [
                    sign * (seed["arms"][arm][name] - seed["backbone"][name])
                    for seed in found.values()
                ]
            )
            for name, sign in (("old_bpb", 1), ("new_bpb", -1))
        )
        x, y = across["mean"], up["mean"]
        axis.errorbar(
            x,
            y,
            xerr=across.get("t95", 0.0),
            yerr=up.get("t95", 0.0),
            fmt="o",
            color=colour,
            ms=6,
            lw=1,
            capsize=2,
        )
        left = arm in ON_THE_LEFT
        axis.annotate(
            ARMS[arm],
            (x, y),
            (-8, 4) if left else (8, 4),
            textcoords="offset points",
            ha="right" if left else "left",
            fontsize=8,
            color=colour,
        )
    best = frontier(runs)
    axis.step(
        [0, *(run.forgetting for run in best)],
        [0, *(run.gain for run in best)],
        where="post",
        color="#999999",
        lw=0.8,
        ls="--",
        zorder=0,
    )
    axis.set_title(
        f"large: {PLUS_MINUS}\nhollow: each rate, one seed; dashed: their frontier",
        fontsize=8,
        loc="left",
    )
    axis.axvline(0, color="#999999", lw=0.6)
    axis.margins(y=0.12)
    axis.set_xlim(left=-0.02, right=1.1 * axis.get_xlim()[1])
    axis.set_xlabel("forgetting: bits per byte more on WordNet than the backbone")
    axis.set_ylabel("gain: bits per byte fewer on docstrings")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save(figure, record.parent, record.stem)
    plt.close(figure)


if __name__ == "__main__":
    path = Path("results/retrofit.json")
    seeds = json.loads(path.read_text())["raw"]["runs"]
    draw(seeds, path)
    print(table(points(seeds)))
