"""Start early, wait late: every row of every layer is asked for the moment the token ids are known.

Shapes: B sequences, T tokens, H heads per layer, E values per row, M = B * T * H.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.rows import RowStore
from engram_lm.memory.table import Table
from engram_lm.memory.window import Window


class Memory:
    """Addresses, and for each layer the store that holds its rows.

    A store may be the trainable table or anything else that answers RowStore; nobody who calls
    `start` and `wait` can tell.
    """

    def __init__(self, addresses: Addresses, stores: Mapping[int, RowStore]) -> None:
        assert set(stores) == set(addresses.layers)
        self.addresses = addresses
        self.stores = stores

    def start(
        self, token_ids_BT: Tensor, history_BH: Tensor | None = None, **masks: Any
    ) -> "Pending":
        """Requests the rows of all layers and waits for none; arguments as for Addresses.rows."""
        return self.start_window(self.addresses.open(token_ids_BT, history_BH, **masks))

    def start_window(self, window: Window) -> "Pending":
        """The same for a window that the caller has opened (a cache keeps one)."""
        rows_LBTH = self.addresses.window_rows(window)
        for layer, rows_BTH in zip(self.addresses.layers, rows_LBTH, strict=True):
            self.stores[layer].prefetch(rows_BTH.reshape(-1))
        return Pending(self, window, rows_LBTH)


class Pending:
    """Rows on their way. `rows_LBTH` are their numbers, int64."""

    def __init__(self, memory: Memory, window: Window, rows_LBTH: Tensor) -> None:
        self.memory = memory
        self.window = window
        self.rows_LBTH = rows_LBTH

    def wait(self, layer: int) -> Tensor:
        """Vectors of one layer, (B, T, H * E): its rows side by side, order-major."""
        rows_BTH = self.rows_LBTH[self.memory.addresses.layers.index(layer)]
        store = self.memory.stores[layer]
        rows_M = rows_BTH.reshape(-1)
        if isinstance(store, Table):
            values_ME = _TableLookup.apply(store.weight, store, rows_M)
        else:
            values_ME = store.format.decode(store.gather(rows_M))
        return values_ME.view(*rows_BTH.shape[:2], -1)


class _TableLookup(torch.autograd.Function):
    """Gather and decode; backward leaves the row gradient with the table and none in `.grad`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, table: Table, rows_M: Tensor) -> Tensor:
        ctx.table = table
        ctx.save_for_backward(rows_M)
        return table.format.decode(table.gather(rows_M))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        (rows_M,) = ctx.saved_tensors
        ctx.table.accumulate(rows_M, grads[0])
        return None, None, None
