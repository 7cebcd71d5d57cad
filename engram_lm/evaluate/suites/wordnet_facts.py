"""Which of four glosses is the word's: what a model kept of dictionary entries that it has read.

An entry of the corpus says, in one of several ways, what a word means. Here it is asked as it was
worded, and in another of the corpus's ways, which was not said of this word. The wrong glosses are
others' of the same kind, as long as the right one as can be had; the likeliest per byte is taken.

Shows: recall of real facts, with words that carry over (`otherwise`) beside words that may be
remembered whole (`worded`); entries of the validation split, asked alike, show what can be guessed
without having read. Cannot show: that a model which fails does not know the word in another way;
how much is kept by a model that read a part of the training split, as `engram demo`'s have (a
quarter), for entries are drawn from all of it. Models of a million parameters stay near chance, one
in four, on what they have not read.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engram_lm import corpus
from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluate.answers import Question, answers, separator_of

ENTRY = re.compile(
    r'(The \w+ "(?P<word>[^"]+)" (?:means|refers to)) (?P<gloss>.+?[.!?]"?)(?= [A-Z]|$)'
)
"""A document that says what a word means: its opening, the gloss."""
THING = re.compile(r"(a|an|the|any|one|someone|something|somebody|anyone|anything) ", re.I)
CHOICES = 4
CHANCE = 1 / CHOICES
WORDINGS = ("worded", "otherwise")


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A word, its gloss among others, and what may stand before them."""

    word: str
    opening: str
    """As the document words it."""
    choices: tuple[str, ...]
    gold: int
    """Which of them is right."""

    def asked(self, wording: str) -> str:
        """`worded`: the document's own opening; `otherwise`: another that the corpus uses."""
        if wording == "worded":
            return self.opening
        head = self.word[0].upper() + self.word[1:]
        return f"{head}:"


@dataclass(frozen=True, kw_only=True)
class WordnetFacts:
    """Of the corpus that ships with the package."""

    documents: int = 2_000
    """Of each split, drawn: from as many, so that the wrong glosses of both are equally near."""

    def some(self, split: str, number: int, seed: int) -> list[Fact]:
        """At most `number` facts of "train" or "validation". ConfigError for so few documents that
        wrong glosses run out."""
        drawn = np.random.default_rng([2, seed])
        texts = corpus.documents(split)
        places = np.sort(drawn.permutation(len(texts))[: max(0, self.documents)])
        found = facts([texts[place] for place in places])
        if not found or min(len(fact.choices) for fact in found) < CHOICES:
            raise ConfigError(f"documents={self.documents}: too few for {CHOICES} glosses a word")
        return [found[place] for place in np.sort(drawn.permutation(len(found))[:number])]


def facts(documents: Sequence[str]) -> list[Fact]:
    """Of those documents that are worded so, in their order. The choices are the same on every
    machine."""
    entries = [match for text in documents if (match := ENTRY.match(text))]
    glosses = dict.fromkeys(match["gloss"] for match in entries)
    by_kind: dict[str, list[str]] = {}
    for gloss in glosses:
        by_kind.setdefault(kind(gloss), []).append(gloss)
    found = []
    for match in entries:
        opening, gloss = match[1], match["gloss"]
        others = [other for other in by_kind[kind(gloss)] if other != gloss]
        others.sort(key=lambda other: (abs(len(other) - len(gloss)), _digest(gloss, other)))
        # By other digests than above: those of the chosen are small, and would all come first.
        choices = sorted([gloss, *others[: CHOICES - 1]], key=lambda each: _digest(opening, each))
        found.append(
            Fact(
                word=match["word"],
                opening=opening,
                choices=tuple(choices),
                gold=choices.index(gloss),
            )
        )
    return found


def chosen(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Fact],
    wording: str,
    *,
    batch: int = 32,
    progress: Callable[[int], None] | None = None,
) -> npt.NDArray[np.bool_]:
    """True where the right gloss is the likeliest per byte, each question behind a separator.

    DataError for a wording that there is not, or a tokenizer without a bos or eos token. progress:
    choices so far.
    """
    if wording not in WORDINGS:
        raise DataError(f"wording={wording!r}: {' or '.join(map(repr, WORDINGS))}")
    separator = separator_of(tokenizer)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    questions = [
        Question(
            prompt=(separator, *ids(fact.asked(wording))), answer=ids(f" {choice}"), kind=wording
        )
        for fact in asked
        for choice in fact.choices
    ]
    nats = answers(model, questions, batch=batch, progress=progress).nats
    sizes = np.array([len(choice.encode()) for fact in asked for choice in fact.choices])
    begins = np.cumsum([0, *(len(fact.choices) for fact in asked)])
    per_byte = nats / sizes
    return np.array(
        [
            int(per_byte[begin:end].argmin()) == fact.gold
            for fact, begin, end in zip(asked, begins, begins[1:], strict=False)
        ]
    )


def kind(gloss: str) -> str:
    """Glosses of one kind are of one part of speech, as far as their first word shows it."""
    if gloss.startswith("to "):
        return "verb"
    return "noun" if THING.match(gloss) else "other"


def _digest(*words: str) -> bytes:
    return hashlib.sha256("\n".join(words).encode()).digest()
