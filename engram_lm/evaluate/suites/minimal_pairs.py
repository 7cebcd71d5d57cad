"""Pairs of sentences, one right and one wrong, in the format of BLiMP (Warstadt et al. 2020).

In: JSON lines with "sentence_good" and "sentence_bad", and "UID" for the kind (the file's name
without it). A pair counts where the right sentence has the higher log-probability, as BLiMP scores.

Shows: grammar that a model of 10M parameters or more, trained on ordinary text, has learned; chance
is one half. Cannot show much of a smaller model, or of one trained on made-up text; and nothing of
facts, so a memory that changes it changes language, not knowledge.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluate.answers import Question, answers, separator_of

CHANCE = 0.5


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What is right, what is wrong, and what they are an example of."""

    good: str
    bad: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class MinimalPairs:
    """Of the files that `read_pairs` reads. ConfigError for none."""

    pairs: tuple[Pair, ...]

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ConfigError("pairs: 1 or more")

    def some(self, number: int, seed: int) -> list[Pair]:
        """At most `number` of each kind, drawn by `seed`."""
        drawn = np.random.default_rng([2, seed])
        by_kind: dict[str, list[Pair]] = {}
        for pair in self.pairs:
            by_kind.setdefault(pair.kind, []).append(pair)
        return [
            pairs[place]
            for pairs in by_kind.values()
            for place in np.sort(drawn.permutation(len(pairs))[:number])
        ]


def read_pairs(path: Path) -> list[Pair]:
    """DataError names the line that is no pair."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            good, bad = record["sentence_good"], record["sentence_bad"]
            if not (isinstance(good, str) and isinstance(bad, str)):
                raise TypeError("sentences must be strings")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'{path}: line {number} is no pair of "sentence_good" and "sentence_bad" ({error})'
            ) from error
        found.append(Pair(good=good, bad=bad, kind=str(record.get("UID", path.stem))))
    if not found:
        raise DataError(f"{path}: no pairs")
    return found


def preferred(
    model: Any,
    tokenizer: Any,
    pairs: Iterable[Pair],
    *,
    batch: int = 32,
    progress: Callable[[int], None] | None = None,
) -> npt.NDArray[np.bool_]:
    """True where the right sentence is the likelier one, each behind a separator.

    DataError for a tokenizer without a bos or eos token. progress: sentences so far.
    """
    separator = separator_of(tokenizer)
    questions = [
        Question(
            prompt=(separator,),
            answer=tuple(tokenizer(sentence, add_special_tokens=False)["input_ids"]),
            kind=pair.kind,
        )
        for pair in pairs
        for sentence in (pair.good, pair.bad)
    ]
    nats = answers(model, questions, batch=batch, progress=progress).nats.reshape(-1, 2)
    better: npt.NDArray[np.bool_] = nats[:, 0] < nats[:, 1]
    return better
