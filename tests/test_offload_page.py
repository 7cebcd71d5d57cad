"""docs/serving.md quotes, under "What it costs", what benchmarks/offload.py has measured."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECTION = (ROOT / "docs" / "serving.md").read_text().split("## What it costs\n")[1]
SECTION = SECTION.split("\n## ")[0]
SUMMARY = json.loads((ROOT / "results" / "offload.json").read_text())["summary"]
COLUMNS = {
    "none_tokens_per_second": ".1f",
    "ram_over_none": ".2f",
    "cached_over_ram": ".2f",
    "disk_over_ram": ".2f",
    "sync_over_ram": ".2f",
    "cached_bound": ".2f",
    "cached_miss_share": ".0%",
    "cached_wait_ms": ".1f",
}


def test_every_cell_of_the_benchmark_is_in_the_table():
    shown = {
        name: [cell.strip() for cell in cells.split("|")]
        for name, cells in re.findall(r"^\| `(.+?)` \|(.+)\|$", SECTION, flags=re.MULTILINE)
    }
    cells = {name.removesuffix("_ram_over_none") for name in SUMMARY if "ram_over_none" in name}
    assert set(shown) == cells
    for cell in cells:
        assert shown[cell] == [f"{SUMMARY[f'{cell}_{name}']:{f}}" for name, f in COLUMNS.items()]


def test_the_budget_was_kept():
    for backbone in ("0_3B", "1_2B"):
        without = SUMMARY[f"{backbone}_peak_without_rows"]
        limit = without + SUMMARY[f"{backbone}_budget"] + 64 * 2**20
        assert SUMMARY[f"{backbone}_peak"] <= SUMMARY[f"{backbone}_limit"] == limit
