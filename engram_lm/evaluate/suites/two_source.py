"""Two-source recall: facts that were only trained against facts that stand in the context.

Both speak of the same entities, of 2 or 3 tokens, in the same words. A trained fact is fixed for
all of training and asked with nothing before it; a given one is drawn anew for each document, said
there, and asked there. A document gives every relation of one entity, so that reading is to find
what it says of the relation. Each in two layouts: `after`, where the answer follows the entity's
last token (the suffix n-gram names it), and `later`, where `bridge` tokens stand between them, more
than an n-gram reaches.

Shows: whether switching a memory off takes the trained facts and leaves the reading, with chance
known, words equal and cause known. `unknown` entities were never trained on: reading them is
reading alone. Cannot show: anything of language; that a backbone would not have stored the facts
had it had to; or what happens where a fact stands in many wordings. The short convolution reaches
nine places back, beyond the bridge: a model with one may carry rows there without attention.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engram_lm.errors import ConfigError
from engram_lm.evaluate.answers import Question

SEPARATOR, PAD, GIVEN, ASK, STOP = range(5)
LAYOUTS = ("after", "later")
KINDS = ("trained", "given", "unknown")


@dataclass(frozen=True, kw_only=True)
class TwoSource:
    """A world of facts. ConfigError where the names cannot be told apart."""

    seed: int = 0
    entities: int = 1_000
    """Trained ones; a tenth as many more are never trained on."""
    parts: int = 60
    """Tokens that first, middle and last names are made of, each: one token names nobody."""
    relations: int = 4
    values: int = 50
    """Of each relation: chance is one in so many."""
    bridge: int = 3
    """Tokens between entity and answer in the layout `later`; n-grams must be no longer."""
    rounds: int = 2
    """How often a document with given facts asks for each of them."""

    def __post_init__(self) -> None:
        if self.entities + self.unknown > self.parts**2 // 2:
            raise ConfigError(
                f"entities={self.entities}: parts={self.parts} make too few names for them"
            )
        if min(self.entities, self.relations, self.values - 1, self.bridge, self.rounds) < 1:
            raise ConfigError("entities, relations, bridge and rounds are 1 or more, values 2")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: 0 or more")

    @property
    def unknown(self) -> int:
        """Entities that stand in no document of training."""
        return max(1, self.entities // 10)

    @property
    def vocabulary(self) -> int:
        """Token ids, from 0."""
        per_relation = 1 + self.bridge + self.values
        return STOP + 1 + 3 * self.parts + self.relations * per_relation

    @property
    def chance(self) -> float:
        """Of a guess among a relation's values."""
        return 1 / self.values

    def words(self) -> list[str]:
        """What each token id is called, so that a tokenizer can be made of them."""
        parts = [f"{part}{n}" for part in ("first", "middle", "last") for n in range(self.parts)]
        said = [
            word
            for relation in range(self.relations)
            for word in (
                f"relation{relation}",
                *(f"relation{relation}bridge{n}" for n in range(self.bridge)),
                *(f"relation{relation}value{n}" for n in range(self.values)),
            )
        ]
        return ["<separator>", "<pad>", "<given>", "<ask>", ".", *parts, *said]

    def names(self) -> list[tuple[int, ...]]:
        """Token ids of every entity, the unknown ones last: half of 2 tokens, half of 3."""
        drawn = np.random.default_rng([self.seed, 0])
        first, middle, last = (STOP + 1 + place * self.parts for place in range(3))
        pairs = drawn.permutation(self.parts**2)[: self.entities + self.unknown]
        long = drawn.random(len(pairs)) < 0.5
        middles = drawn.integers(self.parts, size=len(pairs))
        return [
            (
                first + int(pair) // self.parts,
                *((middle + int(between),) if three else ()),
                last + int(pair) % self.parts,
            )
            for pair, three, between in zip(pairs, long, middles, strict=True)
        ]

    def facts(self) -> npt.NDArray[np.int64]:
        """(entities, relations): the value, from 0, that is fixed for all of training."""
        drawn = np.random.default_rng([self.seed, 1])
        return drawn.integers(self.values, size=(self.entities, self.relations))

    def query(self, name: tuple[int, ...], relation: int, layout: str) -> list[int]:
        """All that stands before the answer."""
        first = STOP + 1 + 3 * self.parts + relation * (1 + self.bridge + self.values)
        if layout == "after":
            return [first, *name]
        return [*name, *range(first + 1, first + 1 + self.bridge)]

    def answer(self, relation: int, value: int) -> int:
        """Its token id."""
        per_relation = 1 + self.bridge + self.values
        return STOP + 1 + 3 * self.parts + relation * per_relation + 1 + self.bridge + value

    def documents(self, seed: int) -> Iterator[list[int]]:
        """Documents of training without end, each behind a separator: half of trained facts, half
        of given ones, with as many facts and answers in each."""
        drawn = np.random.default_rng([self.seed, 2, seed])
        names, facts = self.names(), self.facts()
        while True:
            if drawn.random() < 0.5:
                ids = [SEPARATOR]
                for _ in range((1 + self.rounds) * self.relations):
                    entity = int(drawn.integers(self.entities))
                    relation = int(drawn.integers(self.relations))
                    ids += self._fact(drawn, names[entity], relation, int(facts[entity, relation]))
            else:
                name = names[int(drawn.integers(self.entities))]
                values = drawn.integers(self.values, size=self.relations)
                ids = self._given(drawn, name, values)
                for _ in range(self.rounds):
                    for relation in drawn.permutation(self.relations):
                        ids += self._fact(drawn, name, int(relation), int(values[relation]))
            yield ids

    def questions(self, number: int, seed: int = 0) -> list[Question]:
        """`number` of each kind and layout, `trained/after` and so on; documents of given facts are
        none that training has seen."""
        drawn = np.random.default_rng([self.seed, 3, seed])
        names, facts = self.names(), self.facts()
        found = []
        for layout in LAYOUTS:
            for kind in KINDS:
                own = (self.entities, self.entities + self.unknown)
                first, end = own if kind == "unknown" else (0, self.entities)
                for _ in range(number):
                    entity = int(drawn.integers(first, end))
                    relation = int(drawn.integers(self.relations))
                    if kind == "trained":
                        before, value = [SEPARATOR], facts[entity, relation]
                    else:
                        values = drawn.integers(self.values, size=self.relations)
                        before, value = self._given(drawn, names[entity], values), values[relation]
                    found.append(
                        Question(
                            prompt=(*before, *self.query(names[entity], relation, layout)),
                            answer=(self.answer(relation, int(value)),),
                            kind=f"{kind}/{layout}",
                        )
                    )
        return found

    def _fact(
        self, drawn: np.random.Generator, name: tuple[int, ...], relation: int, value: int
    ) -> list[int]:
        """In a layout that is drawn."""
        layout = LAYOUTS[drawn.integers(2)]
        return [*self.query(name, relation, layout), self.answer(relation, value), STOP]

    def _given(
        self, drawn: np.random.Generator, name: tuple[int, ...], values: npt.NDArray[np.int64]
    ) -> list[int]:
        """A document of one entity, up to where it asks."""
        ids = [SEPARATOR, GIVEN]
        for relation in drawn.permutation(self.relations):
            ids += self._fact(drawn, name, int(relation), int(values[relation]))
        return [*ids, ASK]
