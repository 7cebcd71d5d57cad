"""docs/speed.md quotes what its benchmarks have measured."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "speed.md").read_text()


def result(name: str) -> dict[str, float]:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())["summary"]


def table(heading: str) -> dict[str, list[str]]:
    """Rows below a heading whose first cell is code: what it names, and the other cells."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(.+?)` \|(.+)\|$", section, flags=re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def test_the_parts_of_a_step_are_those_of_the_result():
    summary = result("train_step")
    assert f"{summary['ratio_of_medians']:.2f}x" in PAGE
    assert f"{summary['median_ratio_of_pairs']:.2f}x" in PAGE
    parts = [name.split("_ms_")[1] for name in summary if name.startswith("engram_ms_")]
    milliseconds = [
        [summary.get(f"{arm}_ms_{part}") for arm in ("engram", "moe")] for part in parts
    ]
    wanted = {
        part: ["" if value is None else f"{value:.1f}" for value in pair]
        for part, pair in zip(parts, milliseconds, strict=True)
    }
    found = table("Where the time goes")
    assert {part: cells[:2] for part, cells in found.items()} == wanted


def test_the_allocators_figures_are_those_of_the_result():
    summary = result("allocators")
    cases = table("Allocator and denormals")
    assert set(cases) == {
        name.removeprefix("moe_").removesuffix("_over_glibc")
        for name in summary
        if name.startswith("moe_") and name.endswith("_over_glibc")
    }
    for case, cells in cases.items():
        assert cells[:2] == [
            f"{summary[f'{arm}_{case}_over_glibc']:.2f}" for arm in ("engram", "moe")
        ]
