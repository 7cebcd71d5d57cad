"""docs/serving.md quotes what its benchmarks have measured."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "serving.md").read_text()
HITS = json.loads((ROOT / "results" / "cache_policies.json").read_text())["summary"]
SIZES = ("0.3", "1", "3", "10", "25")


def rows(heading: str) -> dict[str, list[str]]:
    """Of the table with this first column: what a row names in code, and its figures."""
    table = PAGE.split(f"\n| {heading} |")[1].split("\n\n")[0]
    found = re.findall(r"^\| `(.+?)` \|[^|]+\|(.+)\|$", table, flags=re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in found}


def change(key: str, what: str) -> str:
    policies = ("lru_16_ways", "segmented_16_ways")
    return " → ".join(f"{HITS[key.format(policy) + what]:.3f}" for policy in policies)


def test_hit_ratios_of_all_policies_are_those_of_the_result():
    found = rows("policy")
    assert set(found) == {
        name[len("mixed_decode_") : -len("_3_all")]
        for name in HITS
        if re.fullmatch("mixed_decode_.*_3_all", name)
    }
    for policy, cells in found.items():
        wanted = [HITS[f"mixed_decode_{policy}_{size}_all"] for size in SIZES]
        wanted.append(HITS[f"mixed_decode_{policy}_3_cold"])
        assert cells == [f"{value:.3f}" for value in wanted]


def test_hit_ratios_by_order_and_text_are_those_of_the_result():
    for order, cells in rows("order").items():
        assert cells == [change(f"mixed_decode_{{}}_{size}_", order) for size in SIZES]
    for text, cells in rows("text").items():
        assert cells == [change(f"{text}_{{}}_{size}_", "all") for size in ("0.3", "3", "25")]


def test_the_default_finds_more_than_lru_wherever_it_was_replayed():
    pairs = [
        (value, HITS[name.replace("_segmented_16_ways_", "_lru_16_ways_")])
        for name, value in HITS.items()
        if "_segmented_16_ways_" in name and name.endswith("_all")
    ]
    assert len(pairs) == 17
    assert all(now > before for now, before in pairs)


def test_what_the_page_says_of_pinned_rows_is_that_of_the_result():
    for text, words in (("book", "of the\n  book"), ("wordnet", "of WordNet's prose")):
        pinned, default = (
            HITS[f"{text}_decode_{policy}_3_all"] for policy in ("pinned_half", "segmented_16_ways")
        )
        assert f"{words} {pinned:.3f} against {default:.3f}" in PAGE
