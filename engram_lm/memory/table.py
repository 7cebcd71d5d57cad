"""The trainable table of one layer: one address space for all its heads, and its row gradient.

Shapes: M rows asked for, U distinct rows among them, E values per row, R bytes per row.
A dense gradient of a table would be as large as the table, and a sparse one in `.grad` is refused
by clip_grad_norm_ and made dense by DDP. So the gradient never goes there: the lookup's backward
leaves the touched rows here, merged, and the row optimiser takes them.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from engram_lm.memory.rows import RowFormat


class RowGradient(NamedTuple):
    """rows_U: distinct row numbers, ascending, int64. values_UE: the summed gradient of each."""

    rows_U: Tensor
    values_UE: Tensor


class Table(nn.Module):
    """`rows` rows of `dim` values as a parameter, and a RowStore over it.

    rows may pass 2^31 and rows * dim certainly does: everything that counts or points is int64.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim, dtype=dtype, device=device))
        self.row_gradient: RowGradient | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new rows, of standard deviation 0.02."""
        nn.init.normal_(self.weight, std=0.02)

    @property
    def format(self) -> RowFormat:
        """How a row's bytes are read: values of the parameter's dtype, no scales."""
        return RowFormat(dtype=self.weight.dtype, dim=self.weight.shape[1])

    def gather(self, rows_M: Tensor) -> Tensor:
        """(M,) int64 -> (M, R) uint8."""
        return self.weight.detach().index_select(0, rows_M).view(torch.uint8)

    def prefetch(self, rows_M: Tensor) -> None:
        """Nothing to do: the rows are in memory."""

    def close(self) -> None:
        """Nothing to give back."""

    def accumulate(self, rows_M: Tensor, values_ME: Tensor) -> None:
        """Adds the gradient of these rows, repeats summed, to what earlier backward passes left."""
        if self.row_gradient is not None:
            rows_M = torch.cat([self.row_gradient.rows_U, rows_M])
            values_ME = torch.cat([self.row_gradient.values_UE, values_ME])
        rows_U, position_M = torch.unique(rows_M, return_inverse=True)
        values_UE = values_ME.new_zeros(len(rows_U), values_ME.shape[1])
        self.row_gradient = RowGradient(rows_U, values_UE.index_add_(0, position_M, values_ME))

    def extra_repr(self) -> str:
        return f"rows={self.weight.shape[0]}, dim={self.weight.shape[1]}"
