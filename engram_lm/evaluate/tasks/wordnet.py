"""What the WordNet tasks ask, made from the corpus that ships with the package.

lm_eval calls these for the YAML files beside this one. Models that were trained on the corpus have
not read its validation split.
"""

from typing import Any

from datasets import Dataset

from engram_lm.corpus import documents
from engram_lm.evaluate.suites.wordnet_facts import facts

EXAMPLES = 2_000
"""Documents of the train split that few-shot examples are made of."""


def prose(**_: Any) -> dict[str, Dataset]:
    """The validation split, a document a row."""
    return {"test": Dataset.from_list([{"text": text} for text in documents("validation")])}


def definitions(**_: Any) -> dict[str, Dataset]:
    """Which of four glosses is the word's: held-out entries to test, others for examples."""
    parts = {"train": documents("train")[:EXAMPLES], "test": documents("validation")}
    return {
        split: Dataset.from_list(
            [
                {"opening": fact.opening, "choices": list(fact.choices), "gold": fact.gold}
                for fact in facts(texts)
            ]
        )
        for split, texts in parts.items()
    }
