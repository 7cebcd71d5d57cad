"""The corpus that ships with the package: WordNet 3.0 as prose, and its tokenizer.

In: the files of `engram_lm/wordnet`, which `recipes/wordnet.py` made. Out: documents as
strings, or as one stream of token ids in which each document follows an `<|endoftext|>`.
"""

from __future__ import annotations

import lzma
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from engram_lm.errors import DataError

SPLITS = ("train", "validation")
SEPARATOR = "<|endoftext|>"
PADDING = "<|pad|>"
BATCH_DOCUMENTS = 2_048


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A stream of token ids, and how many bytes of UTF-8 text they stand for.

    Separators stand for none, so a loss in nats over `ids` is bits per byte once it is divided
    by `bytes` and by ln 2.
    """

    ids: npt.NDArray[np.uint16]
    bytes: int


def documents(split: str) -> list[str]:
    """Every document of "train" or "validation", in the file's fixed random order."""
    if split not in SPLITS:
        raise DataError(f"split={split!r}: the corpus has {' and '.join(map(repr, SPLITS))}")
    packed = (files("engram_lm") / "wordnet" / f"{split}.txt.xz").read_bytes()
    return lzma.decompress(packed).decode().removesuffix("\n").split("\n")


def tokenizer_file() -> Path:
    """Where the shipped tokenizer.json lies."""
    return Path(str(files("engram_lm") / "wordnet" / "tokenizer.json"))


def tokenizer() -> PreTrainedTokenizerFast:
    """The shipped tokenizer of 8,192 token ids; `<|endoftext|>` both begins and ends a text."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file()),
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=PADDING,
    )


def token_bytes() -> npt.NDArray[np.int64]:
    """How many bytes of UTF-8 text each token id stands for, (8192,); 0 for the specials."""
    fast = Tokenizer.from_file(str(tokenizer_file()))
    sizes = np.zeros(fast.get_vocab_size(), dtype=np.int64)
    for token, token_id in fast.get_vocab().items():
        # A byte-level token is written with one character for each of its bytes.
        sizes[token_id] = 0 if token in (SEPARATOR, PADDING) else len(token)
    return sizes


def tokens(
    split: str,
    limit: int | None = None,
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Tokens:
    """The split's documents in an order drawn by `seed`, as one stream of token ids.

    At most `limit` token ids; hardly more than it returns are encoded. `progress` is called with
    the number of token ids so far.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}: ask for 1 token or more, or None for the whole split")
    texts = documents(split)
    fast = Tokenizer.from_file(str(tokenizer_file()))
    separator = fast.get_vocab()[SEPARATOR]
    order = np.random.default_rng(seed).permutation(len(texts))
    ids: list[int] = []
    for start in range(0, len(order), BATCH_DOCUMENTS):
        batch = [texts[document] for document in order[start : start + BATCH_DOCUMENTS]]
        for encoding in fast.encode_batch_fast(batch):
            ids.append(separator)
            ids.extend(encoding.ids)
        if progress is not None:
            progress(len(ids) if limit is None else min(len(ids), limit))
        if limit is not None and len(ids) >= limit:
            break
    stream = np.array(ids[:limit], dtype=np.uint16)
    return Tokens(ids=stream, bytes=int(token_bytes()[stream].sum()))
