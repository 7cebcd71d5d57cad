"""Variable tracking: names that hold one value through a chain of assignments, among noise.

After RULER's `vt` (Hsieh et al. 2024), in token ids: SET A 5; SET B A; SET C B; ... in order, noise
and other chains between them; then, for one value, every name that holds it is asked for.

Shows: following references through the context. Names are drawn anew each time, so n-grams hold
nothing of it: a negative control for what is stored, and a test of what attention is free for.
Cannot show: facts; anything of models that were not trained on the form.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engram_lm.errors import ConfigError
from engram_lm.evaluate.answers import Question

SEPARATOR, PAD, SET, TO, ASK, STOP = range(6)


@dataclass(frozen=True, kw_only=True)
class Variables:
    """ConfigError for chains that do not fit."""

    length: int = 128
    """Tokens of a document, at most."""
    chains: int = 2
    hops: int = 3
    """Assignments of a name to a name, in each chain."""
    names: int = 64
    values: int = 32
    noise: int = 64

    def __post_init__(self) -> None:
        if min(self.chains, self.hops) < 1 or self._needed > self.length:
            raise ConfigError(
                f"length={self.length}: {self.chains} chains of {self.hops} hops need "
                f"{self._needed}"
            )
        if self.names < self.chains * (self.hops + 1) or self.values < self.chains:
            raise ConfigError(f"names={self.names}, values={self.values}: too few for the chains")
        if self.noise < 1:
            raise ConfigError(f"noise={self.noise}: 1 or more")

    @property
    def _needed(self) -> int:
        statements = self.chains * (self.hops + 1) * 5
        return 1 + statements + 2 + self.hops + 1 + 1

    @property
    def vocabulary(self) -> int:
        """Token ids, from 0."""
        return STOP + 1 + self.names + self.values + self.noise

    def words(self) -> list[str]:
        """What each token id is called, so that a tokenizer can be made of them."""
        lists = {"name": self.names, "value": self.values, "noise": self.noise}
        said = [f"{kind}{n}" for kind, count in lists.items() for n in range(count)]
        return ["<separator>", "<pad>", "<set>", "<to>", "<ask>", ".", *said]

    @property
    def chance(self) -> float:
        """Of one name, guessed among those of the document. All of a chain: nearly nothing."""
        return 1 / (self.chains * (self.hops + 1))

    def documents(self, seed: int) -> Iterator[list[int]]:
        """Of training, without end: what is asked is answered."""
        drawn = np.random.default_rng([1, seed])
        while True:
            prompt, answer = self._document(drawn)
            yield [*prompt, *answer, STOP]

    def questions(self, number: int, seed: int = 0) -> list[Question]:
        """The names of one chain, in the order in which they were set."""
        drawn = np.random.default_rng([2, seed])
        found = []
        for _ in range(number):
            prompt, answer = self._document(drawn)
            found.append(Question(prompt=tuple(prompt), answer=tuple(answer), kind="variables"))
        return found

    def _document(self, drawn: np.random.Generator) -> tuple[list[int], list[int]]:
        first_name = STOP + 1
        first_value = first_name + self.names
        first_noise = first_value + self.values
        links = self.hops + 1
        names = first_name + drawn.choice(self.names, size=(self.chains, links), replace=False)
        values = first_value + drawn.choice(self.values, size=self.chains, replace=False)
        # Each chain keeps its order; which chain speaks next is drawn.
        turns = drawn.permutation(np.repeat(np.arange(self.chains), links))
        spare = drawn.multinomial(self.length - self._needed, np.full(len(turns), 1 / len(turns)))
        ids, said = [SEPARATOR], [0] * self.chains
        for chain, quiet in zip(turns, spare, strict=True):
            link = said[chain]
            said[chain] += 1
            source = values[chain] if link == 0 else names[chain, link - 1]
            ids += (first_noise + drawn.integers(self.noise, size=quiet)).tolist()
            ids += [SET, int(names[chain, link]), TO, int(source), STOP]
        asked = int(drawn.integers(self.chains))
        return [*ids, ASK, int(values[asked])], names[asked].tolist()
