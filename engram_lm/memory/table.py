"""The trainable table of one layer: one address space for all its heads, and its row gradient.

Shapes: M rows asked for, U distinct rows among them, E values per row, R bytes per row.
A dense gradient of a table would be as large as the table, and a sparse one in `.grad` is refused
by clip_grad_norm_ and made dense by DDP. So the gradient never goes there: the lookup's backward
leaves the touched rows here, merged, and the row optimiser takes them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engram_lm.errors import ConfigError, instance, shown, whole_number
from engram_lm.memory import untaken
from engram_lm.memory.offload import held
from engram_lm.memory.rows import Request, RowFormat, RowStore, select


class RowGradient(NamedTuple):
    """rows_U: distinct row numbers, ascending, int64. values_UE: the summed gradient of each,
    float32 or wider."""

    rows_U: Tensor
    values_UE: Tensor

    @classmethod
    def of(cls, rows_M: Tensor, values_ME: Tensor) -> "RowGradient":
        """Of rows in any order, repeats summed in the order given."""
        merged = Merged.of(rows_M)
        return cls(merged.rows_U, merged.sum(values_ME))

    @classmethod
    def sum(cls, gradients: Sequence["RowGradient"]) -> "RowGradient":
        """Of all of them; the same bits for the same order."""
        return cls.of(
            torch.cat([gradient.rows_U for gradient in gradients]),
            torch.cat([gradient.values_UE for gradient in gradients]),
        )


class Merged(NamedTuple):
    """Rows asked for, each once, and the way back to the requests."""

    rows_U: Tensor
    """Ascending."""
    position_M: Tensor
    """Where in rows_U each request is."""
    order_M: Tensor
    """Requests by row; those for one row in the order asked."""
    first_U: Tensor
    """Where in order_M each row's requests begin."""

    @classmethod
    def of(cls, rows_M: Tensor) -> "Merged":
        """Duplicates are merged before anything is fetched or sent."""
        ascending_M, order_M = _sort(rows_M)
        rows_U, index_M, counts_U = torch.unique_consecutive(
            ascending_M, return_inverse=True, return_counts=True
        )
        position_M = torch.empty_like(order_M).scatter_(0, order_M, index_M)
        return cls(rows_U, position_M, order_M, counts_U.cumsum(0) - counts_U)

    def sum(self, values_ME: Tensor) -> Tensor:
        """(M, E) -> (U, E), repeats summed in the order asked, in float32 or wider."""
        values_ME = values_ME.to(torch.promote_types(values_ME.dtype, torch.float32))
        # An eighth of index_add_'s time on a CPU, to the same bits.
        values_UE: Tensor = torch.embedding_bag(values_ME, self.order_M, self.first_U, mode=_SUM)[0]
        return values_UE


_SUM = 0
"""Of torch.embedding_bag's modes."""


