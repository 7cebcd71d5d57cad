"""docs/serving.md says of tables on disk what benchmarks/offload.py has measured."""

import json
from pathlib import Path

import pytest
from test_serving_page import PAGE, rows

ROOT = Path(__file__).parents[1]
MEASURED = json.loads((ROOT / "results" / "offload.json").read_text())["summary"]
CHECKED = json.loads((ROOT / "results" / "serving_check.json").read_text())["summary"]
CELLS = [
    f"{backbone}_{phase}_b{batch}"
    for backbone in ("0_3B", "1_2B")
    for phase in ("decode", "prefill")
    for batch in (1, 4, 16)
]
SECTION = PAGE.split("\n## What it costs\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("cell", CELLS)
def test_the_costs_of_a_cell_are_those_of_the_result(cell):
    def of(name: str) -> float:
        return MEASURED[f"{cell}_{name}"]

    def interval(name: str) -> str:
        return f"{of(name):.2f} ({of(name + '_low'):.2f}–{of(name + '_high'):.2f})"

    ratios = ("ram_over_none", "cached_over_ram", "disk_over_ram", "sync_over_ram")
    assert rows("cell")[cell] == [
        f"{of('none_tokens_per_second'):.1f}",
        f"{of('none_there_over_none'):.2f}",
        *map(interval, ratios),
        f"{of('cached_bound'):.2f}",
        f"{of('cached_miss_share'):.0%}",
        f"{of('cached_wait_ms'):.1f}",
        f"{of('cached_cpu_us_per_row_read'):.0f}",
    ]


def test_memory_first_token_and_the_simulation_are_those_of_the_results():
    for backbone in ("0_3B", "1_2B"):
        peak, limit = (MEASURED[f"{backbone}_{name}"] for name in ("peak", "limit"))
        assert peak <= limit
        assert f"{peak / 1e9:.2f} of {limit / 1e9:.2f} GB" in SECTION
    none, disk = (MEASURED[f"first_token_{arm}_seconds"] for arm in ("none", "disk"))
    assert f"{none:.1f} s without memory, {disk:.1f} s with the table" in SECTION
    ratios = [value for name, value in CHECKED.items() if name.endswith("_over_measured")]
    assert f"{min(ratios):.2f} to {max(ratios):.2f} times as long" in SECTION
    assert f"{MEASURED['disk_rows_per_second']:,.0f} cold rows a second" in SECTION
    within = sum(abs(value - 1) <= 0.15 for value in ratios)
    assert f"{within} of {len(ratios)} within 15 %" in SECTION


def test_what_is_said_of_the_aim_is_that_of_the_result():
    said = " ".join(SECTION.split("**The aim was 0.99**")[1].split("\n- ")[0].split())
    for name in ("cached_over_ram", "none_there_over_none"):
        for backbone in ("0_3B", "1_2B"):
            key = f"{backbone}_decode_b1_{name}"
            low, high = MEASURED[f"{key}_low"], MEASURED[f"{key}_high"]
            assert f"{MEASURED[key]:.2f} ({low:.2f}–{high:.2f})" in said


def test_the_readme_quotes_the_results():
    gathered = json.loads((ROOT / "results" / "gather.json").read_text())["summary"]
    small, large = (MEASURED[f"{each}_decode_b1_cached_over_ram"] for each in ("0_3B", "1_2B"))
    readme = (ROOT / "README.md").read_text()
    assert f"{small:.2f} (0.3B) and {large:.2f} (1.2B)" in readme
    assert f"{gathered['cold_disk_over_fio']:.2f}x fio's rate" in readme
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    assert f"{gathered['cold_disk_over_fio']:.2f}x as many rows" in page
    assert f"{gathered['cold_disk_over_fetch']:.1f}x as many as `Store.fetch`" in page
