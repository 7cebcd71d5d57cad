"""Which rows of each table a text asks for most, counted over token shards.

Shapes: L layers with a memory, V rows of one table, T tokens read together, H heads, K hot rows.
"""

from collections.abc import Callable, Collection

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram_lm.memory.ngrams import Addresses
from engram_lm.store.hot import MULTIPLE
from engram_lm.train.shards import Split

TOKENS = 2**16
"""Addressed together."""


def count_rows(
    split: Split,
    addresses: Addresses,
    layers: Collection[int],
    progress: Callable[[int], None] | None = None,
) -> dict[int, NDArray[np.uint32]]:
    """How often the text asks for each row of these layers, (V,) each: 4 bytes a row of memory.

    progress: called with the tokens of each step. AddressError for ids outside the vocabulary.
    """
    specification = addresses.specification
    counts = {layer: np.zeros(specification.table_rows(layer), np.uint32) for layer in layers}
    for first in range(0, len(split), TOKENS):
        last, known = min(first + TOKENS, len(split)), max(first - specification.lookback, 0)
        rows_LBTH = addresses.rows(
            torch.from_numpy(split.read(known, last).astype(np.int64))[None],
            document_starts=torch.from_numpy(split.starts(known, last))[None],
        )
        for layer, rows_BTH in zip(specification.layers, rows_LBTH, strict=True):
            if layer in counts:
                rows_TH = rows_BTH[0, first - known :]
                np.add.at(counts[layer], rows_TH.reshape(-1).numpy(), np.uint32(1))
        if progress is not None:
            progress(last - first)
    return counts


def hottest(counts_V: NDArray[np.uint32], most: int) -> Tensor:
    """Numbers of the rows asked for most often, (K,) int64, the hottest first, ties by number.

    K is the largest multiple of 8 up to `most` that leaves out rows nobody asked for.
    """
    most = min(most, int(np.count_nonzero(counts_V))) // MULTIPLE * MULTIPLE
    if not most:
        return torch.empty(0, dtype=torch.int64)
    least = np.partition(counts_V, len(counts_V) - most)[len(counts_V) - most]
    above = np.flatnonzero(counts_V > least)
    above = above[np.argsort(-counts_V[above].astype(np.int64), kind="stable")]
    ties = np.flatnonzero(counts_V == least)[: most - len(above)]
    return torch.from_numpy(np.concatenate([above, ties]))
