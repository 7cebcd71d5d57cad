"""Token stream -> batches: which tokens a step sees is a function of seed and step alone.

Shapes: B sequences, T tokens.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engram_lm.errors import DataError
from engram_lm.model.positions import packed_positions
from engram_lm.train.stream import Stream


class Batch(NamedTuple):
    """What one step sees. All int64."""

    inputs_BT: Tensor
    targets_BT: Tensor
    """One token later."""
    positions_BT: Tensor | None
    """0 where a document starts; None where documents run on into one another."""

    def to(self, device: torch.device) -> "Batch":
        positions_BT = self.positions_BT
        return Batch(
            self.inputs_BT.to(device, non_blocking=True),
            self.targets_BT.to(device, non_blocking=True),
            None if positions_BT is None else positions_BT.to(device, non_blocking=True),
        )

    def split(self, parts: int) -> "list[Batch]":
        """Its sequences in micro-batches, as even as they go; an empty one where there are fewer
        sequences than parts.
        """
        tensors = (self.inputs_BT, self.targets_BT, self.positions_BT)
        split = [
            [None] * parts if tensor is None else tensor.tensor_split(parts) for tensor in tensors
        ]
        return [Batch(*each) for each in zip(*split, strict=True)]


class Batches:
    """Windows of context + 1 tokens, one after another, in an order drawn anew for each pass.

    Because a batch depends on nothing but (seed, step), a run that resumes sees what it would have.
    A document that a window's end cuts goes on in another window, as if it began there.
    """

    def __init__(self, stream: Stream, *, batch: int, context: int, seed: int) -> None:
        self.stream, self.batch, self.context, self.seed = stream, batch, context, seed
        self.windows = (len(stream) - 1) // context
        self._held: tuple[int, npt.NDArray[np.int64]] | None = None
        if self.windows < 1:
            raise DataError(
                f"{len(stream)} tokens: at least context + 1 = {context + 1} are needed"
            )

    def __getitem__(self, step: int) -> Batch:
        """A step's tokens, (batch, context) each."""
        firsts = [self._first(step * self.batch + index) for index in range(self.batch)]
        rows = [self.stream.read(first, first + self.context + 1) for first in firsts]
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
        starts = [self.stream.starts(first, first + self.context) for first in firsts]
        known = [row for row in starts if row is not None]
        positions = torch.from_numpy(packed_positions(np.stack(known))) if known else None
        return Batch(tokens[:, :-1], tokens[:, 1:], positions)

    def text_bytes(self, step: int) -> float:
        """Bytes of UTF-8 text that a step's targets stand for."""
        firsts = [self._first(step * self.batch + index) for index in range(self.batch)]
        return sum(self.stream.text_bytes(at + 1, at + self.context + 1) for at in firsts)

    def _first(self, number: int) -> int:
        passes, index = divmod(number, self.windows)
        return int(self._order(passes)[index]) * self.context

    def _order(self, passes: int) -> npt.NDArray[np.int64]:
        if self._held is None or self._held[0] != passes:
            order = np.random.default_rng((self.seed, passes)).permutation(self.windows)
            self._held = (passes, order)
        return self._held[1]
