"""The packed tables of the conformance kit are what its script writes, and hold what it says."""

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engram_lm.store.disk import Disk
from engram_lm.store.packed import Packed

KIT = Path(__file__).parents[1] / "conformance"
EXPECTED = json.loads((KIT / "packed/expected.json").read_text())


def test_the_script_writes_them_again_byte_for_byte(tmp_path):
    script = [sys.executable, KIT / "packed.py", "--out", tmp_path / "packed"]
    subprocess.run(script, check=True, capture_output=True)
    found = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*.*")}
    committed = {p.relative_to(KIT): p.read_bytes() for p in (KIT / "packed").rglob("*.*")}
    assert found == committed and len(found) == 5


@pytest.mark.parametrize("name", EXPECTED)
def test_rows_lie_where_the_format_says(name):
    """Read with nothing but the page on the format at hand."""
    said, content = EXPECTED[name], (KIT / "packed" / name).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    rows, row_bytes = json.loads(content[8 : 8 + length])["rows"]["shape"]
    table = content[8 + length :]
    assert [rows, row_bytes] == said["shape"] and (8 + length) % 4096 == 0
    assert hashlib.sha256(content).hexdigest() == said["file_sha256"]
    assert hashlib.sha256(table).hexdigest() == said["rows_sha256"]
    for row, digits in said["rows"].items():
        begin = int(row) * row_bytes
        assert table[begin : begin + row_bytes].hex() == digits


@pytest.mark.parametrize("name", EXPECTED)
def test_this_library_reads_them_so(name):
    packed = Packed.open(KIT / "packed" / name)
    rows = {int(row): digits for row, digits in EXPECTED[name]["rows"].items()}
    with Disk(packed.label.format, [[packed.region]]) as store:
        found_MR = store.gather(torch.tensor(list(rows)))
    assert [row.numpy().tobytes().hex() for row in found_MR] == list(rows.values())
    assert not list(packed.damaged())
