"""New rows of a table that depend on a seed and on their row numbers alone.

However a table is cut over workers, its rows are the same bits.
Shapes: N rows, E values per row.
"""

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 16
"""Rows drawn at once, from a generator of their own."""


@torch.no_grad()
def draw_rows(rows_NE: Tensor, *, first_row: int, std: float, seed: tuple[int, ...]) -> None:
    """Fills rows `first_row` on of a table, normal with this deviation.

    Blocks are drawn whole, in float32 on the CPU: a share that begins or ends inside one leaves the
    rest of it away, and every dtype and device gets the same values.
    """
    last_row, dim = first_row + len(rows_NE), rows_NE.shape[1]
    for block in range(first_row // BLOCK, -(-last_row // BLOCK)):
        state = np.random.SeedSequence((*seed, block)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        drawn = torch.empty(BLOCK, dim).normal_(0.0, std, generator=generator)
        start = block * BLOCK
        part = drawn[max(first_row - start, 0) : last_row - start]
        to = max(start - first_row, 0)
        rows_NE[to : to + len(part)] = part
