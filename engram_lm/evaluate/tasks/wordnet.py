"""What the WordNet tasks ask, made from the corpus that ships with the package.

lm_eval calls these for the YAML files beside this one. Models that were trained on the corpus have
not read its validation split.
"""

import hashlib
import re
from typing import Any

from datasets import Dataset

from engram_lm.corpus import documents

ENTRY = re.compile(r'(The \w+ "[^"]+" (?:means|refers to)) (.+?[.!?]"?)(?= [A-Z]|$)')
"""A document that says what a word means: its opening, the gloss."""
THING = re.compile(r"(a|an|the|any|one|someone|something|somebody|anyone|anything) ", re.I)
CHOICES = 4
EXAMPLES = 2_000
"""Documents of the train split that few-shot examples are made of."""


def prose(**_: Any) -> dict[str, Dataset]:
    """The validation split, a document a row."""
    return {"test": Dataset.from_list([{"text": text} for text in documents("validation")])}


def definitions(**_: Any) -> dict[str, Dataset]:
    """Which of four glosses is the word's: held-out entries to test, others for examples."""
    return {
        "train": Dataset.from_list(_questions(documents("train")[:EXAMPLES])),
        "test": Dataset.from_list(_questions(documents("validation"))),
    }


def _questions(documents: list[str]) -> list[dict[str, Any]]:
    """The wrong glosses are others' of the same kind, as long as the right one as can be had."""
    entries = [match.groups() for text in documents if (match := ENTRY.match(text))]
    glosses = dict.fromkeys(gloss for _, gloss in entries)
    questions = []
    for opening, gloss in entries:
        others = [other for other in glosses if other != gloss and _kind(other) == _kind(gloss)]
        others.sort(key=lambda other: (abs(len(other) - len(gloss)), _digest(gloss, other)))
        # By other digests than above: those of the chosen are small, and would all come first.
        choices = sorted([gloss, *others[: CHOICES - 1]], key=lambda each: _digest(opening, each))
        questions.append({"opening": opening, "choices": choices, "gold": choices.index(gloss)})
    return questions


def _kind(gloss: str) -> str:
    """Glosses of one kind are of one part of speech, as far as their first word shows it."""
    if gloss.startswith("to "):
        return "verb"
    return "noun" if THING.match(gloss) else "other"


def _digest(*words: str) -> bytes:
    return hashlib.sha256("\n".join(words).encode()).digest()
