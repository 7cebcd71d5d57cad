"""Claims of the paper beside what recipes/two_source.py measured: ours left, theirs right;
below, the controls.

Redrawn from a record alone: python recipes/two_source_claims.py results/two_source.json
"""

import json
import math
import statistics
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from engram_lm.analysis.ablation_losses import retention
from engram_lm.analysis.figures import BLUE, GRID, VERMILION, save, seeds
from engram_lm.analysis.student import half_width
from engram_lm.analysis.suite_ablation import WHOLE

RETAINED = {
    "C3": 93, "RACE-M": 89, "HellaSwag": 85, "RACE-H": 84, "DROP": 81, "ARC-C": 81, "PIQA": 81,
    "CMMLU": 78, "CruxEval": 76, "MMLU": 75, "MMLU-Pro": 72, "MBPP": 68, "BBH": 67, "GSM8K": 62,
    "HumanEval": 58, "MGSM": 44, "TriviaQA-ZH": 44, "PopQA": 44, "MATH": 36, "TriviaQA": 29,
}  # fmt: skip
"""Engram-27B with its memory off, per cent of its score: figure 6 of arXiv 2601.07372."""
FACTS, READING = ("TriviaQA", "TriviaQA-ZH", "PopQA"), ("C3", "RACE-M", "RACE-H", "DROP")
LENS = {
    "MoE": [
        10.01, 9.33, 9.08, 8.59, 8.13, 7.81, 7.63, 7.52, 7.49, 7.32, 7.23, 7.41, 7.37, 7.33, 7.25,
        6.98, 6.81, 6.44, 3.88, 3.51, 3.00, 3.07, 2.76, 2.20, 2.09, 2.11, 1.27, 0.88, 0.43,
    ],
    "Engram": [
        10.33, 8.92, 8.21, 7.99, 7.76, 7.37, 7.16, 6.97, 6.92, 6.84, 6.64, 6.70, 6.66, 6.48, 6.42,
        6.14, 6.23, 5.93, 4.88, 4.02, 3.08, 2.97, 2.49, 2.19, 1.79, 1.63, 1.11, 0.88, 0.46,
    ],
}  # fmt: skip
"""KL by layer, read off the vector graphics of the paper's LogitLens figure; how it counts layers
is not stated."""
INDEX = [
    1.7, 1.7, 11.8, 13.0, 13.0, 12.2, 12.2, 10.8, 10.8, 12.3, 14.5, 15.9, 13.9, 12.0, 13.7, 19.0,
    19.0, 21.2, 21.2, 24.6, 25.4, 25.5, 26.0, 26.0, 26.0, 26.0, 26.0, 26.1, 26.1, 26.1,
]  # fmt: skip
"""Soft alignment of Engram-27B's layers in MoE-27B's, read off likewise: 0 seems to be the
embeddings, i the output of block i counted from one. The paper has no null."""
KINDS = {
    "trained/after": "trained, behind the name",
    "trained/later": "trained, beyond an n-gram",
    "given/after": "given, behind the name",
    "given/later": "given, beyond an n-gram",
    "unknown/after": "given, new name, behind",
    "unknown/later": "given, new name, beyond",
}
MARKS = {"trained/after": "s", "trained/later": "o", "given/later": "D"}
LOOKS = {"Engram": (VERMILION, "s-"), "MoE": (BLUE, "o--")}

Asked = dict[str, dict[str, float]]
"""Switch -> kind of question -> share of right answers."""


def draw(record: Path) -> None:
    """NAME_claims.svg and .png beside the record."""
    read = json.loads(record.read_text())
    flat, analysis = read["summary"], read["raw"]["analysis"]
    figure, axes = plt.subplots(5, 2, figsize=(9.0, 16.5), layout="constrained")
    _retained(axes[0], read["raw"]["asked"], flat)
    _lens(axes[1], analysis["lens"], flat)
    _alignment(axes[2], analysis["alignment"])
    _gates(axes[3], flat, analysis["gates"]["scores"][0])
    _controls(axes[4], analysis["suites"])
    for axis in axes.flat:
        axis.title.set_fontsize(9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{seeds(int(flat['seeds']))}, {flat['tokens'] / 1e6:.1f}M tokens an arm; "
        "left: measured here, right: the paper's Engram-27B and MoE-27B",
        fontsize=10,
    )
    save(figure, record.parent, f"{record.stem}_claims")
    plt.close(figure)


