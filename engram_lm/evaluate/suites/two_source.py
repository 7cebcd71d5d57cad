"""Two-source recall: facts that were only trained against facts that stand in the context.

Both speak of the same entities, of 2 or 3 tokens, in the same words. A trained fact is fixed for
all of training and asked with nothing before it; a given one is drawn anew for each document, said
there, and asked there. Each in two layouts: `after`, where the answer follows the entity's last
token (the suffix n-gram names it), and `later`, where `bridge` tokens stand between them, more than
an n-gram reaches.

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
    stated: int = 4
    """Facts that a document with given ones says before it asks."""

    def __post_init__(self) -> None:
        if self.entities + self.unknown > self.parts**2 // 2:
            raise ConfigError(
                f"entities={self.entities}: parts={self.parts} make too few names for them"
            )
        if min(self.entities, self.relations, self.values - 1, self.bridge, self.stated) < 1:
            raise ConfigError("entities, relations, bridge and stated are 1 or more, values 2")

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
        of given ones, about as long as one another."""
        drawn = np.random.default_rng([self.seed, 2, seed])
        names, facts = self.names(), self.facts()
        while True:
            if drawn.random() < 0.5:
                ids = [SEPARATOR]
                for _ in range(2 * self.stated):
                    entity, relation = self._drawn(drawn, self.entities)
                    layout = LAYOUTS[drawn.integers(2)]
                    ids += self.query(names[entity], relation, layout)
                    ids += [self.answer(relation, int(facts[entity, relation])), STOP]
                yield ids
            else:
                ids, asked = self._given(drawn, names, 0, self.entities)
                for entity, relation, value in asked:
                    layout = LAYOUTS[drawn.integers(2)]
                    ids += self.query(names[entity], relation, layout)
                    ids += [self.answer(relation, value), STOP]
                yield ids

    def questions(self, number: int, seed: int = 0) -> list[Question]:
        """`number` of each kind and layout, `trained/after` and so on; documents of given facts are
        none that training has seen."""
        drawn = np.random.default_rng([self.seed, 3, seed])
        names, facts = self.names(), self.facts()
        found = []
        for layout in LAYOUTS:
            for _ in range(number):
                entity, relation = self._drawn(drawn, self.entities)
                found.append(
                    Question(
                        prompt=(SEPARATOR, *self.query(names[entity], relation, layout)),
                        answer=(self.answer(relation, int(facts[entity, relation])),),
                        kind=f"trained/{layout}",
                    )
                )
            for kind, first, count in (
                ("given", 0, self.entities),
                ("unknown", self.entities, self.unknown),
            ):
                for _ in range(number):
                    ids, asked = self._given(drawn, names, first, count)
                    entity, relation, value = asked[0]
                    found.append(
                        Question(
                            prompt=(*ids, *self.query(names[entity], relation, layout)),
                            answer=(self.answer(relation, value),),
                            kind=f"{kind}/{layout}",
                        )
                    )
        return found

    def _drawn(self, drawn: np.random.Generator, entities: int) -> tuple[int, int]:
        return int(drawn.integers(entities)), int(drawn.integers(self.relations))

    def _given(
        self, drawn: np.random.Generator, names: list[tuple[int, ...]], first: int, count: int
    ) -> tuple[list[int], list[tuple[int, int, int]]]:
        """A document up to what is asked, and what may be: entity, relation, value; shuffled."""
        entities = first + drawn.choice(count, size=min(self.stated, count), replace=False)
        said = [
            (int(e), int(drawn.integers(self.relations)), int(drawn.integers(self.values)))
            for e in entities
        ]
        ids = [SEPARATOR, GIVEN]
        for entity, relation, value in said:
            ids += self.query(names[entity], relation, LAYOUTS[drawn.integers(2)])
            ids += [self.answer(relation, value), STOP]
        order = drawn.permutation(len(said))
        return [*ids, ASK], [said[place] for place in order]
