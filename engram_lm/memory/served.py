"""Rows of stores that are slower than memory, gathered while the model computes.

Shapes: M rows asked for, U distinct rows among them, E values per row.
"""

import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from engram_lm.errors import DataError
from engram_lm.memory.metrics import LayerMetrics
from engram_lm.memory.rows import Request, RowStore, TierCounts
from engram_lm.memory.table import Merged

WAITS_KEPT = 4096
"""The last ones, of which quantiles are taken."""
ROWS_AT_ONCE = 16_384
"""Rows read, decoded and given out together: bounds what a long prompt takes beside its values."""


class Served(RowStore):
    """One layer's rows. What is asked for is merged, gathered and decoded by a thread, from `start`
    on.

    thread: of one worker, shared by the layers of a model: they are waited for in the order in
    which they were started.
    """

    def __init__(self, store: RowStore, thread: Executor) -> None:
        self.store, self.format, self.rows = store, store.format, store.rows
        self.waits: deque[float] = deque(maxlen=WAITS_KEPT)
        """Seconds that the model has waited for rows of this layer, a forward pass each."""
        self._thread = thread
        self._expected: _Gathering | None = None
        self._asked = self._unique = self._requests = 0
        self._wait_seconds = 0.0

    def gather(self, rows_M: Tensor) -> Tensor:
        """(M,) int64 -> (M, R) uint8, at once and not by the thread."""
        return self.store.gather(rows_M)

    def prefetch(self, rows_M: Tensor) -> None:
        """Hands on, for rows of texts that wait for their turn."""
        self.store.prefetch(rows_M)

    def expect(self, rows_M: Tensor) -> None:
        """Gathers rows before they are asked for; a `start` for others forgets them."""
        self._expected = self._begin(rows_M.cpu())

    def start(self, rows_M: Tensor) -> Request:
        """Asks for rows, (M,) int64, on any device, where their values will be too."""
        expected, self._expected = self._expected, None
        host_M = rows_M.cpu()
        if expected is None or not torch.equal(expected.rows_M, host_M):
            expected = self._begin(host_M)
        return _Waiting(self, expected, rows_M.device)

    def close(self) -> None:
        """Closes the store; rows that the thread is gathering come first."""
        self.store.close()

    def tiers(self) -> list[TierCounts]:
        """Of the store."""
        return self.store.tiers()

    def metrics(self) -> LayerMetrics:
        """What has been asked, where it was found, and how long the model has waited."""
        waits = torch.tensor([*self.waits] or [0.0], dtype=torch.float64)
        return LayerMetrics(
            asked=self._asked,
            unique=self._unique,
            tiers=tuple(self.tiers()),
            requests=self._requests,
            wait_seconds=self._wait_seconds,
            wait_p50=float(waits.quantile(0.5)),
            wait_p99=float(waits.quantile(0.99)),
        )

    def _begin(self, rows_M: Tensor) -> "_Gathering":
        try:
            return _Gathering(rows_M, self._thread.submit(self._gather, rows_M))
        except RuntimeError as error:  # the thread takes nothing more
            raise DataError("the served tables are closed") from error

    def _gather(self, rows_M: Tensor) -> "_Gathered":
        merged = Merged.of(rows_M)
        rows, requests = len(merged.rows_U), len(rows_M)
        values_ME = torch.empty(requests, self.format.dim, dtype=self.format.value_dtype)
        # numpy, which unlike torch takes no threads from the model to write a few rows.
        into_MB, place_M = values_ME.view(torch.uint8).numpy(), merged.position_M.numpy()
        for start in range(0, rows, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, rows)
            first = int(merged.first_U[start])
            last = int(merged.first_U[stop]) if stop < rows else requests
            bytes_KR = self.store.gather(merged.rows_U[start:stop]).cpu()
            values_KB = self.format.decode(bytes_KR).contiguous().view(torch.uint8).numpy()
            for begin in range(first, last, ROWS_AT_ONCE):
                asked = merged.order_M[begin : min(begin + ROWS_AT_ONCE, last)].numpy()
                into_MB[asked] = values_KB[place_M[asked] - start]
        return _Gathered(values_ME, len(merged.rows_U))

    def _waited(self, gathered: "_Gathered", seconds: float) -> None:
        self._asked += len(gathered.values_ME)
        self._unique += gathered.unique
        self._requests += 1
        self._wait_seconds += seconds
        self.waits.append(seconds)


class _Gathered(NamedTuple):
    values_ME: Tensor
    unique: int


class _Gathering(NamedTuple):
    rows_M: Tensor
    gathered: "Future[_Gathered]"


class _Waiting:
    def __init__(self, served: Served, gathering: _Gathering, device: torch.device) -> None:
        self.served, self.gathering, self.device = served, gathering, device

    def wait(self) -> Tensor:
        """(M, E); what went wrong in the thread is raised here."""
        begun = time.perf_counter()
        gathered = self.gathering.gathered.result()
        values_ME = gathered.values_ME.to(self.device)
        self.served._waited(gathered, time.perf_counter() - begun)
        return values_ME


def _take_one_thread() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread's first look settles what it takes


class ServedTables:
    """The tables of one model, all of them in stores, and the thread that gathers from them.

    A context manager; `close` waits for what has been started.
    """

    def __init__(self, stores: Mapping[int, RowStore]) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engram-rows")
        threads = torch.get_num_threads()
        # One OpenMP thread: with a team of its own beside the model's there would be more threads
        # than cores, and OpenMP then lets all of them sleep between two operations.
        self._thread.submit(_take_one_thread).result()
        torch.set_num_threads(threads)  # for threads yet to come, as it was
        self.layers = {layer: Served(store, self._thread) for layer, store in stores.items()}
        for store in stores.values():  # compiled decoding is imported now, not by the first row
            self._thread.submit(store.format.decode, torch.zeros(1, store.format.row_bytes).byte())

    def metrics(self) -> dict[int, LayerMetrics]:
        """Of each layer, since it was opened."""
        return {layer: served.metrics() for layer, served in self.layers.items()}

    def close(self) -> None:
        """Gives back the thread, files and memory. Rows asked for from now on are a DataError."""
        self._thread.shutdown()
        for served in self.layers.values():
            served.close()

    def __enter__(self) -> "ServedTables":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
