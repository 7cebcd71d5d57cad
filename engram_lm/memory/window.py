"""What the tokens of one call can look back on: the ids before them, and where looking back ends.

Shapes: B sequences, T tokens of this call, H earlier positions, W = H + T.
Both n-gram addressing and the short convolution look back through a Window, so that padding, image
tokens and document starts mean the same to both.
"""

import torch
from torch import Tensor

from engram_lm.errors import AddressError

EMPTY = -1
"""In a history: nothing (the text starts later) or a masked token; it blocks what is older."""


class Window:
    """H earlier positions and T new ones. Padding is transparent: looking back steps over it.

    ids_BW: int64 token ids, EMPTY where there is none. padding_BW: True at padding, or None.
    starts_BW: True at the first token of a document, or None where documents do not end a
    look-back.
    """

    def __init__(
        self, ids_BW: Tensor, tokens: int, padding_BW: Tensor | None, starts_BW: Tensor | None
    ) -> None:
        self.ids_BW = ids_BW
        self.tokens = tokens
        self.padding_BW = padding_BW
        self.starts_BW = starts_BW
        self._order: tuple[Tensor | None] | None = None

    @property
    def earlier(self) -> int:
        """H, the positions before this call's tokens."""
        return self.ids_BW.shape[1] - self.tokens

    @property
    def order_BW(self) -> Tensor | None:
        """Permutation that moves padding to the left of all real positions; None without any."""
        if self._order is None:  # by hand: cached_property takes a lock, which ends a graph
            self._order = (self._sort(),)
        return self._order[0]

    def _sort(self) -> Tensor | None:
        if self.padding_BW is None:
            return None
        # A graph cannot branch on a value; sorting where there is no padding changes nothing.
        if not torch.compiler.is_compiling() and not bool(self.padding_BW.any()):
            return None
        return torch.argsort(~self.padding_BW, dim=1, stable=True)

    def select(self, sequences: Tensor) -> "Window":
        """The window of these sequences, in this order."""
        padding_BW, starts_BW = self.padding_BW, self.starts_BW
        return Window(
            self.ids_BW[sequences],
            self.tokens,
            None if padding_BW is None else padding_BW[sequences],
            None if starts_BW is None else starts_BW[sequences],
        )

    def pack(self, values_BW: Tensor) -> Tensor:
        """Values of all W positions with padding moved out of the way, (B, W, ...)."""
        return values_BW if self.order_BW is None else _take(values_BW, self.order_BW)

    def unpack(self, values_BW: Tensor) -> Tensor:
        """Packed values of W positions back to where this call's T tokens stand, (B, T, ...)."""
        if self.order_BW is not None:
            values_BW = _take(values_BW, torch.argsort(self.order_BW, dim=1))
        return values_BW[:, self.earlier :]

    @property
    def packed_ids_BW(self) -> Tensor:
        """Token ids in packed order; EMPTY at padding."""
        return self.pack(self.ids_BW)

    @property
    def packed_starts_BW(self) -> Tensor | None:
        return None if self.starts_BW is None else self.pack(self.starts_BW)

    @property
    def document_BW(self) -> Tensor | None:
        """Running number of each packed position's document; None if documents do not matter."""
        if self.packed_starts_BW is None:
            return None
        return self.packed_starts_BW.cumsum(dim=1)


def open_window(
    token_ids_BT: Tensor,
    history_BH: Tensor | None,
    *,
    vocabulary: int,
    lookback: int,
    padding_BT: Tensor | None = None,
    masked_BT: Tensor | None = None,
    starts_BT: Tensor | None = None,
) -> Window:
    """Checks one call's ids and masks, and sets them behind their history.

    history_BH: int64 token ids before the call, oldest first, of any length; EMPTY is allowed, and
    only the last `lookback` count. Raises AddressError with position and value.
    """
    _check_integers("token_ids", token_ids_BT)
    B, T = token_ids_BT.shape
    for name, mask in (("padding", padding_BT), ("masked", masked_BT), ("starts", starts_BT)):
        if mask is not None and (mask.shape != (B, T) or mask.dtype != torch.bool):
            raise AddressError(
                f"{name}: a bool tensor of shape {(B, T)} is needed, "
                f"this one is {mask.dtype} {tuple(mask.shape)}"
            )
    ids_BT = token_ids_BT.long()
    # Image tokens and padding may carry any id: no row is read by it, so it is not checked either.
    for mask in (padding_BT, masked_BT):
        if mask is not None:
            ids_BT = ids_BT.masked_fill(mask, EMPTY)
    _check_range("token id", token_ids_BT, ids_BT, 0, vocabulary)
    if history_BH is None:
        history_BH = ids_BT.new_full((B, lookback), EMPTY)
    else:
        _check_integers("history", history_BH)
        if history_BH.shape[0] != B:
            raise AddressError(
                f"history: {history_BH.shape[0]} sequences, but token_ids has {B}; one row each"
            )
        history_BH = history_BH.to(device=ids_BT.device, dtype=torch.int64)
        _check_range("history id", history_BH, history_BH, EMPTY, vocabulary)
        missing = lookback - history_BH.shape[1]
        if missing > 0:
            history_BH = torch.cat([ids_BT.new_full((B, missing), EMPTY), history_BH], dim=1)
        history_BH = history_BH[:, history_BH.shape[1] - lookback :]
    return Window(
        torch.cat([history_BH, ids_BT], dim=1),
        T,
        None if padding_BT is None else torch.cat([_no(history_BH), padding_BT], dim=1),
        None if starts_BT is None else torch.cat([_no(history_BH), starts_BT], dim=1),
    )


def _no(ids: Tensor) -> Tensor:
    return torch.zeros_like(ids, dtype=torch.bool)


def _take(values_BW: Tensor, order_BW: Tensor) -> Tensor:
    index = order_BW.reshape(*order_BW.shape, *([1] * (values_BW.ndim - 2)))
    return values_BW.gather(1, index.expand_as(values_BW))


def _check_integers(name: str, ids: Tensor) -> None:
    integers = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
    if ids.dtype not in integers:
        raise AddressError(f"{name}: integer ids are needed, these are {ids.dtype}")
    if ids.ndim != 2:
        raise AddressError(
            f"{name}: shape (sequences, tokens) is needed, this is {tuple(ids.shape)}"
        )


def _check_range(name: str, given: Tensor, kept: Tensor, low: int, high: int) -> None:
    """AddressError for the first id outside of low to high - 1 that `kept`, too, still has."""
    if torch.compiler.is_compiling() or not given.numel():
        return  # a graph cannot raise by value; the embedding's own bounds check remains
    least, most = given.aminmax()
    if not bool((least < low) | (most >= high)):
        return
    wrong = ((given < low) | (given >= high)) & (given == kept)
    if bool(wrong.any()):
        sequence, position = (int(index) for index in wrong.nonzero()[0])
        raise AddressError(
            f"{name} {int(given[sequence, position])} at position {position} of sequence "
            f"{sequence}: ids run from 0 to {high - 1}"
        )
