"""A second moment per row and nothing else, for tables whose two moments would not fit."""

from collections.abc import Iterable

import torch
from torch import Tensor

from engram_lm.errors import ConfigError, number
from engram_lm.memory.table import Table
from engram_lm.train.row_optimizer import SQUARE, Move, RowOptimizer


class RowwiseRMSprop(RowOptimizer):
    """RMSprop with one float32 per row: the mean square of the row's gradients.

    With g the gradient of a row, where it is touched::

        v <- beta2 * v + (1 - beta2) * mean(g^2)      (v <- mean(g^2) the first time)
        w <- w - lr * g / (sqrt(v) + eps)

    The second moment of row-wise Adam (FBGEMM's PARTIAL_ROWWISE_ADAM), without a first. A row's own
    first gradient takes the place of Adam's bias correction, which knows the count of all steps
    only: a row first touched late would be moved 1 / sqrt(1 - beta2) times too far, and most rows
    are touched few times. Moments take 4 bytes per row.
    """

    def __init__(
        self,
        tables: Iterable[Table],
        lr: float = 1e-3,
        beta2: float = 0.999,
        eps: float = 1e-8,
        *,
        seed: int = 0,
    ) -> None:
        if not 0 <= number("beta2", beta2) < 1:
            raise ConfigError(f"beta2={beta2}: at least 0 and below 1")
        super().__init__(tables, {"lr": lr, "beta2": beta2, "eps": eps}, seed)

    def _moments(self, table: Table) -> dict[str, tuple[int, ...]]:
        return {SQUARE: (len(table.weight), 1)}

    def _move(
        self, state: dict[str, Tensor], rows_U: Tensor, gradient_UE: Tensor, square_UE: Tensor
    ) -> Move:
        (group,) = self.param_groups
        mean_U1 = gradient_UE.square().mean(1, keepdim=True)
        average_U1 = torch.lerp(square_UE, mean_U1, 1 - group["beta2"])
        torch.where(square_UE == 0, mean_U1, average_U1, out=square_UE)
        return Move(gradient_UE, torch.sqrt(square_UE).add_(group["eps"]), group["lr"])
