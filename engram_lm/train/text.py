"""The text of a run, as every worker reads it. Main tokenises and checks; the others wait."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from engram_lm import corpus
from engram_lm.train.encoder import Encoder
from engram_lm.train.shards import Shards
from engram_lm.train.stream import Continuous, Ids, Stream
from engram_lm.train.workers import Workers


class Text(NamedTuple):
    """What a run trains on and is judged by, with the tokenizer of both."""

    training: Stream
    validation: Stream
    tokenizer: PreTrainedTokenizerFast
    encoder: Encoder | None
    """Of token shards; None for the WordNet corpus, whose ids the presets have."""


def wordnet_stream(split: str, limit: int | None = None, *, seed: int = 0) -> Continuous:
    """What `corpus.tokens` gives, as training reads it."""
    return Continuous(corpus.tokens(split, limit, seed=seed).ids, corpus.token_bytes())


def wordnet(tokens: int, workers: Workers) -> Text:
    """The corpus that ships with the package: about `tokens` of it, tokenised by main."""
    streams: dict[str, Ids | None] = {"train": None, "validation": None}
    with workers.main_first("the WordNet corpus"):
        if workers.main:
            limits = {"train": tokens, "validation": None}
            streams = {split: corpus.tokens(split, limits[split]).ids for split in streams}
    training, validation = (
        Continuous(_given(ids, workers), corpus.token_bytes()) for ids in streams.values()
    )
    return Text(training, validation, corpus.tokenizer(), None)


def token_shards(directory: Path, workers: Workers) -> Text:
    """What `engram data` wrote, in a directory that all workers see; main checks its files."""
    with workers.main_first(str(directory)):
        shards = Shards(directory, check=workers.main)
    encoder = shards.encoder
    return Text(shards.split("train"), shards.split("validation"), encoder.fast(), encoder)


def _given(ids: Ids | None, workers: Workers) -> Ids:
    """Main's array, for all."""
    if workers.size == 1:
        assert ids is not None
        return ids
    size = torch.tensor(0 if ids is None else len(ids))
    with workers.guard("main's token ids"):
        dist.broadcast(size, 0)
        if ids is None:
            ids = np.empty(int(size), dtype=np.uint16)
        dist.broadcast(torch.from_numpy(ids.view(np.uint8)), 0)
    return ids
