"""Token stream -> batches: which tokens a step sees is a function of seed and step alone."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engram_lm.errors import DataError


class Batches:
    """Windows of context + 1 tokens, one after another, in an order drawn anew for each pass.

    Because a batch depends on nothing but (seed, step), a run that resumes sees what it would have.
    """

    def __init__(
        self, ids: npt.NDArray[np.integer], *, batch: int, context: int, seed: int
    ) -> None:
        self.ids, self.batch, self.context, self.seed = ids, batch, context, seed
        self.windows = (len(ids) - 1) // context
        self._held: tuple[int, npt.NDArray[np.int64]] | None = None
        if self.windows < 1:
            raise DataError(f"{len(ids)} tokens: at least context + 1 = {context + 1} are needed")

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """A step's inputs and targets, both (batch, context) int64; targets are one token later."""
        rows = [self._window(step * self.batch + index) for index in range(self.batch)]
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]

    def _window(self, number: int) -> npt.NDArray[np.integer]:
        passes, index = divmod(number, self.windows)
        start = int(self._order(passes)[index]) * self.context
        return self.ids[start : start + self.context + 1]

    def _order(self, passes: int) -> npt.NDArray[np.int64]:
        if self._held is None or self._held[0] != passes:
            order = np.random.default_rng((self.seed, passes)).permutation(self.windows)
            self._held = (passes, order)
        return self._held[1]
