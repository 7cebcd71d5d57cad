"""Associative recall of random pairs (MQAR) and of repeated text (induction): negative controls.

MQAR (Arora et al. 2023; zoology's generator, from its description): pairs of a key and a value
come first, then each key once more, its gap drawn by a power law; wanted is its value there.
Induction: a random stretch is said twice; wanted is every token of the second time but the first.

Shows: whether a model looks back into its context. The pairs are drawn anew for each sequence, so
a table of n-grams has nothing to hold: a memory that helps here does something else than remember,
or the short convolution does it, which alone solves the step from a key to its value. Cannot show:
anything about facts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluate.answers import NOT_FINITE
from engram_lm.evaluate.inference import inference

IGNORED = -100
"""Of labels: nothing is wanted there. transformers' own mark."""


class Labelled(NamedTuple):
    """Sequences, and what is wanted at which places."""

    ids_NT: npt.NDArray[np.int64]
    labels_NT: npt.NDArray[np.int64]
    """The token that should come next, or IGNORED."""


def recalled(
    model: Any,
    asked: Labelled,
    *,
    batch: int = 32,
    progress: Callable[[int], None] | None = None,
) -> npt.NDArray[np.float64]:
    """Share of each sequence's labels that are the model's likeliest next token, (N,).

    progress: sequences so far. DataError where logits are not finite numbers.
    """
    found = []
    with inference(model):
        for first in range(0, len(asked.ids_NT), batch):
            ids_NT, labels_NT = (
                torch.from_numpy(part[first : first + batch]).to(model.device) for part in asked
            )
            logits_NTV = model(input_ids=ids_NT, use_cache=False).logits
            if not torch.isfinite(logits_NTV).all():
                raise DataError(NOT_FINITE)
            said_NT = logits_NTV.argmax(-1)
            wanted_NT = labels_NT != IGNORED
            hits_N = ((said_NT == labels_NT) & wanted_NT).sum(1)
            found.append((hits_N.double() / wanted_NT.sum(1)).cpu().numpy())
            if progress is not None:
                progress(min(first + batch, len(asked.ids_NT)))
    return np.concatenate(found)


@dataclass(frozen=True, kw_only=True)
class MQAR:
    """ConfigError for sizes that do not fit."""

    vocabulary: int = 8_192
    """Keys are from its lower half, values from its upper."""
    length: int = 256
    pairs: int = 16
    exponent: float = 0.01
    """Of the power law of gaps, g ** (exponent - 1): zoology's alpha. Near 0, as many gaps between
    1 and 10 as between 10 and 100."""

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= self.length // 4 or self.vocabulary < 4 * self.pairs:
            raise ConfigError(
                f"pairs={self.pairs}: 1 to {self.length // 4} go into length={self.length}, with a "
                f"vocabulary of 4 times as many ids or more, not {self.vocabulary}"
            )
        if not 0 <= self.exponent <= 2:
            raise ConfigError(f"exponent={self.exponent}: 0 to 2")

    @property
    def chance(self) -> float:
        """Of a guess among the sequence's own values."""
        return 1 / self.pairs

    def sequences(self, number: int, seed: int) -> Labelled:
        """Elsewhere stand random values as filler; wanted is nothing there."""
        drawn = np.random.default_rng(seed)
        half = self.vocabulary // 2
        ids_NT = drawn.integers(half, self.vocabulary, size=(number, self.length))
        labels_NT = np.full_like(ids_NT, IGNORED)
        # A query takes two places: the key, and the value that answers it.
        slots = (self.length - 2 * self.pairs) // 2
        weights = np.arange(1, slots + 1) ** (self.exponent - 1.0)
        for ids_T, labels_T in zip(ids_NT, labels_NT, strict=True):
            keys = 1 + drawn.choice(half - 1, size=self.pairs, replace=False)
            values = half + drawn.choice(self.vocabulary - half, size=self.pairs, replace=False)
            ids_T[0 : 2 * self.pairs : 2], ids_T[1 : 2 * self.pairs : 2] = keys, values
            gaps = drawn.choice(slots, size=self.pairs, replace=False, p=weights / weights.sum())
            places = 2 * self.pairs + 2 * gaps
            ids_T[places], ids_T[places + 1], labels_T[places] = keys, values, values
        return Labelled(ids_NT, labels_NT)


@dataclass(frozen=True, kw_only=True)
class Induction:
    """ConfigError for a stretch that does not fit twice."""

    vocabulary: int = 8_192
    length: int = 256
    stretch: int = 32

    def __post_init__(self) -> None:
        if not 2 <= self.stretch <= self.length // 2:
            raise ConfigError(
                f"stretch={self.stretch}: 2 to {self.length // 2}, half of length={self.length}"
            )
        if self.vocabulary < 2:
            raise ConfigError(f"vocabulary={self.vocabulary}: 2 ids or more")

    @property
    def chance(self) -> float:
        """Of a guess among the stretch's tokens."""
        return 1 / self.stretch

    def sequences(self, number: int, seed: int) -> Labelled:
        """Random ids, in which a stretch stands at a random place and at the end."""
        drawn = np.random.default_rng(seed)
        ids_NT = drawn.integers(1, self.vocabulary, size=(number, self.length))
        labels_NT = np.full_like(ids_NT, IGNORED)
        for ids_T, labels_T in zip(ids_NT, labels_NT, strict=True):
            first = int(drawn.integers(self.length - 2 * self.stretch + 1))
            ids_T[-self.stretch :] = ids_T[first : first + self.stretch]
            labels_T[-self.stretch : -1] = ids_T[-self.stretch + 1 :]
        return Labelled(ids_NT, labels_NT)
