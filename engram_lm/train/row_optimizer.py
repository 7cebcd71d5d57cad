"""What the optimisers of table rows have in common: only rows that a step has touched are read,
moved and written, and what they need is kept per row.

Shapes: U rows touched, E values per row.
"""

import math
import mmap
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engram_lm.errors import ConfigError, instance, number, whole_number
from engram_lm.memory import untaken
from engram_lm.memory.table import RowGradient, Table
from engram_lm.train.rounding import round_to_bf16
from engram_lm.train.sharded_table import check_shared

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SQUARE = "exp_avg_sq"
"""Name of the second moment; as in torch.optim.Adam."""

UNSCALED = (
    "GradScaler: it divides the gradients in .grad by its scale and looks for infinities there, "
    "and row gradients are not in it; train in bfloat16, which needs no scaler"
)

CPU_BLOCK, GPU_BLOCK = 2**16, 2**24
"""Values moved at a time: on a CPU they stay in its caches between being read and written, and
nowhere does the space they take grow with the rows of a step."""


class Move(NamedTuple):
    """A step of some rows: values - size * direction / scale."""

    direction_UE: Tensor
    scale_UE: Tensor
    size: float


class RowOptimizer(torch.optim.Optimizer, ABC):
    """Moves the rows in each table's `row_gradient`; all others keep values and moments, bit for
    bit. No weight decay.

    Cost: rows touched, not rows there. State per table: `step`, a count, and moments of shape
    (rows, ...) in float32, pages of which take memory from when a row in them is first touched.
    Tables are float32 or bfloat16 (then rounded stochastically, by `seed`; see rounding.py);
    ConfigError for any other. Frozen tables are left out by who makes this.
    """

    def __init__(self, tables: Iterable[Table], defaults: dict[str, Any], seed: int) -> None:
        instance("tables", tables, Iterable)
        self.tables, self.seed = list(tables), whole_number("seed", seed)
        for table in self.tables:
            instance("a table", table, Table)
        if not self.tables:
            raise ConfigError("tables=[]: at least one is needed")
        for name in ("lr", "eps"):
            defaults[name] = number(name, defaults[name])
        check_shared(self.tables)
        self._touched: dict[Table, tuple[Tensor, Tensor]] = {}
        self._update_rms: dict[Table, Tensor] = {}
        for table in self.tables:
            if table.weight.dtype not in DTYPES:
                raise ConfigError(
                    f"a table of {table.weight.dtype}: float32 and bfloat16 can be trained"
                )
        if not (defaults["lr"] >= 0 and defaults["eps"] > 0):
            raise ConfigError(
                f"lr={defaults['lr']}, eps={defaults['eps']}: lr is at least 0, eps above"
            )
        super().__init__([table.weight for table in self.tables], defaults)
        for table in self.tables:
            untaken.trains(table, self)

    @abstractmethod
    def _moments(self, table: Table) -> dict[str, tuple[int, ...]]:
        """Shape of each per-row state."""

    @abstractmethod
    def _move(
        self, state: dict[str, Tensor], rows_U: Tensor, gradient_UE: Tensor, square_UE: Tensor
    ) -> Move:
        """Takes the gradient into the moments, the second one, `square_UE`, in place."""

    def materialise(self) -> None:
        """Makes the state of every table, as the first step would: to be loaded into."""
        for table in self.tables:
            self._state(table)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimiser's, but moments stay float32 where the table is bfloat16."""
        super().load_state_dict({**state_dict, "state": {}})
        for index, table in enumerate(self.tables):
            state = state_dict["state"].get(index, {})
            on = {name: "cpu" if name == "step" else table.weight.device for name in state}
            self.state[table.weight] = {name: state[name].to(on[name]) for name in state}

    def touched(self) -> list[int]:
        """Of each of `tables`, how many rows have been moved so far: whose second moment is not 0.

        Counted on the way; anew, once, after another state was loaded.
        """
        return [int(self._touched_rows(table)) for table in self.tables]

    def update_rms(self) -> list[float]:
        """Of each of `tables`, the root mean square of the last step over the rows it moved, before
        rounding; 0 where it moved none."""
        return [float(self._update_rms.get(table, 0.0)) for table in self.tables]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the row gradients."""
        for table in self.tables:
            untaken.cleared(table)
            table.row_gradient = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every table that has a row gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update_rms.clear()
        for table in self.tables:
            gradient = table.row_gradient
            if gradient is not None:
                self._step(table, gradient)
                untaken.took(table)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        raise ConfigError(UNSCALED)  # GradScaler looks here before it steps an optimiser

    def _step(self, table: Table, gradient: RowGradient) -> None:
        touched, state = self._touched_rows(table), self._state(table)
        state["step"] += 1
        squares = torch.zeros((), device=table.weight.device)
        for rows_U, gradient_UE in _blocks(gradient):
            newly, squared = self._block(table, state, rows_U, gradient_UE)
            touched += newly
            squares += squared
        self._update_rms[table] = (squares / max(1, gradient.values_UE.numel())).sqrt()

    def _block(
        self, table: Table, state: dict[str, Tensor], rows_U: Tensor, gradient_UE: Tensor
    ) -> tuple[Tensor | int, Tensor | float]:
        """Moves some rows: how many more have a second moment, and the sum of squared updates."""
        weight = table.weight
        square_UE = state[SQUARE].index_select(0, rows_U)
        before = _occupied(square_UE)
        direction_UE, scale_UE, size = self._move(state, rows_U, gradient_UE, square_UE)
        state[SQUARE].index_copy_(0, rows_U, square_UE)
        before_UE = weight.index_select(0, rows_U).to(square_UE.dtype)
        values_UE = torch.addcdiv(before_UE, direction_UE, scale_UE, value=-size)
        squares = torch.linalg.vector_norm(before_UE.sub_(values_UE)).square()
        if weight.dtype == torch.bfloat16:
            key = (self.seed, self.tables.index(table), int(state["step"]))
            values_UE = round_to_bf16(values_UE, rows_U + table.first_row, key)
        weight.index_copy_(0, rows_U, values_UE)
        return _occupied(square_UE) - before, squares

    def _state(self, table: Table) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[table.weight]
        if not state:
            state["step"] = torch.zeros(())
            for name, shape in self._moments(table).items():
                state[name] = _zeros(shape, table.weight)
            count = torch.zeros((), dtype=torch.int64, device=table.weight.device)
            self._touched[table] = (state[SQUARE], count)
        return state

    def _touched_rows(self, table: Table) -> Tensor:
        square_RE = self._state(table)[SQUARE]
        counted, count = self._touched.get(table, (None, square_RE))
        if counted is not square_RE:  # loaded since
            per_block = max(1, CPU_BLOCK // square_RE.shape[1])
            blocks = [_occupied(block_UE) for block_UE in square_RE.split(per_block)]
            count = torch.stack(blocks).sum()
            self._touched[table] = (square_RE, count)
        return count


def _blocks(gradient: RowGradient) -> Iterator[tuple[Tensor, Tensor]]:
    rows_U, values_UE = gradient
    block = CPU_BLOCK if rows_U.device.type == "cpu" else GPU_BLOCK
    rows = max(1, block // values_UE.shape[1])
    return zip(rows_U.split(rows), values_UE.split(rows), strict=True)


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    values = math.prod(shape)
    if like.device.type != "cpu" or not values or sys.platform == "win32":
        return torch.zeros(shape, dtype=dtype, device=like.device)
    # torch.zeros writes every page, and NumPy asks for pages of 2 MB, of which every one would soon
    # hold a row; the system's own are zero, and take memory from when they are first used.
    pages = mmap.mmap(-1, values * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _occupied(square_UE: Tensor) -> Tensor:
    """How many rows are not all zero."""
    # A product with ones is many times faster than a sum, a maximum or `any` along short rows.
    return torch.count_nonzero(square_UE @ square_UE.new_ones(square_UE.shape[1]))
