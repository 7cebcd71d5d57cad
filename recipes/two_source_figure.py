"""The figure of recipes/two_source.py: right answers with and without the memory, by their source.

Redrawn from the record alone: python recipes/two_source_figure.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from engram_lm.analysis.figures import BLUE, save

KINDS = {
    "trained_after": "trained,\nright behind\nthe name",
    "trained_later": "trained,\nbeyond an\nn-gram",
    "given_after": "given,\nright behind\nthe name",
    "given_later": "given,\nbeyond an\nn-gram",
    "unknown_after": "given, name\nnever seen,\nright behind",
    "unknown_later": "given, name\nnever seen,\nbeyond",
}
ARMS = {
    "MoE": ("MoE", "#999999"),
    "Engram": ("Engram", BLUE),
    "Engram_memory_off": ("Engram, memory off", "#E69F00"),
}
"""Colours that colour-blind readers tell apart (Okabe and Ito)."""


def draw(flat: dict[str, float], record: Path) -> None:
    """Beside the record, as SVG and PNG. Bars: means; lines: standard deviation over seeds."""
    figure, axis = plt.subplots(figsize=(7.0, 3.6))
    width = 0.27
    for place, (arm, (label, colour)) in enumerate(ARMS.items()):
        axis.bar(
            [at + (place - 1) * width for at in range(len(KINDS))],
            [flat[f"{arm}_{kind}_mean"] for kind in KINDS],
            width * 0.94,
            yerr=[flat.get(f"{arm}_{kind}_sd", 0.0) for kind in KINDS],
            color=colour,
            label=label,
            error_kw={"lw": 1},
        )
    axis.axhline(flat["chance"], color="black", lw=0.8, ls=":", label="chance")
    axis.set_xticks(range(len(KINDS)), list(KINDS.values()), fontsize=8)
    axis.set_ylim(0, 1)
    axis.set_ylabel("share of right answers")
    seeds = int(flat["seeds"])
    axis.set_title("one seed" if seeds == 1 else f"{seeds} seeds", fontsize=9, loc="left")
    axis.legend(frameon=False, fontsize=8, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save(figure, record.parent, record.stem)
    plt.close(figure)


if __name__ == "__main__":
    path = Path("results/two_source.json")
    draw(json.loads(path.read_text())["summary"], path)
