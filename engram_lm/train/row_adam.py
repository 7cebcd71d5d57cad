"""Adam for table rows: reads, moves and writes only the rows that a step has touched."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from engram_lm.memory.table import Table
from engram_lm.train.sharded_table import check_shared


class RowAdam(torch.optim.Optimizer):
    """torch.optim.Adam's update on the rows in each table's `row_gradient`, bit for bit.

    Bias correction and eps are Adam's, by the count of all steps (torch.optim.SparseAdam's eps is
    not). Untouched rows keep values and moments; where every row is touched, it is Adam.
    Cost: rows touched, not rows there. Moments take 2 values per table value, zero pages until
    used.
    """

    def __init__(
        self,
        tables: Iterable[Table],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.tables = list(tables)
        check_shared(self.tables)
        defaults = {"lr": lr, "betas": betas, "eps": eps}
        super().__init__([table.weight for table in self.tables], defaults)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the row gradients."""
        for table in self.tables:
            table.row_gradient = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every table that has a row gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        for table in self.tables:
            if table.row_gradient is not None:
                self._step(table, group)
        return loss

    def _step(self, table: Table, group: dict[str, Any]) -> None:
        assert table.row_gradient is not None
        rows_U, gradient_UE = table.row_gradient
        state = self.state[table.weight]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(table.weight)
            state["exp_avg_sq"] = torch.zeros_like(table.weight)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        step = state["step"].item()
        # The order of operations is torch's (_single_tensor_adam), so that the bits are too.
        mean_UE = state["exp_avg"][rows_U].lerp_(gradient_UE, 1 - beta1)
        square_UE = state["exp_avg_sq"][rows_U].mul_(beta2)
        square_UE.addcmul_(gradient_UE, gradient_UE, value=1 - beta2)
        step_size = group["lr"] / (1 - beta1**step)
        scale_UE = (square_UE.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
        _write(state["exp_avg"], rows_U, mean_UE)
        _write(state["exp_avg_sq"], rows_U, square_UE)
        values_UE = table.weight[rows_U].addcdiv_(mean_UE, scale_UE, value=-step_size)
        _write(table.weight, rows_U, values_UE)


def _write(table: Tensor, rows_U: Tensor, values_UE: Tensor) -> None:
    table.index_copy_(0, rows_U, values_UE)
