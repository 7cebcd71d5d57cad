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


def test_what_each_kind_of_cpu_gives_is_in_the_results():
    kinds = table("Kinds of CPU")
    assert set(kinds) == {
        path.stem.removeprefix("precision_") for path in (ROOT / "results").glob("precision_*.json")
    }
    for kind, cells in kinds.items():
        summary = result(f"precision_{kind}")
        names = [f"product_1024_{dtype}_gflops" for dtype in ("fp32", "bf16", "fp16")]
        names += [f"step_{case}_ms" for case in ("bf16", "fp32", "fp32_muon_bf16")]
        digits = [1, 1, 1, 0, 0, 0]
        assert cells == [f"{summary[n]:,.{d}f}" for n, d in zip(names, digits, strict=True)]


def test_what_company_costs_is_in_its_result():
    summary = result("company")
    cases = table("Beside other work")
    assert set(cases) == {
        name.removesuffix("_alone_ms") for name in summary if name.endswith("_alone_ms")
    }
    for case, cells in cases.items():
        alone, beside = summary[f"{case}_alone_ms"], summary[f"{case}_beside_ms"]
        over = summary[f"{case}_alone_over_as_it_comes"]
        ratio = summary[f"{case}_beside_over_alone"]
        assert cells[:4] == [f"{alone:.0f}", f"{over:.2f}x", f"{beside:.0f}", f"{ratio:.2f}x"]
