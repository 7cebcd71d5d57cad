"""What analyses read: a text in windows, the corpus whose n-grams are counted, and sentences.

Shapes: T token ids of the text, C of the corpus.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engram_lm import corpus
from engram_lm.analysis.bands import NgramCounts, count_ngrams, window_bands
from engram_lm.analysis.gates import cut
from engram_lm.analysis.texts import Piece, pieces, token_ids
from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluate.answers import separator_of
from engram_lm.evaluate.rendering import unknown_ids
from engram_lm.evaluate.suite_scores import Suite
from engram_lm.memory.canonical import CanonicalMap, backend_of
from engram_lm.model.positions import packed_positions

Integers = npt.NDArray[np.int64]
SHOWN, LONG = 8, 400
"""Lines of a text that are coloured, and characters of each, at most."""

SENTENCES = (
    "Alexander the Great was king of Macedon and conqueror of Greece, Egypt and Persia.",
    "Johann Sebastian Bach was a German composer and organist of the 18th century.",
    "New York is a city in the United States, at the mouth of the Hudson River.",
    "In World War II the Battle of Britain was fought by the Royal Air Force.",
    'To kick the bucket means to die. As in "the old man kicked the bucket".',
    "The Milky Way is a galaxy; by the way, the solar system is a part of it.",
    "Any of various small plants of the genus Viola, native to North America.",
    "Seven tired painters quietly borrowed our smallest ladder after lunch yesterday.",
    "亚历山大大帝是马其顿的国王，征服了希腊、埃及和波斯。",
    "中国古代的四大发明是造纸术、印刷术、指南针和火药。",
)
"""Names, titles, idioms and WordNet's own phrases; one without a fixed phrase, as a contrast; and
two in Chinese, which a model of English has never read."""

_WORD = r"[A-ZÀ-ÖØ-Þ][\w'’-]*"
NAME = re.compile(rf"(?<=[a-z,;(] ){_WORD}(?: (?:(?:of|the|de|von|van) )?{_WORD})+")
"""Two capitalised words or more in a row, not where a sentence begins: crude, and the same for all
models. Finds none in scripts without capitals."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is read. ConfigError for windows or texts of nothing."""

    tokens: int = 65_536
    """Of the text, at most."""
    context: int = 128
    """Tokens of a window."""
    corpus_tokens: int = 1_100_000
    """Of the shipped corpus; what `engram demo` trains an arm on."""

    def __post_init__(self) -> None:
        if self.context < 8 or self.tokens < 2 * self.context or self.corpus_tokens < 8:
            raise ConfigError(
                f"tokens={self.tokens}, context={self.context}, "
                f"corpus_tokens={self.corpus_tokens}: windows of 8 tokens or more, 2 of them or "
                "more, and a corpus of 8"
            )


