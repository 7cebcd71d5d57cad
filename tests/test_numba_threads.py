"""numba's threads and torch's: in processes of their own, because numba starts its threads once."""

import subprocess
import sys

import pytest

pytest.importorskip("numba")

SETTING = """
import numba, torch
torch.set_num_threads({threads})
"""

ROWS = """
from engram_lm import Table
from engram_lm.train.row_adam_numba import CompiledRowAdam
assert torch.get_num_threads() == {threads}
table = Table(100, 4)
table.accumulate(torch.arange(9), torch.ones(9, 4))
CompiledRowAdam([table], lr=0.1).step()
"""

ADDRESSES = """
from engram_lm import CanonicalMap, CompiledAddresses, Specification
from engram_lm.memory.ngrams_numba import POSITIONS_PER_THREAD
assert torch.get_num_threads() == {threads}
rules = Specification(layers=(0,), rows_per_head=(50,), heads=2, pad_id=0)
ids_BT = torch.zeros(3, POSITIONS_PER_THREAD, dtype=torch.int64)
CompiledAddresses(rules, CanonicalMap(torch.arange(9))).rows(ids_BT)
"""


@pytest.mark.parametrize(
    ("code", "threads"),
    [(ROWS, 1), (ROWS, 3), (ADDRESSES, 3)],
    ids=["rows1", "rows3", "addresses3"],
)
def test_compiled_loops_take_torchs_number_of_threads_and_leave_it(code, threads):
    told = "print(torch.get_num_threads(), numba.get_num_threads(), numba.config.NUMBA_NUM_THREADS)"
    done = subprocess.run(
        [sys.executable, "-c", (SETTING + code).format(threads=threads) + told],
        check=True,
        capture_output=True,
        text=True,
    )
    torchs, numbas, cores = map(int, done.stdout.split())
    assert torchs == threads and numbas == min(threads, cores)
