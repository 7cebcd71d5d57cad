"""The compiled row optimiser against its torch twin."""

import pytest
import torch

from engram_lm.memory.table import Table
from engram_lm.train.row_adam import RowAdam

pytest.importorskip("numba")

from engram_lm.train.row_adam_numba import CompiledRowAdam


@pytest.mark.parametrize("dim", [1, 7, 8, 80])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.3, 0.999)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_row_adam_equals_row_adam_bit_for_bit(dim, betas, dtype):
    tables = [Table(5000, dim, dtype=dtype) for _ in range(2)]
    tables[1].load_state_dict(tables[0].state_dict())
    plain, compiled = (
        make([table], lr=1e-2, betas=betas)
        for make, table in zip((RowAdam, CompiledRowAdam), tables, strict=True)
    )
    for step in range(6):
        rows = torch.randint(5000, (3001,)).unique()
        gradient = torch.randn(len(rows), dim) * 10.0 ** (step - 3)
        gradient[::5] = 0.0
        for table, optimizer in zip(tables, (plain, compiled), strict=True):
            table.accumulate(rows, gradient)
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(tables[0].weight, tables[1].weight)
        assert plain.touched() == compiled.touched()
        # The same float32 differences, summed in float64 and in float32.
        assert compiled.update_rms() == pytest.approx(plain.update_rms(), rel=1e-5)
    states = [plain.state[tables[0].weight], compiled.state[tables[1].weight]]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
