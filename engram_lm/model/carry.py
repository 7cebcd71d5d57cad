"""Which row of a table goes where when its n-grams get other addresses.

Shapes: L layers, B sequences, T tokens, O orders, K heads per order, H = O * K, P pairs of an old
and a new row, U pairs of which no new row is in two.
"""

from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from engram_lm.errors import ConfigError, DataError, instance, shown
from engram_lm.memory.ngrams import Addresses
from engram_lm.model.documents import document_starts

Read = tuple[Tensor, Tensor | None]
"""Token ids (B, T) and their position_ids, or None where no documents are packed."""


class Moves(NamedTuple):
    """Rows of one table. to_U: ascending; kept: share of reads that find their old values."""

    from_U: Tensor
    to_U: Tensor
    kept: float


class _Pairs(NamedTuple):
    """Each pair once, by new and then by old row, and how many reads it had."""

    old_P: Tensor
    new_P: Tensor
    reads_P: Tensor

    @classmethod
    def of(cls, old_P: Tensor, new_P: Tensor, reads_P: Tensor) -> "_Pairs":
        # Row numbers of two tables do not fit in one int64, places among those read do.
        old_V, place_P = torch.unique(old_P, return_inverse=True)
        pair_U, place_P = torch.unique(new_P * len(old_V) + place_P, return_inverse=True)
        reads_U = torch.zeros_like(pair_U).index_add_(0, place_P, reads_P)
        return cls(old_V[pair_U % len(old_V)], pair_U // len(old_V), reads_U)

    def joined(self, other: "_Pairs") -> "_Pairs":
        return _Pairs.of(*(torch.cat(both) for both in zip(self, other, strict=True)))

    def moves(self) -> Moves:
        """Of the old rows that want one new row, the one with most reads (then the lowest)."""
        order_P = torch.argsort(self.reads_P, descending=True, stable=True)
        order_P = order_P[torch.argsort(self.new_P[order_P], stable=True)]
        new_P = self.new_P[order_P]
        first_P = torch.ones_like(new_P, dtype=torch.bool)
        first_P[1:] = new_P[1:] != new_P[:-1]
        won_U = order_P[first_P]
        kept = float(self.reads_P[won_U].sum() / self.reads_P.sum())
        return Moves(self.old_P[won_U], self.new_P[won_U], kept)


def carry(old: Addresses, new: Addresses, reads: Iterable[Read]) -> dict[int, Moves]:
    """Old layer -> the moves of its rows, by the n-grams of these sequences. DataError if none.

    `new` has every layer, order and head that `old` has.
    """
    stacks: dict[int, list[_Pairs]] = {layer: [] for layer in old.layers}
    instance("reads", reads, Iterable)
    for read in reads:
        instance("a read", read, tuple, list)
        if len(read) != 2 or not isinstance(read[0], Tensor):
            raise ConfigError(f"a read={shown(read)}: (token ids, position ids or None) is needed")
        ids_BT, positions_BT = read
        if not ids_BT.numel():
            continue
        starts_BT = None
        if positions_BT is not None:
            starts_BT = document_starts(positions_BT, None, None, None).expand_as(ids_BT)
        old_LBTOK = _by_head(old, ids_BT, starts_BT)
        new_LBTOK = _by_head(new, ids_BT, starts_BT)
        orders, heads = old_LBTOK.shape[-2:]
        for layer, stack in stacks.items():
            old_P = old_LBTOK[old.layers.index(layer)].flatten()
            new_P = new_LBTOK[new.layers.index(layer), ..., :orders, :heads].flatten()
            pairs = _Pairs.of(old_P, new_P, torch.ones_like(old_P))
            # Joined with what is no longer than itself, so that few pairs are sorted often.
            while stack and len(stack[-1].new_P) <= len(pairs.new_P):
                pairs = stack.pop().joined(pairs)
            stack.append(pairs)
    if not all(stacks.values()):
        raise DataError("reads: no token was given, so no row has an n-gram to go along with")
    return {layer: reduce(_Pairs.joined, stack).moves() for layer, stack in stacks.items()}


def _by_head(addresses: Addresses, ids_BT: Tensor, starts_BT: Tensor | None) -> Tensor:
    rows_LBTH = addresses.rows(ids_BT, document_starts=starts_BT)
    return rows_LBTH.unflatten(-1, (-1, addresses.specification.heads))
