"""Merging of repeated requests, and the sum of their gradients, against torch's own functions."""

import pytest
import torch

from engram_lm.memory.table import Merged

REQUESTS = {
    "none": torch.empty(0, dtype=torch.int64),
    "one": torch.tensor([5]),
    "all for one row": torch.full((1000,), 7),
    "many repeats": torch.randint(0, 50, (4099,), generator=torch.Generator().manual_seed(1)),
    "few repeats": torch.randint(0, 2**40, (4099,), generator=torch.Generator().manual_seed(2)),
    "numbers near the end of int64": 2**63 - 1 - torch.arange(4099) % 1000,
}


@pytest.mark.parametrize("rows", REQUESTS.values(), ids=REQUESTS)
def test_merged_rows_and_positions_are_those_of_unique(rows):
    merged = Merged.of(rows)
    rows_U, position_M = torch.unique(rows, return_inverse=True)
    assert torch.equal(merged.rows_U, rows_U) and torch.equal(merged.position_M, position_M)
    assert torch.equal(merged.order_M, torch.argsort(rows, stable=True))
    assert torch.equal(merged.position_M[merged.order_M[merged.first_U]], torch.arange(len(rows_U)))


@pytest.mark.parametrize("rows", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("dim", [1, 3, 8, 80])
def test_repeats_are_summed_in_the_order_asked_bit_for_bit(rows, dim):
    merged, values = Merged.of(rows), torch.randn(len(rows), dim)
    wanted = torch.zeros(len(merged.rows_U), dim)
    wanted.index_add_(0, merged.position_M, values)
    assert torch.equal(merged.sum(values), wanted)


def test_repeats_of_bfloat16_values_are_summed_in_float32():
    rows = REQUESTS["many repeats"]
    merged, values = Merged.of(rows), torch.randn(len(rows), 8).bfloat16()
    assert torch.equal(merged.sum(values), merged.sum(values.float()))
