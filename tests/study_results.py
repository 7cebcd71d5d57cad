"""The studies' results, put as README and docs put them: means with what stands behind ±.

Over seeds that is half the mean's 95 % interval, Student's t; shares, which differ in kind between
seeds, stand with the seeds behind them.
"""

import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest

from engram_lm.analysis.ablation_losses import retention
from engram_lm.analysis.student import half_width, spread

ROOT = Path(__file__).parents[1]


def record(name: str) -> dict:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def page(name: str) -> str:
    """On one line, so that a sentence is found wherever its lines end."""
    return " ".join((ROOT / name).read_text().split())


README, ANALYSIS, ECOSYSTEM, LOG = map(
    page, ("README.md", "docs/analysis.md", "docs/ecosystem.md", "docs/log.md")
)
TWINS, TEXT = ANALYSIS.split("### And a pair that reads WordNet as well")
TEXT, BANDS = TEXT.split("### Who gains and who pays")


def of(flat: dict, name: str, *, form: str = ".2f", scale: float = 1) -> str:
    """Mean and half of its interval, of a summary's mean and standard deviation over seeds."""
    seeds = int(flat.get("seeds", 3))
    half = half_width(flat[f"{name}_sd"] / math.sqrt(seeds), seeds) * abs(scale)
    return f"{flat[f'{name}_mean'] * scale:{form}} ± {half:{form.lstrip('+')}}"


def shares(values: list[float]) -> str:
    """Per cent: the mean, and the seeds."""
    mean, *seeds = (round(100 * each) for each in (statistics.mean(values), *values))
    return f"{mean} % ({', '.join(map(str, seeds))})"


def parts(values: list[float]) -> str:
    """The same as parts of one."""
    return f"{statistics.mean(values):.2f} ({', '.join(f'{each:.2f}' for each in values)})"


class TwoSource:
    """One record of recipes/two_source.py, seed by seed."""

    def __init__(self, name: str) -> None:
        self.record = record(name)
        self.flat, raw = self.record["summary"], self.record["raw"]
        self.analysis, self.asked = raw["analysis"], raw["asked"]
        self.bands = self.analysis["bands"]
        self.above = np.array(self.analysis["alignment"]["above"])  # MoE, block
        self.values = record("two_source_values")["raw"]["by_seed"]
        self.name = name

    def __call__(self, name: str, **how: object) -> str:
        return of(self.flat, name, **how)

    def interval(self, name: str) -> tuple[float, float]:
        mean, half = map(float, self(name, form=".9f").split(" ± "))
        return mean - half, mean + half

    def left(self, switch: str, kind: str) -> str:
        """Above chance, of the whole test's answers."""
        chance, arm = self.flat["chance"], switch.split(", ")[0]
        values = [retention(seed[switch][kind], seed[arm][kind], chance) for seed in self.asked]
        name = f"{switch} {kind} above chance".replace(", ", "_").replace(" ", "_")
        assert statistics.mean(values) == pytest.approx(self.flat[f"{name.replace('/', '_')}_mean"])
        return shares(values)

    def kept(self, part: str, kind: str) -> str:
        """Above chance, of the ablations' questions."""
        rows = [
            [r for r in seed if (r["part"], r["kind"], r["metric"]) == (part, kind, "right")]
            for seed in self.analysis["suites"]
        ]
        values = [row["above_chance"] for (row,) in rows]
        name = f"kept_{part}_two_source_{kind}".replace(" ", "_").replace("/", "_")
        assert statistics.mean(values) == pytest.approx(self.flat[f"{name}_mean"])
        return shares(values)

    def among(self, switch: str, kind: str) -> str:
        """Right among the relation's values."""
        return parts(self.values[f"{self.name}_{switch}_{kind}"])

    def p(self, block: int) -> float:
        """Two-sided, of three MoEs' indices against 0; Student's t of two degrees is elementary."""
        found = spread(self.above[:, block].tolist())
        t = abs(found["mean"]) / (found["sd"] / math.sqrt(3))
        return 1 - t / math.sqrt(2 + t * t)


def demos() -> dict[str, dict]:
    return {precision: record(f"demo_{precision}") for precision in ("bf16", "fp32")}


def text_gain() -> tuple[dict[str, float], dict[str, float]]:
    """What the Engram arm of the pair that reads WordNet gains there: nats a token, bits per byte,
    over seeds."""
    bands = TwoSource("two_source_text").bands
    own, other = (bands["losses"][arm] for arm in ("Engram", "MoE"))
    pairs = zip(other["by_checkpoint"], own["by_checkpoint"], strict=True)
    nats = [moe - engram for moe, engram in pairs]
    to_bpb = own["bpb"] / own["loss"]
    found = spread(nats)
    assert found["mean"] == pytest.approx(-bands["difference_mean"])
    assert found["sd"] / math.sqrt(3) == pytest.approx(bands["difference_error"])
    return found, spread([each * to_bpb for each in nats])


def all_there(said: list[str], text: str) -> None:
    for each in said:
        assert each in text, each


README, ANALYSIS, ECOSYSTEM, LOG = map(
    page, ("README.md", "docs/analysis.md", "docs/ecosystem.md", "docs/log.md")
)
TWINS, TEXT = ANALYSIS.split("### And a pair that reads WordNet as well")
TEXT, BANDS = TEXT.split("### Who gains and who pays")
