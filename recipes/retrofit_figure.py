"""The figure of recipes/retrofit.py: what an arm gains on the new domain, and what it forgets.

Redrawn from the record alone: python recipes/retrofit_figure.py
"""

import json
from pathlib import Path
from typing import Any

import matplotlib
from retrofit_arms import ARMS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from engram_lm.analysis.figures import BLUE, VERMILION, save

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


def draw(flat: dict[str, float], found: dict[str, Any], record: Path) -> None:
    """Beside the record, as SVG and PNG. Small hollow points: the rates searched, one seed."""
    figure, axis = plt.subplots(figsize=(5.6, 4.0))
    first = next(iter(found.values()))
    before = first["backbone"]
    for arm, colour in COLOURS.items():
        searched = sorted(first["searched"][arm], key=lambda each: each["lr"])
        forgotten = [each["old_bpb"] - before["old_bpb"] for each in searched]
        gained = [before["new_bpb"] - each["new_bpb"] for each in searched]
        axis.plot(forgotten, gained, "o-", color=colour, mfc="white", ms=3, lw=0.6, alpha=0.6)
        x, y = flat[f"{arm}_forgetting_mean"], flat[f"{arm}_gain_mean"]
        axis.errorbar(
            x,
            y,
            xerr=flat[f"{arm}_forgetting_sd"],
            yerr=flat[f"{arm}_gain_sd"],
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
    record = json.loads(path.read_text())
    draw(record["summary"], record["raw"]["runs"], path)
