"""Made-up people and what is known of them: how many bits a model holds (bioS-like capacity).

After Allen-Zhu and Li (2404.05405): N people, each with a name and some attributes drawn evenly
from lists; sentences state them. What a model holds is counted in bits: for each attribute of V
values log2 V less what it still costs the model to name it, never below zero, over all N people.

Shows: bits per parameter, and per active parameter, as N grows on a fixed backbone, with memory
rows beside it or without. Cannot show: knowledge that must be combined or inferred; the paper's
"2 bits per parameter" is of 1,000 sightings of each person, many more than minutes allow, so
compare arms of equal sightings only.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluate.answers import Answers, Question

SEPARATOR, PAD, STOP = range(3)
ATTRIBUTES = {"city": 200, "university": 300, "major": 100, "employer": 263, "month": 12, "day": 28}
"""How many values each has; birth years, 200 more, are left out: they are one list like another."""


@dataclass(frozen=True, kw_only=True)
class People:
    """ConfigError where there are fewer names than people."""

    number: int = 1_000
    seed: int = 0
    first_names: int = 100
    middle_names: int = 100
    last_names: int = 200
    attributes: Mapping[str, int] = field(default_factory=lambda: dict(ATTRIBUTES))

    def __post_init__(self) -> None:
        names = self.first_names * self.middle_names * self.last_names
        if not 1 <= self.number <= names:
            raise ConfigError(f"number={self.number}: 1 to {names}, the names there are")
        counts = list(self.attributes.values())
        if not counts or not all(isinstance(count, int) and count > 1 for count in counts):
            raise ConfigError("attributes: one or more, of 2 values or more each")
        for name in self.attributes:
            if not (name.isalpha() and name.islower()):
                raise ConfigError(f"attributes: {name!r} is no word of lower-case letters")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: 0 or more")

    @property
    def vocabulary(self) -> int:
        """Token ids, from 0."""
        return self._lists()[-1]

    def words(self) -> list[str]:
        """What each token id is called, so that a tokenizer can be made of them."""
        lists = {
            "first": self.first_names,
            "middle": self.middle_names,
            "last": self.last_names,
        }
        names = [f"{name}{n}" for name, count in lists.items() for n in range(count)]
        said = [
            word
            for attribute, values in self.attributes.items()
            for word in (attribute, *(f"{attribute}value{n}" for n in range(values)))
        ]
        return ["<separator>", "<pad>", ".", *names, *said]

    @property
    def bits(self) -> float:
        """Of all people together: what a model that knows everything holds."""
        return self.number * sum(math.log2(values) for values in self.attributes.values())

    def names(self) -> npt.NDArray[np.int64]:
        """(N, 3) token ids, no two people alike."""
        drawn = np.random.default_rng([self.seed, 0])
        names = self.first_names * self.middle_names * self.last_names
        picked = drawn.choice(names, size=self.number, replace=False)
        first = STOP + 1
        middle = first + self.first_names
        last = middle + self.middle_names
        return np.stack(
            [
                first + picked // (self.middle_names * self.last_names),
                middle + picked // self.last_names % self.middle_names,
                last + picked % self.last_names,
            ],
            axis=1,
        )

    def values(self) -> npt.NDArray[np.int64]:
        """(N, attributes), from 0."""
        drawn = np.random.default_rng([self.seed, 1])
        return np.stack(
            [drawn.integers(count, size=self.number) for count in self.attributes.values()], axis=1
        )

    def documents(self, seed: int) -> Iterator[list[int]]:
        """Without end: one person each, their attributes in an order of its own. In one round over
        all people each is told once."""
        drawn = np.random.default_rng([self.seed, 2, seed])
        names, values = self.names(), self.values()
        while True:
            for person in drawn.permutation(self.number):
                ids = [SEPARATOR]
                for attribute in drawn.permutation(len(self.attributes)):
                    ids += self._sentence(names[person], int(attribute))
                    ids += [self._value(int(attribute), int(values[person, attribute])), STOP]
                yield ids

    def questions(self) -> list[Question]:
        """Each attribute of each person, asked with nothing before it; kind: the attribute."""
        names, values = self.names(), self.values()
        return [
            Question(
                prompt=(SEPARATOR, *self._sentence(names[person], place)),
                answer=(self._value(place, int(values[person, place])),),
                kind=attribute,
            )
            for person in range(self.number)
            for place, attribute in enumerate(self.attributes)
        ]

    def learned_bits(self, found: Answers) -> float:
        """What these answers to `questions` say the model holds. DataError for other answers."""
        if len(found.nats) != self.number * len(self.attributes):
            raise DataError(f"{len(found.nats)} answers: they are not those to these questions")
        nats = found.nats.reshape(self.number, len(self.attributes)).mean(axis=0)
        known = [
            max(0.0, math.log2(values) - loss / math.log(2))
            for values, loss in zip(self.attributes.values(), nats, strict=True)
        ]
        return self.number * sum(known)

    def _lists(self) -> list[int]:
        """Where each attribute's ids begin (the word for it, then its values), and the end."""
        begins = [STOP + 1 + self.first_names + self.middle_names + self.last_names]
        for values in self.attributes.values():
            begins.append(begins[-1] + 1 + values)
        return begins

    def _sentence(self, name: npt.NDArray[np.int64], attribute: int) -> list[int]:
        return [*name.tolist(), self._lists()[attribute]]

    def _value(self, attribute: int, value: int) -> int:
        return self._lists()[attribute] + 1 + value
