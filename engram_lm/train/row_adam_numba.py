"""RowAdam for float32 rows on a CPU, compiled: the fast twin of row_adam.py, equal bit for bit.

Shapes: R rows of the table, U rows touched, E values per row.
torch reads three arrays row by row into buffers and writes them back row by row, which is most of
its time. Here rows are moved where they are. The square root stays torch's, whose last bit is not
everywhere IEEE's; a product and sum are rounded once where torch's AVX2 and AVX-512 kernels do so.

Importing this module needs numba (the extra `fast`) and compiles, some seconds the first time.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit, prange
from numba.extending import intrinsic
from torch import Tensor

from engram_lm.memory.numba_threads import follow_torch
from engram_lm.memory.table import Table
from engram_lm.train.row_adam import MEAN, RowAdam
from engram_lm.train.row_optimizer import SQUARE

Float32s = npt.NDArray[np.float32]
Int64s = npt.NDArray[np.int64]


class CompiledRowAdam(RowAdam):
    """RowAdam, compiled for float32 rows on a CPU; other rows take its torch path."""

    def _block(
        self, table: Table, state: dict[str, Tensor], rows_U: Tensor, gradient_UE: Tensor
    ) -> tuple[Tensor | int, Tensor | float]:
        weight_RE = table.weight.detach()
        if weight_RE.dtype != torch.float32 or weight_RE.device.type != "cpu":
            return super()._block(table, state, rows_U, gradient_UE)
        follow_torch()
        (group,) = self.param_groups
        (beta1, beta2), step = group["betas"], state["step"].item()
        mean_RE, rows, gradient_UE = state[MEAN].numpy(), rows_U.numpy(), gradient_UE.contiguous()
        scale_UE = torch.empty_like(gradient_UE)
        newly = _average(
            mean_RE,
            state[SQUARE].numpy(),
            rows,
            gradient_UE.numpy(),
            scale_UE.numpy(),
            *(np.float32(share) for share in (1 - beta1, beta2, 1 - beta2)),
        )
        scale_UE.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        size = np.float32(-group["lr"] / (1 - beta1**step))
        return newly, _move(weight_RE.numpy(), mean_RE, rows, scale_UE.numpy(), size)


def _define_fma(context: Any, a: Any, b: Any, c: Any) -> Any:

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return a(a, b, c), generate


_fma: Any = intrinsic(_define_fma)
"""a * b + c, rounded once."""


@njit(parallel=True, cache=True)
def _average(
    mean_RE: Float32s,
    square_RE: Float32s,
    rows_U: Int64s,
    gradient_UE: Float32s,
    square_UE: Float32s,
    share1: np.float32,
    beta2: np.float32,
    share2: np.float32,
) -> int:
    """Both moments, the second also into square_UE; how many more rows have one."""
    newly = 0
    for index in prange(len(rows_U)):
        row, before, after = rows_U[index], False, False
        for column in range(gradient_UE.shape[1]):
            gradient = gradient_UE[index, column]
            mean, square = mean_RE[row, column], square_RE[row, column]
            if share1 < np.float32(0.5):  # as torch.lerp, which goes from the nearer end
                mean_RE[row, column] = _fma(share1, gradient - mean, mean)
            else:
                mean_RE[row, column] = _fma(mean - gradient, np.float32(1) - share1, gradient)
            before |= square != 0
            square = _fma(share2 * gradient, gradient, square * beta2)
            after |= square != 0
            square_RE[row, column] = square
            square_UE[index, column] = square
        newly += int(after) - int(before)
    return newly


@njit(parallel=True, cache=True)
def _move(
    weight_RE: Float32s,
    mean_RE: Float32s,
    rows_U: Int64s,
    scale_UE: Float32s,
    size: np.float32,
) -> float:
    """weight + size * mean / scale; the sum of the squares of what that changed."""
    squares = 0.0
    for index in prange(len(rows_U)):
        row = rows_U[index]
        for column in range(weight_RE.shape[1]):
            before = weight_RE[row, column]
            value = before + size * mean_RE[row, column] / scale_UE[index, column]
            weight_RE[row, column] = value
            moved = np.float64(value - before)
            squares += moved * moved
    return squares
