"""Needles in a haystack: values that a long context says once, asked for at its end.

After RULER's NIAH tasks (Hsieh et al. 2024), in token ids, with keys of 2 or 3 tokens as names have
them. single: one key among noise. multikey: every statement is a needle, one is asked. multivalue:
one key has several values, all wanted. multiquery: several keys, all asked in turn.

Shows: retrieval over a distance, where a key is a name that must be composed first: what a memory
may take off attention's hands. Cannot show: facts; models that were not trained on the form;
RULER's own scores, which need its texts and an instruction-tuned model.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engram_lm.errors import ConfigError
from engram_lm.evaluate.answers import Question

SEPARATOR, PAD, IS, ASK, STOP = range(5)
KINDS = ("single", "multikey", "multivalue", "multiquery")


@dataclass(frozen=True, kw_only=True)
class Needles:
    """ConfigError for needles that do not fit into `length` tokens."""

    length: int = 512
    """Of a document with its answers, at most."""
    digits: int = 3
    """Tokens of a value."""
    wanted: int = 4
    """Values, or keys that are asked, of the last two kinds; keys of `multikey` fill the length."""
    parts: int = 60
    """Tokens that the parts of keys are made of, each."""
    noise: int = 200

    def __post_init__(self) -> None:
        if min(self.digits, self.wanted) < 1 or self.parts < 2 or self.noise < 1:
            raise ConfigError("digits, wanted and noise are 1 or more, parts 2")
        if self.length < self._needed:
            raise ConfigError(f"length={self.length}: {self._needed} tokens are needed")
        if self.length // self._statement > self.parts**2:
            raise ConfigError(
                f"parts={self.parts}: {self.parts**2} keys are too few for length={self.length}"
            )

    @property
    def _statement(self) -> int:
        return 3 + 1 + self.digits + 1

    @property
    def _needed(self) -> int:
        return 1 + self.wanted * (2 * self._statement + 1)

    @property
    def vocabulary(self) -> int:
        """Token ids, from 0: marks, ten digits, parts of keys, noise."""
        return STOP + 1 + 10 + 3 * self.parts + self.noise

    def words(self) -> list[str]:
        """What each token id is called, so that a tokenizer can be made of them."""
        parts = [f"{part}{n}" for part in ("first", "middle", "last") for n in range(self.parts)]
        noise = [f"noise{n}" for n in range(self.noise)]
        return ["<separator>", "<pad>", "<is>", "<ask>", ".", *"0123456789", *parts, *noise]

    @property
    def chance(self) -> float:
        """Of one value, guessed digit by digit."""
        return 0.1**self.digits

    def documents(self, seed: int) -> Iterator[list[int]]:
        """Of training, without end: all kinds in turn, what is asked is answered."""
        drawn = np.random.default_rng([1, seed])
        while True:
            for kind in KINDS:
                ids, asked = self._document(drawn, kind)
                for key, values in asked:
                    ids += [ASK, *key, IS, *values, STOP]
                yield ids

    def questions(self, number: int, seed: int = 0) -> list[Question]:
        """`number` of each kind; of `multiquery` the last key asked, the others answered before."""
        drawn = np.random.default_rng([2, seed])
        found = []
        for kind in KINDS:
            for _ in range(number):
                ids, asked = self._document(drawn, kind)
                for key, values in asked[:-1]:
                    ids += [ASK, *key, IS, *values, STOP]
                key, values = asked[-1]
                found.append(
                    Question(prompt=(*ids, ASK, *key, IS), answer=tuple(values), kind=kind)
                )
        return found

    def _document(
        self, drawn: np.random.Generator, kind: str
    ) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
        """The haystack, and what is asked: keys and the values they have."""
        several = kind in ("multivalue", "multiquery")
        asked = self.wanted if several else 1
        answers = asked * (self._statement + 1)
        room = self.length - 1 - answers
        needles = room // self._statement if kind == "multikey" else asked
        keys = self._keys(drawn, 1 if kind == "multivalue" else needles)
        digits = STOP + 1 + drawn.integers(10, size=(needles, self.digits))
        said = [
            [*keys[place % len(keys)], IS, *value, STOP]
            for place, value in enumerate(digits.tolist())
        ]
        quiet = room - sum(map(len, said))
        gaps = drawn.multinomial(quiet, np.full(needles + 1, 1 / (needles + 1)))
        first_noise = STOP + 1 + 10 + 3 * self.parts
        ids = [SEPARATOR]
        for gap, statement in zip(gaps, [*said, []], strict=True):
            ids += (first_noise + drawn.integers(self.noise, size=gap)).tolist() + statement
        if kind == "multivalue":
            return ids, [(keys[0], [digit for value in digits.tolist() for digit in value])]
        chosen = drawn.permutation(needles)[:asked]
        return ids, [(keys[place], digits[place].tolist()) for place in chosen]

    def _keys(self, drawn: np.random.Generator, number: int) -> list[list[int]]:
        """Different in their first and last parts; half of them have one in the middle."""
        pairs = drawn.choice(self.parts**2, size=number, replace=False)
        first, middle, last = (STOP + 1 + 10 + place * self.parts for place in range(3))
        return [
            [
                first + int(pair) // self.parts,
                *([middle + int(drawn.integers(self.parts))] if drawn.random() < 0.5 else []),
                last + int(pair) % self.parts,
            ]
            for pair in pairs
        ]
