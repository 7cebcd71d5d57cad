"""Start early, wait late: every row of every layer is asked for the moment the token ids are known.

Shapes: B sequences, T tokens, H heads per layer, E values per row, M = B * T * H.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from engram_lm.errors import ConfigError, instance, shown
from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.rows import Request, RowStore, check_store
from engram_lm.memory.window import Window


class Memory:
    """Addresses, and for each layer the store that holds its rows.

    A store may be the trainable table, rows that a thread brings, or any other RowStore; nobody who
    calls `start` and `wait` can tell.
    """

    def __init__(self, addresses: Addresses, stores: Mapping[int, RowStore]) -> None:
        instance("addresses", addresses, Addresses)
        instance("stores", stores, Mapping)
        if set(stores) != set(addresses.layers):
            raise ConfigError(
                f"stores for layers {shown(list(stores))}: one for each of {addresses.layers} is "
                "needed"
            )
        for layer, store in stores.items():
            check_store(f"stores[{layer}]", store)
        self.addresses = addresses
        self.stores = stores

    def start(
        self, token_ids_BT: Tensor, history_BH: Tensor | None = None, **masks: Any
    ) -> "Pending":
        """Requests the rows of all layers and waits for none; arguments as for Addresses.rows.

        A table may read values from here on, so the optimiser's last step must be done. What may
        be known earlier, of the next batch, is row numbers and their merging.
        """
        return self.start_window(self.addresses.open(token_ids_BT, history_BH, **masks))

    def start_window(self, window: Window) -> "Pending":
        """The same for a window that the caller has opened (a cache keeps one)."""
        rows_LBTH = self.addresses.window_rows(window)
        requests = {
            layer: self.stores[layer].start(rows_BTH.reshape(-1))
            for layer, rows_BTH in zip(self.addresses.layers, rows_LBTH, strict=True)
        }
        return Pending(window, rows_LBTH, requests)

    def look_ahead(self, token_ids_BT: Tensor, history_BH: Tensor | None = None) -> None:
        """Hints to every layer's store that the rows of these tokens will be asked for soon."""
        rows_LBTH = self.addresses.rows(token_ids_BT, history_BH)
        for layer, rows_BTH in zip(self.addresses.layers, rows_LBTH, strict=True):
            self.stores[layer].prefetch(rows_BTH.reshape(-1))

    def serve(self, window: Window) -> "Pending":
        """Asks every layer for no row; of tables that workers share, the others' are answered."""
        none_LBTH = self.addresses.window_rows(window)[:, :0]
        requests = {layer: self.stores[layer].start(none_LBTH.flatten()) for layer in self.stores}
        return Unread(window, none_LBTH, requests)


class Pending:
    """Rows on their way. `rows_LBTH` are their numbers, int64; `requests`: one a layer."""

    def __init__(self, window: Window, rows_LBTH: Tensor, requests: Mapping[int, Request]) -> None:
        self.window = window
        self.rows_LBTH = rows_LBTH
        self.requests = requests

    def wait(self, layer: int) -> Tensor:
        """Vectors of one layer, (B, T, H * E): its rows side by side, order-major."""
        values_ME = self.requests[layer].wait()
        _, sequences, tokens, heads = self.rows_LBTH.shape
        return values_ME.view(sequences, tokens, heads * values_ME.shape[1])


class Unread(Pending):
    """No rows at all: each layer gets zeros. Their backward pass gives no gradient, but it runs:
    workers give gradients back in company.
    """

    def wait(self, layer: int) -> Tensor:
        """Zeros, (B, T, H * E) of the window."""
        values_0E = self.requests[layer].wait()
        width = self.rows_LBTH.shape[3] * values_0E.shape[1]
        return values_0E.sum().expand(len(self.window.ids_BW), self.window.tokens, width)


class OnDisk(Pending):
    """Rows that cannot be trained where they are: a backward pass that reaches them, of a memory
    that is not frozen, is a ConfigError."""

    def __init__(self, pending: Pending) -> None:
        super().__init__(pending.window, pending.rows_LBTH, pending.requests)

    def wait(self, layer: int) -> Tensor:
        """Vectors of one layer that ask for a gradient, so that a backward pass comes by."""
        vectors_BTM = super().wait(layer).requires_grad_()
        vectors_BTM.register_hook(self._refuse)
        return vectors_BTM

    @staticmethod
    def _refuse(gradient_BTM: Tensor) -> None:
        raise ConfigError(
            "memory='disk': rows in files are not trained; open the model without it, or freeze "
            "its memory (requires_grad_(False) of every layer.engram) to train what is around it"
        )
