"""Bits per byte where n-grams were seen never, rarely and often.

The text is the corpus that ships with the package. Its validation documents are read in windows;
each token counts to the band of how often the n-gram that ends before it stood in the training
documents, for every order. Documents see nothing of one another for a model that was trained so.

Shows: whether a memory earns its keep where its n-grams were seen in training, and costs nothing
where they were not. Cannot show: anything of a model that was trained on another text, or on a part
of this one as `engram demo`'s are (`engram bands` counts that part), whose n-grams these counts are
not; nor compare bands with one another, as frequent n-grams are easier to go on from for every
model.

Shapes: T token ids of the text, W windows, C positions in a window.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from engram_lm import corpus
from engram_lm.analysis.bands import BANDS
from engram_lm.analysis.material import Material, stream, validation
from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluate.answers import NOT_FINITE
from engram_lm.evaluate.suite_scores import Progress, SuiteScore
from engram_lm.evaluate.token_losses import token_losses
from engram_lm.memory.canonical import CanonicalMap


class Judged(NamedTuple):
    """A text to be read: `material.stream_T`, T ids."""

    material: Material
    bands_OT: npt.NDArray[np.int8]
    """(orders from 2, T - 1): which of BANDS each token but the first is in, or -1."""


@dataclass(frozen=True, kw_only=True)
class FrequencyBands:
    """ConfigError for sizes that make no two windows."""

    tokens: int = 65_536
    """Of the validation documents, whole windows of them."""
    context: int = 128
    max_order: int = 3

    def __post_init__(self) -> None:
        if self.context < 1 or self.tokens < 2 * self.context or self.max_order < 2:
            raise ConfigError(
                f"tokens={self.tokens}, context={self.context}, max_order={self.max_order}: "
                "2 windows of 1 or more tokens, and 2 or more"
            )

    def read(
        self, tokenizer: Any, *, apart: bool = False, progress: Progress | None = None
    ) -> Judged:
        """Tokenises both splits and counts. apart: documents see nothing of one another. DataError
        for a tokenizer that cannot read them, or makes no two windows."""
        material = Material(
            **validation(tokenizer, self.tokens + 1),
            apart=apart,
            corpus="WordNet's training documents",
            **stream(_told(corpus.documents("train"), progress), tokenizer),
            context=self.context,
        )
        canonical = CanonicalMap.from_tokenizer(tokenizer)
        counts = material.counts(canonical, self.max_order)
        return Judged(material, material.bands(counts, canonical.ids_V.numpy()))

    def scores(
        self, model: Any, judged: Judged, *, batch: int = 32, progress: Progress | None = None
    ) -> list[SuiteScore]:
        """A score each order and band that has tokens; one value a window. DataError where losses
        are not finite numbers."""
        material = judged.material
        ids_T = material.stream_T
        bytes_T = material.bytes_T[1 : len(ids_T)]
        losses_T = token_losses(
            model,
            ids_T,
            context=self.context,
            batch=batch,
            starts_T=material.read_starts_T,
            progress=_of(len(bytes_T), progress),
        )
        if not np.isfinite(losses_T).all():
            raise DataError(f"frequency_bands: {NOT_FINITE}")
        found = []
        for order, bands_T in enumerate(judged.bands_OT, start=2):
            for place, band in enumerate(BANDS):
                within_T = bands_T == place
                bits_W, bytes_W = (
                    (each_T * within_T).reshape(-1, self.context).sum(axis=1)
                    for each_T in (losses_T / math.log(2), bytes_T)
                )
                if not bytes_W.any():
                    continue
                found.append(
                    SuiteScore(
                        suite="frequency_bands",
                        kind=f"{order}-gram, {band}",
                        metric="bits_per_byte",
                        chance=None,
                        values_N=_shares(bits_W, bytes_W),
                    )
                )
        return found


def _shares(
    bits_W: npt.NDArray[np.floating], bytes_W: npt.NDArray[np.integer]
) -> npt.NDArray[np.float64]:
    """Values whose mean is all bits over all bytes, and whose spread is that of this ratio to first
    order: windows have unequally many bytes of a band."""
    ratio = bits_W.sum(dtype=np.float64) / bytes_W.sum()
    values_W: npt.NDArray[np.float64] = ratio + (bits_W - ratio * bytes_W) / bytes_W.mean()
    return values_W


def _told(documents: Sequence[str], progress: Progress | None) -> Iterator[tuple[str, bool]]:
    """As `stream` takes them; progress is told how many it took."""
    for taken, text in enumerate(documents, start=1):
        yield text, True
        if progress is not None and taken % corpus.BATCH_DOCUMENTS == 0:
            progress(taken, len(documents))


def _of(total: int, progress: Progress | None) -> Callable[[int], None] | None:
    return None if progress is None else lambda done: progress(done, total)