def _retained(axes: Any, by_seed: list[Asked], flat: dict[str, float]) -> None:
    own, paper = axes
    chance = flat["chance"]

    def kept(part: str, kind: str, above: float) -> list[float]:
        """Per cent, seed by seed."""
        arm = part.split(", ")[0]
        return [100 * retention(seed[part][kind], seed[arm][kind], above) for seed in by_seed]

    for row, kind in enumerate(KINDS):
        told = f"off_{kind.replace('/', '_')}_above_chance_mean"  # of a score above chance
        if f"Engram_memory_{told}" not in flat:
            own.annotate("at chance with memory", (2, row), va="center", fontsize=8)
            continue
        colour = VERMILION if kind.startswith("trained") else BLUE
        values = kept("Engram, memory off", kind, chance)
        own.barh(row, statistics.mean(values), color=colour, height=0.6)
        own.plot(values, [row] * len(values), "ko", ms=3)
        raw = statistics.mean(kept("Engram, memory off", kind, 0.0))
        own.plot(raw, row + 0.4, "D", color="white", markeredgecolor="black", ms=4)
        if f"MoE_experts_of_layer_0_{told}" in flat:
            parts = [part for part in by_seed[0] if part.startswith("MoE, ")]
            worst = np.min([kept(part, kind, chance) for part in parts], axis=0)
            own.plot(worst, [row] * len(worst), "|", color="#777777", ms=14)
    own.set_yticks(range(len(KINDS)), list(KINDS.values()), fontsize=8)
    own.set_title(
        "retained above chance, memory off (dots: seeds; diamond: not\n"
        "chance-corrected; lines: MoE, the worst layer's experts off)"
    )
    paper.barh(
        range(len(RETAINED)), list(RETAINED.values()), height=0.7,
        color=[VERMILION if name in FACTS else BLUE if name in READING else "#999999"
               for name in RETAINED],
    )  # fmt: skip
    paper.set_yticks(range(len(RETAINED)), list(RETAINED), fontsize=7)
    paper.set_title("retained, not chance-corrected\n(blue: reading, orange: facts)")
    for axis in axes:
        axis.invert_yaxis()
        axis.set_xlabel("per cent")
        axis.set_xlim(min(0, axis.get_xlim()[0]), 112)


def _half(flat: dict[str, float], name: str) -> float:
    """Half of the 95 % interval over seeds; 0 with one."""
    error = flat.get(f"{name}_sd", 0.0) / math.sqrt(flat["seeds"])
    return half_width(error, int(flat["seeds"])) if error else 0.0


def _lens(axes: Any, lenses: dict[str, Any], flat: dict[str, float]) -> None:
    own, paper = axes
    for name, (colour, line) in {**LOOKS, "Engram, memory off": (VERMILION, "^:")}.items():
        lens = lenses[name]
        blocks = [place for place, at in enumerate(lens["at"]) if at == "block"]
        layers = [lens["layers"][place] for place in blocks]
        names = [f"lens_final_to_layer_{name.replace(', ', '_').replace(' ', '_')}_block_{layer}"
                 for layer in layers]  # fmt: skip
        means = np.array([flat[f"{each}_mean"] for each in names])
        halves = np.array([_half(flat, each) for each in names])
        own.plot(layers, means, line, color=colour, ms=4, label=name)
        own.fill_between(
            layers, means - halves, means + halves, color=colour, alpha=0.2, linewidth=0
        )
        if name in LENS:
            paper.plot(range(len(LENS[name])), LENS[name], line, color=colour, ms=3, label=name)
    own.set_title("KL(final ‖ block), final norm; 95 % over seeds (Student's t)")
    paper.set_title("KL by layer (direction and norm not stated)")
    _by_layer(axes, "nats")


