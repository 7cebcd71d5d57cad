"""docs/serving.md quotes, under "How to size tiers", what has been measured and simulated."""

import json
import math
import re
from pathlib import Path

import pytest

from engram_lm.cli import parser
from engram_lm.simulate.tiers import TIERS

ROOT = Path(__file__).parents[1]
SECTION = (ROOT / "docs" / "serving.md").read_text().split("## How to size tiers\n")[1]
SECTION = SECTION.split("\n## ")[0]
ROWS = {
    name: [cell.strip() for cell in cells.split("|")[:-1]]
    for name, cells in re.findall(r"^\| `(.+?)` \|(.+)$", SECTION, flags=re.MULTILINE)
}
KINDS = ("prefill", "decode", "single")


def result(name: str) -> dict[str, float]:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())["summary"]


def test_predictions_on_the_page_are_those_of_the_result():
    summary = result("serving_steps")
    cells = [name.removesuffix("_predicted_ms") for name in summary if "predicted_ms" in name]
    for cell in cells:
        digits = {"ms": 1, "predicted_ms": 1, "predicted_over_measured": 2}
        digits["memory_over_measured"] = 2
        wanted = [f"{summary[f'{cell}_{name}']:.{count}f}" for name, count in digits.items()]
        assert ROWS[cell] == wanted
    largest = max(abs(1 - summary[f"{cell}_predicted_over_measured"]) for cell in cells)
    assert f"within {math.ceil(100 * largest)} % in every cell" in SECTION.replace("\n", " ")


def test_speeds_on_the_page_are_those_of_the_result():
    summary = result("serving_plan")
    pattern = re.compile(r"^decode_(.+)_ratio$")
    arms = [found[1] for name in summary if (found := pattern.match(name))]
    assert {arm.removeprefix("iops") for arm in arms} <= set(ROWS)
    for arm in arms:
        values = [summary.get(f"{kind}_{arm}_ratio") for kind in KINDS]
        shown = ROWS[arm.removeprefix("iops")]
        assert shown[:3] == ["" if value is None else f"{value:.1%}" for value in values]
        if not arm.startswith("iops"):
            hits = [f"{summary[f'{kind}_{arm}_hits']:.0%}" for kind in KINDS[:2]]
            waits = [f"{summary[f'{kind}_{arm}_wait1_p99_ms']:.2f}" for kind in KINDS[:2]]
            assert shown[3:] == [*hits, *waits, f"{summary[f'decode_{arm}_memory_dollars']:,.0f}"]


@pytest.mark.parametrize("name", TIERS)
def test_tiers_on_the_page_are_the_presets(name):
    tier = TIERS[name]()
    (line,) = re.findall(rf"^\| {name} \|(.+)$", SECTION, flags=re.MULTILINE)
    latency, reads, size, dollars = [cell.strip() for cell in line.split("|")[:4]]
    assert latency == f"{tier.latency * 1e6:.0f} us" and dollars == f"{tier.dollars:g}"
    assert reads == ("-" if tier.iops == math.inf else f"{tier.iops / 1e6:g}M")
    shown, unit = size.split()
    assert float(shown) * {"GB": 1e9, "TB": 1e12}[unit] == pytest.approx(tier.bandwidth, rel=0.02)


def test_commands_on_the_page_parse():
    commands = re.findall(r"^    engram (plan serve .+)$", SECTION, flags=re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert parser().parse_args(command.split()).verb == "plan serve"