def _sort(rows_M: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ascending and what `torch.sort(stable=True)` says of their order, a CPU's way.

    Row and place share one integer, so that it is values that are sorted, which NumPy does with
    vector instructions: a quarter of the time.
    """
    bits = len(rows_M).bit_length()
    if rows_M.device.type != "cpu" or not bits or int(rows_M.max()) >= 2 ** (63 - bits):
        ascending_M, order_M = torch.sort(rows_M, stable=True)
        return ascending_M, order_M
    keys_M = (rows_M << bits) | torch.arange(len(rows_M))
    keys_M.numpy().sort()
    return keys_M >> bits, keys_M & (2**bits - 1)


_UNALLOCATED: ContextVar[bool] = ContextVar("tables without memory", default=False)


@contextmanager
def unallocated() -> Iterator[None]:
    """Inside, tables are made with a shape and no memory, for `shard_tables` to give them some."""
    token = _UNALLOCATED.set(True)
    try:
        yield
    finally:
        _UNALLOCATED.reset(token)


class Table(nn.Module, RowStore):
    """`rows` rows of `dim` values as a parameter, and a RowStore over it.

    rows may pass 2^31 and rows * dim certainly does: everything that counts or points is int64.
    """

    first_row = 0
    """Number of the weight's first row among all rows; a shard starts further on."""

    def __init__(
        self,
        rows: int,
        dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        rows, dim = whole_number("rows", rows, least=0), whole_number("dim", dim, least=1)
        instance("dtype", dtype, torch.dtype, type(None))
        try:
            device = None if device is None else torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ConfigError(f"device={shown(device)}: a device of torch is needed") from error
        device = "meta" if _UNALLOCATED.get() else device
        self.rows = rows
        self.weight = nn.Parameter(torch.empty(rows, dim, dtype=dtype, device=device))
        self.row_gradient: RowGradient | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new rows, of standard deviation 0.02."""
        nn.init.normal_(self.weight, std=0.02)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no gradient, as copies of parameters have none."""
        state = dict(self.__dict__)
        if "row_gradient" in state:
            state["row_gradient"] = None
        return state

    @property  # what .to(dtype) makes of the parameter shows here
    def format(self) -> RowFormat:  # type: ignore[override]
        """How a row's bytes are read: values of the parameter's dtype, no scales."""
        return RowFormat(dtype=self.weight.dtype, dim=self.weight.shape[1])

    def gather(self, rows_M: Tensor) -> Tensor:
        """(M,) int64 -> (M, R) uint8, on the device of rows_M wherever the rows are."""
        weight = held(self, "weight")
        values_ME = select(weight, rows_M.to(weight.device)).to(rows_M.device, self.weight.dtype)
        return values_ME.view(torch.uint8)

    def prefetch(self, rows_M: Tensor) -> None:
        """Nothing to do: the rows are in memory."""

    def close(self) -> None:
        """Nothing to give back: a parameter stays readable, its owner may go on training it."""

    def start(self, rows_M: Tensor) -> Request:
        """Asks for rows, (M,) int64. With a gradient to come, each is read once."""
        if self.is_trained():
            traced = torch.compiler.is_exporting()
            return Traced(self, rows_M) if traced else TrainedRead(self, Merged.of(rows_M))
        return super().start(rows_M)

    def is_trained(self) -> bool:
        """Whether what is read now will leave a gradient. Looks after one that is there already."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return False
        if not torch.compiler.is_compiling():
            untaken.before_forward(self)
        return True

    def accumulate(self, rows_M: Tensor, values_ME: Tensor) -> None:
        """Adds the gradient of these rows, repeats summed, to what earlier backward passes left."""
        self.add_gradient(RowGradient.of(rows_M, values_ME))

    def add_gradient(self, gradient: RowGradient) -> None:
        """The same for rows that are distinct and ascending."""
        if self.row_gradient is not None:
            gradient = RowGradient.sum([self.row_gradient, gradient])
        self.row_gradient = gradient

    @property
    def holds_gradient(self) -> bool:
        """Whether a backward pass has left one; no other worker is asked."""
        return self.row_gradient is not None

    @property
    def local_gradient(self) -> RowGradient | None:
        """What of it is here already."""
        return self.row_gradient

    def gradient_norm(self) -> Tensor:
        """Of the row gradient; 0 where there is none."""
        if self.row_gradient is None:
            return self.weight.new_zeros(())
        return torch.linalg.vector_norm(self.row_gradient.values_UE)

    def extra_repr(self) -> str:
        return f"rows={self.weight.shape[0]}, dim={self.weight.shape[1]}"


class TrainedRead:
    """A request whose gradient goes to the table, not to `.grad`.

    A table whose rows live elsewhere answers `fetch` and `give` in its own way.
    """

    def __init__(self, table: Table, merged: Merged) -> None:
        self.table, self.merged = table, merged

    def wait(self) -> Tensor:
        values: Tensor = _Differentiable.apply(self.table.weight, self)
        return values

    def fetch(self) -> Tensor:
        """Values of the merged rows, (U, E)."""
        return self.table.format.decode(self.table.gather(self.merged.rows_U))

    def give(self, gradient_UE: Tensor) -> None:
        """Takes the summed gradient of each merged row. ConfigError where accelerate has offloaded
        the table: nobody would write its rows."""
        if self.table.weight.is_meta:
            raise ConfigError(
                "a table is offloaded (device_map, cpu_offload, disk_offload) and cannot be "
                "trained; open the model without, or freeze the table"
            )
        self.table.add_gradient(RowGradient(self.merged.rows_U, gradient_UE))


class Traced:
    """A request in a graph that is exported: how many rows are distinct is not known there, so they
    are read one by one, and who trains the exported graph finds their gradient in `.grad`."""

    def __init__(self, table: Table, rows_M: Tensor) -> None:
        self.table, self.rows_M = table, rows_M

    def wait(self) -> Tensor:
        return nn.functional.embedding(self.rows_M, self.table.weight)


class _Differentiable(torch.autograd.Function):
    """The weight is an argument only so that a gradient is asked for; it gets none in `.grad`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, read: TrainedRead) -> Tensor:
        ctx.read = read
        return read.fetch().index_select(0, read.merged.position_M)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        if not torch.compiler.is_compiling():
            untaken.before_adding(ctx.read.table)
        ctx.read.give(ctx.read.merged.sum(grads[0]))
        return None, None
