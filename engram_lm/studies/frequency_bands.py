"""Bits per byte where n-grams were seen never, rarely and often.

The text is the corpus that ships with the package. Its validation documents are read in windows;
each token counts to the band of how often the n-gram that ends before it stood in the training
documents, for every order.

Shows: whether a memory earns its keep where its n-grams were seen in training, and costs nothing
where they were not. Cannot show: anything of a model that was trained on another text, whose
n-grams these counts are not; nor compare bands with one another, as frequent n-grams are easier to
go on from for every model.

Shapes: T token ids of the text, W windows, C positions in a window.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from engram_lm import corpus
from engram_lm.analysis.bands import BANDS, count_ngrams, window_bands
from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluate.answers import separator_of
from engram_lm.evaluate.rendering import unknown_ids
from engram_lm.evaluate.suite_scores import Progress, SuiteScore
from engram_lm.evaluate.token_losses import token_losses
from engram_lm.memory.canonical import CanonicalMap, backend_of


class Judged(NamedTuple):
    """A text to be read, one entry for each token but the first."""

    ids_T: npt.NDArray[np.int64]
    """One entry more: the first token is read and not predicted."""
    bytes_T: npt.NDArray[np.int64]
    bands: list[npt.NDArray[np.int8]]
    """Order by order from 2: which of BANDS, or -1."""


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

    def read(self, tokenizer: Any, progress: Progress | None = None) -> Judged:
        """Tokenises both splits and counts. DataError for a tokenizer that cannot read them."""
        documents = {split: corpus.documents(split) for split in corpus.SPLITS}
        training = documents["train"]
        counted: list[int] = []
        for done, (ids, _) in enumerate(_encoded(training, tokenizer, sized=False), start=1):
            counted += ids
            if progress is not None and done % corpus.BATCH_DOCUMENTS == 0:
                progress(done, len(training))
        ids_T: list[int] = []
        bytes_T: list[int] = []
        for ids, sizes in _encoded(documents["validation"], tokenizer):
            ids_T += ids
            bytes_T += sizes
            if len(ids_T) > self.tokens:
                break
        windows = min(self.tokens, len(ids_T) - 1) // self.context
        if windows < 2:
            raise DataError(f"{len(ids_T)} tokens: 2 windows of context={self.context} are needed")
        whole = windows * self.context + 1
        canonical = CanonicalMap.from_tokenizer(tokenizer)
        canonical_V, base = canonical.ids_V.numpy(), canonical.canonical_ids
        return Judged(
            np.array(ids_T[:whole]),
            np.array(bytes_T[1:whole]),
            [
                window_bands(
                    count_ngrams(canonical_V[counted], order, base=base),
                    canonical_V[ids_T[:whole]],
                    self.context,
                )
                for order in range(2, self.max_order + 1)
            ],
        )

    def scores(
        self, model: Any, judged: Judged, *, batch: int = 32, progress: Progress | None = None
    ) -> list[SuiteScore]:
        """A score each order and band that has tokens; one value a window."""
        losses_T = token_losses(
            model,
            judged.ids_T,
            context=self.context,
            batch=batch,
            progress=_of(len(judged.bytes_T), progress),
        )
        found = []
        for order, bands_T in enumerate(judged.bands, start=2):
            for place, band in enumerate(BANDS):
                within_T = bands_T == place
                bits_W, bytes_W = (
                    (each_T * within_T).reshape(-1, self.context).sum(axis=1)
                    for each_T in (losses_T / math.log(2), judged.bytes_T)
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


def _encoded(
    documents: list[str], tokenizer: Any, *, sized: bool = True
) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of each document behind a separator, and the bytes that each id stands for.

    sized: without it no bytes are counted, which takes half of the time.
    """
    separator, backend = separator_of(tokenizer), backend_of(tokenizer)
    unknown = unknown_ids(tokenizer) - {separator}
    encode = backend.encode_batch if sized else backend.encode_batch_fast
    texts = iter(documents)
    while batch := list(islice(texts, corpus.BATCH_DOCUMENTS)):
        encodings = encode(batch, add_special_tokens=False)
        for text, encoding in zip(batch, encodings, strict=True):
            ids = encoding.ids
            if unknown & set(ids):
                raise DataError(f"the tokenizer has no token for part of {text[:40]!r}")
            ends = [0, *(end for _, end in encoding.offsets)] if sized else []
            sizes = [len(text[begin:end].encode()) for begin, end in pairwise(ends)]
            yield [separator, *ids], [0, *sizes]


def _of(total: int, progress: Progress | None) -> Callable[[int], None] | None:
    return None if progress is None else lambda done: progress(done, total)
