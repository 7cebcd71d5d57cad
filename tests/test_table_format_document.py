"""docs/table-format.md says what the code does and what results/ hold."""

import json
from pathlib import Path

from engram_lm.memory.rows import DTYPES, RowFormat
from engram_lm.store import hot, pack, packed

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "table-format.md").read_text()


def test_costs_of_row_dtypes_are_those_of_their_result():
    result = json.loads((ROOT / "results" / "row_dtypes.json").read_text())["summary"]
    for name in DTYPES:
        size, bpb, cost, error = (
            result[f"{name}_{part}"] for part in ("row_bytes", "bpb", "cost_bpb", "cost_bpb_se")
        )
        assert f"| {name} | {size} | {bpb:.5f} | {cost:+.5f} ± {error:.5f} |" in PAGE
    assert f"{result['memory_off_bpb']:.5f} bits per byte" in PAGE
    assert f"{result['tokens']:,} tokens" in PAGE


def test_every_key_and_size_of_the_page_is_that_of_the_code():
    keys = [line.split("`")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    assert tuple(keys) == (*packed._KEYS, packed.HOT_KEY)
    sizes = [RowFormat.named(name, 256).row_bytes for name in DTYPES]
    assert sizes == [1024, 512, 512, 264, 272, 144]
    assert "| none | 1024, 512, 512 |" in PAGE
    for size in sizes[3:]:
        assert f"| {size} |\n" in PAGE
    assert f"a multiple of {packed.PAGE} " in PAGE and packed.BLOCK_BYTES == 2**20
    assert f"a multiple of {hot.MULTIPLE};" in PAGE and hot.NUMBER_BYTES == 8
    assert f"`{hot.NUMBERS}`" in PAGE and f"`{hot.COPIES}`" in PAGE
    assert f"after each {pack.COMMIT_BLOCKS} the data are flushed" in PAGE
