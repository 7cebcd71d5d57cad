"""A table whose rows are owned by the workers of a group, each a contiguous range of them.

Shapes: W workers of the group, M rows asked for, U distinct rows among them, R rows that others
ask of this worker, E values per row.
Requests are merged; row numbers go out to their owners, rows come back, and in backward gradients
go out the same way. All of it runs beside the model: a forward pass asks for the rows of every
layer before its first block and waits at each layer, and gradients are waited for when
`row_gradient` is read. Rows are read outside the layers, so activation checkpointing repeats none
of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engram_lm.errors import AddressError, ConfigError, instance, number, whole_number
from engram_lm.memory.initial_rows import draw_rows
from engram_lm.memory.rows import Request
from engram_lm.memory.table import Merged, RowGradient, Table, TrainedRead
from engram_lm.model.traffic import ID_BYTES, owned
from engram_lm.train.exchange import Answer, Exchange


@dataclass
class Traffic:
    """What a worker has exchanged with others for one table. What it asks of itself is left out."""

    requests: int = 0
    """Forward exchanges: an all-to-all of counts, one of row numbers, one of rows."""
    returns: int = 0
    """Backward exchanges: one all-to-all of gradients."""
    messages: int = 0
    """To other workers, in all of these."""
    asked: int = 0
    """Rows asked of others, repeats included: what would travel unmerged."""
    fetched: int = 0
    """The same rows, each once a request: what does."""
    served: int = 0
    """Rows that others asked of this worker."""
    id_bytes: int = 0
    """Sent to others, as are the next two; the counts, 8 bytes a message, are not in them."""
    row_bytes: int = 0
    gradient_bytes: int = 0
    replica_bytes: int = 0
    """Row numbers and gradients sent to each of the other replicas."""


class ShardedTable(Table):
    """Rows first_row on of a table of `rows`, cut as torch.chunk does it: the last may have none.

    `weight` holds these alone and `row_gradient` counts from first_row, so that a row optimiser
    sees a table like any other; the gradient is the mean over all workers. `start` and `gather`
    take row numbers of the whole table. Both, and the first reading of `row_gradient` after a
    backward pass, are collective: every worker calls the model equally often, with no tokens where
    it has none left, and takes its optimiser's steps with the others.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        shards: Exchange | None,
        replicas: Exchange | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        rank, size = (0, 1) if shards is None else (shards.rank, shards.size)
        self.chunk = -(-rows // size)
        self.first_row, last_row = owned(rows, size)[rank]
        self.shards, self.replicas = shards, replicas
        self.workers = size * (1 if replicas is None else replicas.size)
        self.traffic = Traffic()
        self._returning: list[Answer[None]] = []
        self._own: RowGradient | None = None
        self._merged: RowGradient | None = None
        # Without memory, and so without drawing rows, which shard_tables copies or draws itself.
        super().__init__(last_row - self.first_row, dim, device="meta")
        self.rows = rows
        empty = torch.empty(last_row - self.first_row, dim, dtype=dtype, device=device)
        self.weight = nn.Parameter(empty)

    @property
    def last_row(self) -> int:
        """The row after this worker's last one."""
        return self.first_row + self.weight.shape[0]

    def start(self, rows_M: Tensor) -> Request:
        """Sends the request; other workers' rows travel while the caller computes."""
        if self.shards is None:
            return super().start(rows_M)
        self.is_trained()
        return ShardedRead(self, self.shards, Merged.of(rows_M))

    def gather(self, rows_M: Tensor) -> Tensor:
        """(M,) int64 -> (M, R) uint8, from whichever workers own them."""
        if self.shards is None:
            return super().gather(rows_M)
        read = ShardedRead(self, self.shards, Merged.of(rows_M))
        return read.fetch().index_select(0, read.merged.position_M).view(torch.uint8)

    def own(self, rows_R: Tensor) -> Tensor:
        """The same for rows that are here, by their numbers in the whole table."""
        return super().gather(rows_R - self.first_row)

    def add_gradient(self, gradient: RowGradient) -> None:
        """Adds what a backward pass of the group left for this worker, by local row number."""
        gradient = RowGradient(gradient.rows_U, gradient.values_UE / self.workers)
        self._own = gradient if self._own is None else RowGradient.sum([self._own, gradient])

    def returning(self, answer: Answer[None]) -> None:
        """Gradients are on their way; reading `row_gradient` waits for them."""
        self._returning.append(answer)

    @property
    def row_gradient(self) -> RowGradient | None:
        """Of all backward passes of all workers, by local row number; None before the first."""
        self._settle()
        if self._own is not None:
            gradients = [self._own if self.replicas is None else self._replicated(self._own)]
            if self._merged is not None:
                gradients.insert(0, self._merged)
            self._own = None
            self._merged = gradients[0] if len(gradients) == 1 else RowGradient.sum(gradients)
        return self._merged

    @row_gradient.setter
    def row_gradient(self, gradient: RowGradient | None) -> None:
        self._settle()
        self._own, self._merged = None, gradient

    @property
    def holds_gradient(self) -> bool:
        """Whether one is there, or on its way."""
        return bool(self._returning) or self._own is not None or self._merged is not None

    @property
    def local_gradient(self) -> RowGradient | None:
        """What of it has been read."""
        return self._merged

    def gradient_norm(self) -> Tensor:
        """Of the gradient of all rows, wherever they are: collective, as reading it is."""
        norm = super().gradient_norm()
        shards = self.shards
        if shards is None:
            return norm
        return shards.mine(shards.submit(lambda: shards.sum(norm.square())).wait()).sqrt()

    def _settle(self) -> None:
        while self._returning:
            self._returning.pop(0).wait()
        if self._own is not None and self.shards is not None:
            self._own = RowGradient(*map(self.shards.mine, self._own))

    def _replicated(self, own: RowGradient) -> RowGradient:
        replicas = self.replicas
        assert replicas is not None

        def gathered() -> RowGradient:
            rows, values = replicas.all_gather(own.rows_U), replicas.all_gather(own.values_UE)
            # In rank order everywhere, so that replicas stay equal bit for bit.
            return RowGradient.sum(list(map(RowGradient, rows, values)))

        size = own.rows_U.nbytes + own.values_UE.nbytes
        self.traffic.replica_bytes += size * (replicas.size - 1)
        return RowGradient(*map(replicas.mine, replicas.submit(gathered).wait()))

    def extra_repr(self) -> str:
        return f"rows={self.rows}, here={self.first_row}:{self.last_row}, {super().extra_repr()}"


class ShardedRead(TrainedRead):
    """A request to the owners of its rows."""

    def __init__(self, table: ShardedTable, exchange: Exchange, merged: Merged) -> None:
        super().__init__(table, merged)
        self.table: ShardedTable = table
        self.exchange = exchange
        self._answer = exchange.submit(self._ask)

    def fetch(self) -> Tensor:
        """Waits for the values of the merged rows, (U, E)."""
        bytes_UR = self.exchange.mine(self._answer.wait())
        return self.table.format.decode(bytes_UR)

    def give(self, gradient_UE: Tensor) -> None:
        """Sends each merged row's gradient to its owner."""
        self.table.returning(self.exchange.submit(lambda: self._return(gradient_UE)))

    def _ask(self) -> Tensor:
        rows_U, exchange, table = self.merged.rows_U, self.exchange, self.table
        bounds_W = torch.arange(1, exchange.size, device=rows_U.device) * table.chunk
        edges = [0, *torch.searchsorted(rows_U, bounds_W).tolist(), len(rows_U)]
        self.outgoing = [last - first for first, last in pairwise(edges)]
        self.incoming = exchange.counts(self.outgoing)
        self.received_R = exchange.all_to_all(rows_U, self.outgoing, self.incoming)
        self._check()
        self._count(edges)
        return exchange.all_to_all(table.own(self.received_R), self.incoming, self.outgoing)

    def _return(self, gradient_UE: Tensor) -> None:
        exchange, table, traffic = self.exchange, self.table, self.table.traffic
        received_RE = exchange.all_to_all(gradient_UE, self.outgoing, self.incoming)
        # Contributions stand in rank order, and are summed in it.
        table.add_gradient(RowGradient.of(self.received_R - table.first_row, received_RE))
        traffic.returns += 1
        traffic.messages += exchange.size - 1
        fetched = len(gradient_UE) - self.outgoing[exchange.rank]
        traffic.gradient_bytes += fetched * gradient_UE[:1].nbytes

    def _check(self) -> None:
        # Seen in the field: transports that shift the bytes of what they carry.
        table, received_R = self.table, self.received_R
        wrong_R = (received_R < table.first_row) | (received_R >= table.last_row)
        if not wrong_R.any():
            return
        position = int(wrong_R.nonzero()[0])
        ends_W = torch.tensor(self.incoming).cumsum(0)
        sender = int(torch.searchsorted(ends_W, position, right=True))
        raise AddressError(
            f"worker {self.exchange.rank} was asked for row {int(received_R[position])} by worker "
            f"{sender}: it holds {table.weight.shape[0]} of {table.rows}, from {table.first_row} on"
        )

    def _count(self, edges: list[int]) -> None:
        rank, traffic = self.exchange.rank, self.table.traffic
        position_M = self.merged.position_M
        here_M = (position_M >= edges[rank]) & (position_M < edges[rank + 1])
        fetched = len(self.merged.rows_U) - self.outgoing[rank]
        served = len(self.received_R) - self.incoming[rank]
        traffic.requests += 1
        traffic.messages += 3 * (self.exchange.size - 1)
        traffic.asked += len(position_M) - int(here_M.sum())
        traffic.fetched += fetched
        traffic.served += served
        traffic.id_bytes += fetched * ID_BYTES
        traffic.row_bytes += served * self.table.format.row_bytes


def check_shared(tables: Iterable[Table]) -> None:
    """ConfigError where a row optimiser would move a table by one worker's gradient alone."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    if any(not isinstance(table, ShardedTable) for table in tables):
        raise ConfigError(
            f"a table of one worker among {dist.get_world_size()}: its rows would part from the "
            "others'; call shard_tables(model), or replicate_tables(model) for DDP outside of our "
            "loop, before the optimiser is made"
        )


def shard_tables(
    model: nn.Module,
    group: dist.ProcessGroup | None = None,
    replicas: dist.ProcessGroup | None = None,
    *,
    seed: int | None = None,
    std: float = 0.02,
) -> list[ShardedTable]:
    """Replaces the tables of a model by this worker's part of each, before any optimiser is made.

    group: the workers that hold one copy of the tables together; None for all of them. replicas:
    those that hold the same rows in other such groups (`Workers.grid` makes both). Rows that the
    model has are kept, those of the first replica by all. Tables made inside `unallocated()`, which
    may be larger than a worker's memory, are drawn from `seed` with deviation `std`: the same rows
    for any number of workers, one too. Every worker calls it. ConfigError where the groups leave
    workers out.
    """
    instance("model", model, nn.Module)
    if seed is not None:
        whole_number("seed", seed)
    number("std", std, least=0)
    if dist.is_available():
        for name, given in (("group", group), ("replicas", replicas)):
            instance(name, given, dist.ProcessGroup, type(None))
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    shards = copies = None
    if dist.is_available() and dist.is_initialized():
        group = group or dist.distributed_c10d._get_default_group()
        sizes = [group.size(), 1 if replicas is None else replicas.size()]
        if sizes[0] * sizes[1] != dist.get_world_size():
            raise ConfigError(
                f"group of {sizes[0]} workers, {sizes[1]} replicas: their product is the number of "
                f"workers, {dist.get_world_size()}"
            )
        shards = Exchange(group, device) if sizes[0] > 1 else None
        copies = Exchange(replicas, device) if replicas is not None and sizes[1] > 1 else None
    found = [(name, each) for name, each in model.named_modules() if isinstance(each, Table)]
    result = []
    for index, (name, whole) in enumerate(found):
        if whole.weight.is_meta and seed is None:
            raise ConfigError(f"{name} has no rows yet and seed=None: a number to draw them from")
        rows, dim = whole.weight.shape
        part = ShardedTable(rows, dim, shards, copies, dtype=whole.weight.dtype, device=device)
        if whole.weight.is_meta:
            draw_rows(part.weight, first_row=part.first_row, std=std, seed=(seed or 0, index))
        else:
            part.weight.data.copy_(whole.weight[part.first_row : part.last_row])
            if copies is not None:
                copies.spread(part.weight.data)
        part.weight.requires_grad_(whole.weight.requires_grad)
        model.set_submodule(name, part)
        result.append(part)
    return result
