"""The figure of recipes/two_source.py: right answers with and without the memory, by their source.

Redrawn from the record alone: python recipes/two_source_figure.py results/two_source.json
"""

import json
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from engram_lm.analysis.figures import BLUE, save, seeds

KINDS = {
    "trained/after": "trained,\nright behind\nthe name",
    "trained/later": "trained,\nbeyond an\nn-gram",
    "given/after": "given,\nright behind\nthe name",
    "given/later": "given,\nbeyond an\nn-gram",
    "unknown/after": "given, name\nnever seen,\nright behind",
    "unknown/later": "given, name\nnever seen,\nbeyond",
}
ARMS = {
    "MoE": ("MoE", "#999999"),
    "Engram": ("Engram", BLUE),
    "Engram, memory off": ("Engram, memory off", "#E69F00"),
}
"""Colours that colour-blind readers tell apart (Okabe and Ito)."""


def draw(record: Path) -> None:
    """Beside the record, as SVG and PNG. Bars: means; dots: seeds."""
    read = json.loads(record.read_text())
    by_seed = read["raw"]["asked"]
    figure, axis = plt.subplots(figsize=(7.0, 3.6))
    width = 0.27
    for place, (arm, (label, colour)) in enumerate(ARMS.items()):
        places = [at + (place - 1) * width for at in range(len(KINDS))]
        scores = [[seed[arm][kind] for kind in KINDS] for seed in by_seed]
        means = [statistics.mean(each) for each in zip(*scores, strict=True)]
        axis.bar(places, means, width * 0.94, color=colour, label=label)
        for values in scores:
            axis.plot(places, values, "o", color="black", ms=2, clip_on=False)
    axis.axhline(read["summary"]["chance"], color="black", lw=0.8, ls=":", label="chance")
    axis.set_xticks(range(len(KINDS)), list(KINDS.values()), fontsize=8)
    axis.set_ylim(0, 1)
    axis.set_ylabel("share of right answers")
    axis.set_title(f"{seeds(len(by_seed))}, a dot each", fontsize=9, loc="left")
    axis.legend(frameon=False, fontsize=8, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save(figure, record.parent, record.stem)
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