@dataclass(frozen=True, kw_only=True)
class Material:
    """One text and one corpus, as token ids of one tokenizer."""

    text: str
    """What the text is called."""
    ids_T: Integers
    """Documents behind one another, each behind a separator; judged in windows of `context`."""
    bytes_T: Integers
    """Of UTF-8 text, that each id stands for; 0 for a separator."""
    starts_T: npt.NDArray[np.bool_]
    """True where a document starts: at its separator."""
    names_T: npt.NDArray[np.bool_]
    """True at the last token of a name of two tokens or more."""
    names: str = "two capitalised words or more in a row, not where a sentence begins"
    """What counts as one, for a reader."""
    apart: bool = False
    """Documents see nothing of one another, as in training on shards (boundary rule "document");
    or they run on into one another, as in `engram demo`."""
    corpus: str | None = None
    corpus_C: Integers | None = None
    """What n-grams are counted in: best what the model was trained on."""
    corpus_starts_C: npt.NDArray[np.bool_] | None = None
    """True where a document of it starts."""
    sentences: tuple[str, ...] = SENTENCES
    context: int = 128
    suites: tuple[Suite, ...] = ()
    """To be asked with each part of a memory off."""
    questions: int = 200
    """Of each kind."""
    heads: bool = False
    """Whether they are asked with each head off as well, a pass for each."""

    @cached_property
    def windows_NT(self) -> Integers:
        """(N, context + 1): whole windows, each one's last id only predicted."""
        whole = (len(self.ids_T) - 1) // self.context
        if whole < 2:
            raise DataError(
                f"{self.text}: {len(self.ids_T)} tokens; two windows of context={self.context} "
                "are needed"
            )
        starts = np.arange(whole)[:, None] * self.context
        return self.ids_T[starts + np.arange(self.context + 1)]

    @property
    def positions_NT(self) -> Integers | None:
        """(N, context): of the tokens read, beginning again with each document; None where
        documents run on."""
        if not self.apart:
            return None
        return packed_positions(self._windowed(self.starts_T))

    @property
    def named_NT(self) -> npt.NDArray[np.bool_]:
        """(N, context): names_T of the tokens read."""
        return self._windowed(self.names_T)

    @property
    def read_starts_T(self) -> npt.NDArray[np.bool_] | None:
        """Of `stream_T`, where documents are apart."""
        return self.starts_T[: len(self.stream_T)] if self.apart else None

    def _windowed(self, values_T: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        windows = len(self.windows_NT)
        return values_T[: windows * self.context].reshape(windows, self.context)

    def bands(
        self, counts: Sequence[NgramCounts], canonical_V: npt.NDArray[np.integer]
    ) -> npt.NDArray[np.int8]:
        """(orders, T) for `stream_T`, as `window_bands` gives them."""
        ids_T, starts_T = self.stream_T, self.read_starts_T
        found = [window_bands(each, canonical_V[ids_T], self.context, starts_T) for each in counts]
        return np.array(found, dtype=np.int8).reshape(len(counts), len(ids_T) - 1)

    @property
    def stream_T(self) -> Integers:
        """The ids of these windows, one behind another."""
        return self.ids_T[: self.windows_NT.shape[0] * self.context + 1]

    @property
    def stream_bytes(self) -> int:
        """Of text, that all but the first of these stand for."""
        return int(self.bytes_T[1 : len(self.stream_T)].sum())

    def counts(self, canonical: CanonicalMap, max_order: int) -> list[NgramCounts]:
        """Of the corpus, orders 2 to max_order; [] without a corpus."""
        if self.corpus_C is None:
            return []
        canonical_C = canonical.ids_V.numpy()[self.corpus_C]
        return [
            count_ngrams(canonical_C, order, base=canonical.canonical_ids)
            for order in range(2, max_order + 1)
        ]


def encoded(
    texts: Iterable[tuple[str, bool]], tokenizer: Any, limit: int | None = None
) -> dict[str, Any]:
    """ids_T, bytes_T, starts_T and names_T of a material, of at most `limit` ids. texts: text, and
    whether a document starts with it. DataError for a tokenizer that has no token for some."""
    separator, backend = separator_of(tokenizer), backend_of(tokenizer)
    unknown = unknown_ids(tokenizer) - {separator}
    ids: list[int] = []
    sizes: list[int] = []
    names: list[bool] = []
    begins: list[int] = []
    for text, starts in texts:
        if limit is not None and len(ids) >= limit:
            break
        encoding = backend.encode(text, add_special_tokens=False)
        if unknown & set(encoding.ids):
            raise DataError(f"the tokenizer has no token for part of {text[:40]!r}")
        if starts:
            begins.append(len(ids))
            ids.append(separator)
            sizes.append(0)
            names.append(False)
        ids += encoding.ids
        sizes += [len(part.encode()) for part in cut(text, encoding.offsets)]
        names += name_ends(text, encoding.offsets)
    starts_T = np.zeros(len(ids), dtype=bool)
    starts_T[begins] = True
    return {
        "ids_T": np.array(ids[:limit], dtype=np.int64),
        "starts_T": starts_T[:limit],
        "bytes_T": np.array(sizes[:limit], dtype=np.int64),
        "names_T": np.array(names[:limit], dtype=bool),
    }


def trained_apart(model: Any) -> bool:
    """Whether a model of ours was trained on documents that see nothing of one another, as its
    memory's rule says. False of all others, which do not tell."""
    memory = getattr(model.config, "memory_config", None)
    if memory is None or model.config.model_type != "engram_lm":
        return False
    return bool(memory.specification.boundary_rule == "document")


def name_ends(text: str, offsets: Sequence[tuple[int, int]]) -> list[bool]:
    """Of each token, whether a name ends with it that has tokens before it."""
    names = [match.span() for match in NAME.finditer(text)]
    last = {end: start for start, end in names}
    return [end in last and last[end] < start - 1 for start, end in offsets]


def validation(tokenizer: Any, limit: int) -> dict[str, Any]:
    """The text of a material: the shipped corpus's validation documents, of at most `limit` ids."""
    texts = ((text, True) for text in corpus.documents("validation"))
    return {"text": "WordNet's validation documents", **encoded(texts, tokenizer, limit)}


def wordnet(tokenizer: Any, sizes: Sizes) -> Material:
    """The shipped corpus: its validation documents are the text; those of training are counted, in
    the order in which `engram demo` reads them."""
    texts = corpus.documents("train")
    order = np.random.default_rng(0).permutation(len(texts))
    counted = stream(((texts[place], True) for place in order), tokenizer, sizes.corpus_tokens)
    return Material(
        **validation(tokenizer, sizes.tokens + 1),
        corpus=f"the first {len(counted['corpus_C']):,} tokens of WordNet's training documents",
        **counted,
        context=sizes.context,
    )


def read(path: Path, tokenizer: Any, sizes: Sizes) -> Material:
    """A text file, or the documents of a .jsonl one, without a corpus. DataError where it cannot be
    read or holds nothing."""
    found = encoded(parts(path), tokenizer, sizes.tokens + 1)
    if not len(found["ids_T"]):
        raise DataError(f"{path}: no text")
    return Material(text=path.name, sentences=beginning(path), context=sizes.context, **found)


def parts(path: Path) -> Iterator[tuple[str, bool]]:
    """A file's text as `encoded` and `stream` take it."""
    return ((piece.text, piece.starts) for piece in pieces(path))


def beginning(path: Path) -> tuple[str, ...]:
    """The first lines of a file that hold text, at most SHOWN of them, long ones cut."""
    lines = (line for text, _ in parts(path) for line in text.splitlines() if line.strip())
    return tuple(line[:LONG] for line in islice(lines, SHOWN))


def stream(
    texts: Iterable[tuple[str, bool]], tokenizer: Any, limit: int | None = None
) -> dict[str, Any]:
    """corpus_C and corpus_starts_C of a material: documents behind one another, each behind a
    separator; texts: as `encoded` takes them, tokenised in batches of a few megabytes."""
    separator, backend = separator_of(tokenizer), backend_of(tokenizer)
    ids: list[int] = []
    begins: list[int] = []
    for part, piece in token_ids(_pieces(texts), backend):
        if piece.starts:
            begins.append(len(ids))
            ids.append(separator)
        ids += part
        if limit is not None and len(ids) >= limit:
            break
    starts_C = np.zeros(len(ids), dtype=bool)
    starts_C[begins] = True
    return {
        "corpus_C": np.array(ids[:limit], dtype=np.int64),
        "corpus_starts_C": starts_C[:limit],
    }


def _pieces(texts: Iterable[tuple[str, bool]]) -> Iterator[Piece]:
    read = 0
    for text, starts in texts:
        read += len(text.encode())
        yield Piece(text, starts, read)
