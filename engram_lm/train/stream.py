"""What training reads: documents behind one another as token ids."""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from engram_lm.train import identity

Ids = npt.NDArray[np.integer]
Starts = npt.NDArray[np.bool_]


class Stream(Protocol):
    """Token ids from 0 to len - 1, of which any stretch can be read."""

    @property
    def sha256(self) -> str:
        """Of what there is to read: a run goes on only with the data it began with."""

    def __len__(self) -> int: ...

    def read(self, first: int, last: int) -> Ids:
        """Ids `first` to `last` - 1."""

    def starts(self, first: int, last: int) -> Starts | None:
        """True where a document starts; None: documents run on into one another."""

    def text_bytes(self, first: int, last: int) -> float:
        """Bytes of UTF-8 text that ids `first` to `last` - 1 stand for. Where only a document's are
        known, each of its tokens has an equal share of them.
        """

    def judged(self, tokens: int) -> tuple[int, int]:
        """How many ids to judge a model by when about `tokens` are wanted, and the bytes of UTF-8
        text that all but the first stand for."""


class Continuous:
    """Ids in memory, documents running on. token_bytes_V: bytes of text of each token id."""

    def __init__(self, ids_T: Ids, token_bytes_V: npt.NDArray[np.int64]) -> None:
        self.ids_T, self.token_bytes_V = ids_T, token_bytes_V

    @property
    def sha256(self) -> str:
        return identity.sha256(self.ids_T)

    def __len__(self) -> int:
        return len(self.ids_T)

    def read(self, first: int, last: int) -> Ids:
        return self.ids_T[first:last]

    def starts(self, first: int, last: int) -> None:
        return None

    def text_bytes(self, first: int, last: int) -> float:
        return float(self.token_bytes_V[self.ids_T[first:last]].sum())

    def judged(self, tokens: int) -> tuple[int, int]:
        ids_T = self.ids_T[:tokens]
        return len(ids_T), int(self.token_bytes_V[ids_T[1:]].sum())