def _alignment(axes: Any, found: dict[str, Any]) -> None:
    own, paper = axes
    many = round(len(found["index"]) ** 0.5)  # of each arm
    drawn = {"Engram in MoE": (found["index"], LOOKS["Engram"][0], "-")}
    if found["null_index"]:
        drawn["null: other MoEs in it"] = (found["null_index"], LOOKS["MoE"][0], "--")
    for label, (pairs, colour, line) in drawn.items():
        values = np.array(pairs).reshape(many, -1, len(found["likest"])).mean(1)
        for seed, (index, mark) in enumerate(zip(values, "so^v<>", strict=False)):
            named_so = f"{label}, seed {seed}"
            own.plot(index, line, marker=mark, color=colour, ms=4, label=named_so)
    colour, line = LOOKS["Engram"]
    paper.plot(range(len(INDEX)), INDEX, line, color=colour, ms=3, label="Engram in MoE")
    for axis, layers in ((own, len(found["index"][0])), (paper, len(INDEX))):
        axis.plot([0, layers - 1], [0, layers - 1], color=GRID)
    own.set_title("soft alignment in each MoE: compare equal marks")
    paper.set_title("soft alignment (no null)")
    _by_layer(axes, "index")


def _gates(axes: Any, flat: dict[str, float], scores: list[dict[str, Any]]) -> None:
    own, paper = axes
    labels = []
    for row, score in enumerate(scores):
        place = f"layer_{score['layer']}_stream_{score['stream']}_order_{score['order']}"
        labels.append(place.replace("_", " "))
        for shift, (key, colour) in enumerate((("names", VERMILION), ("frequent", BLUE))):
            name = f"gate_auroc_{key}_{place}"
            if f"{name}_mean" in flat:
                own.errorbar(
                    flat[f"{name}_mean"],
                    row + 0.2 * shift,
                    xerr=_half(flat, name),
                    fmt="s",
                    color=colour,
                    ms=4,
                )
    for key, colour in (("names", VERMILION), ("frequent", BLUE)):
        own.plot([], [], "s", color=colour, ms=4, label=key)
    own.axvline(0.5, color=GRID)
    own.set_xlim(0, 1)
    own.set_yticks(range(len(labels)), labels, fontsize=8)
    own.invert_yaxis()
    own.set_title(
        "AUROC of gates for ends of names, frequent n-grams;\n95 % over seeds (Student's t)"
    )
    own.legend(frameon=False, fontsize=8)
    paper.axis("off")
    paper.text(
        0, 0.6, "Eight gates of Engram-27B in figure 7,\nchosen by hand as those most correlated\n"
        "with pattern matching; no number given.", fontsize=10,
    )  # fmt: skip


def _controls(axes: Any, checkpoints: list[list[dict[str, Any]]]) -> None:
    """Facts and reading without each part: whether rows must be those that were learned, and gates
    those that were chosen."""
    own, paper = axes
    kept: dict[tuple[str, str], list[float]] = {}
    for asked in chain.from_iterable(checkpoints):
        if asked["suite"] == "two_source" and asked["above_chance"] is not None:
            kept.setdefault((asked["part"], asked["kind"]), []).append(100 * asked["above_chance"])
    parts = [part for part in dict.fromkeys(part for part, _ in kept) if part != WHOLE]
    for shift, (kind, mark) in enumerate(MARKS.items()):
        colour = VERMILION if kind.startswith("trained") else BLUE
        label = KINDS[kind]
        own.plot([], [], mark, color=colour, ms=4, label=label)
        for row, part in enumerate(parts):
            values = kept.get((part, kind), [])
            if len(values) == len(checkpoints):
                mean = statistics.mean(values)
                bounds = [[mean - min(values)], [max(values) - mean]]
                at = row + 0.25 * (shift - 1)
                own.errorbar(mean, at, xerr=bounds, fmt=mark, color=colour, ms=4)
    own.set_yticks(range(len(parts)), parts, fontsize=8)
    own.invert_yaxis()
    own.set_xlabel("per cent")
    own.set_title("retained above chance without a part; range over seeds")
    paper.legend(*own.get_legend_handles_labels(), frameon=False, fontsize=8, loc="lower left")
    paper.axis("off")
    paper.text(
        0, 0.6, "Without single parts the paper gives losses\nof models trained so, no scores:\n"
        "nothing to put beside these.", fontsize=10,
    )  # fmt: skip


def _by_layer(axes: Any, label: str) -> None:
    axis: Axes
    for axis in axes:
        axis.set_xlabel(
            "after block (from zero)" if axis is axes[0] else "as in the paper's figure"
        )
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
