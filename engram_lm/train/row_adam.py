"""Adam for table rows."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from engram_lm.errors import ConfigError, instance, number
from engram_lm.memory.table import Table
from engram_lm.train.row_optimizer import SQUARE, Move, RowOptimizer

MEAN = "exp_avg"


class RowAdam(RowOptimizer):
    """torch.optim.Adam's update on the rows in each table's `row_gradient`, bit for bit.

    Bias correction and eps are Adam's, by the count of all steps (torch.optim.SparseAdam's eps is
    not). Where every row is touched in every step, it is Adam. Moments take 2 values per table
    value.
    """

    def __init__(
        self,
        tables: Iterable[Table],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        seed: int = 0,
    ) -> None:
        instance("betas", betas, tuple, list)
        if len(betas) != 2 or not all(0 <= number("betas", beta) < 1 for beta in betas):
            raise ConfigError(f"betas={betas}: two numbers, each at least 0 and below 1")
        super().__init__(tables, {"lr": lr, "betas": betas, "eps": eps}, seed)

    def _moments(self, table: Table) -> dict[str, tuple[int, ...]]:
        return {MEAN: tuple(table.weight.shape), SQUARE: tuple(table.weight.shape)}

    def _move(
        self, state: dict[str, Tensor], rows_U: Tensor, gradient_UE: Tensor, square_UE: Tensor
    ) -> Move:
        (group,) = self.param_groups
        (beta1, beta2), step = group["betas"], state["step"].item()
        # The order of operations is torch's (_single_tensor_adam), so that the bits are too.
        mean_UE = state[MEAN].index_select(0, rows_U).lerp_(gradient_UE, 1 - beta1)
        state[MEAN].index_copy_(0, rows_U, mean_UE)
        square_UE.mul_(beta2).addcmul_(gradient_UE, gradient_UE, value=1 - beta2)
        scale_UE = torch.sqrt(square_UE).div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        return Move(mean_UE, scale_UE, group["lr"] / (1 - beta1**step))
