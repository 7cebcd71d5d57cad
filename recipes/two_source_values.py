"""Whether the right value is the likeliest among its relation's: what is left where a model without
a part no longer sees that a value is due.

    python recipes/two_source_values.py    # after both studies of recipes/two_source.py

There an answer is right where it is the likeliest token of all. A model that has lost a part may
still know the value and say another kind of word, so here the same questions are asked among the 20
values that the relation has: chance is 1/20, whatever the model takes for due. Both arms of both
studies from runs/STUDY/SEED/ARM/model, as they are and with each part off; writes
results/two_source_values.json. The last line printed is the summary.
"""

import engram_lm.openmp  # noqa: F401

import json
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from two_source import ARMS, switched
from two_source_studies import STUDIES, Twins

from engram_lm import EngramLMForCausalLM
from engram_lm.analysis.student import spread
from engram_lm.evaluate.answers import Question
from engram_lm.evaluate.inference import inference
from engram_lm.studies.record import Record

SEEDS = (0, 1, 2)
QUESTIONS = 1_000
"""Of each kind, those of recipes/two_source.py."""
BATCH = 100


def values_of(study: Twins) -> list[list[int]]:
    """Relation -> token ids of its values."""
    words, world = study.world.words(), study.world
    ids: list[int] = study.tokenizer.convert_tokens_to_ids(words)
    return [
        [ids[world.answer(relation, value)] for value in range(world.values)]
        for relation in range(world.relations)
    ]


def among(model: Any, questions: Sequence[Question], values: list[list[int]]) -> list[bool]:
    """Of each question, whether its answer is the likeliest value of the answer's relation."""
    by_length: dict[int, list[int]] = {}
    for place, question in enumerate(questions):
        by_length.setdefault(len(question.prompt), []).append(place)
    found = [False] * len(questions)
    with inference(model):
        for places in by_length.values():
            for first in range(0, len(places), BATCH):
                batch = places[first : first + BATCH]
                ids = torch.tensor([questions[place].prompt for place in batch])
                logits_BV = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
                for place, logits_V in zip(batch, logits_BV, strict=True):
                    (answer,) = questions[place].answer
                    (own,) = (each for each in values if answer in each)
                    found[place] = own[int(logits_V[own].argmax())] == answer
    return found


def main() -> None:
    record = Record("two_source_values")
    shares: dict[str, list[float]] = {}
    runs = list(product(STUDIES.values(), SEEDS, ARMS))
    for make, seed, arm in track(runs, "asking", console=Console(stderr=True)):
        study = make(small=False)
        model = EngramLMForCausalLM.from_pretrained(
            Path("runs") / study.name / str(seed) / arm.lower() / "model"
        )
        questions, values = study.questions(QUESTIONS), values_of(study)
        for name, switch in switched(arm, model).items():
            with switch:
                right = among(model, questions, values)
            by_kind: dict[str, list[bool]] = {}
            for question, each in zip(questions, right, strict=True):
                by_kind.setdefault(question.kind, []).append(each)
            for kind, answers in by_kind.items():
                key = f"{study.name}_{name.replace(', ', '_')}_{kind}"
                key = key.replace(" ", "_").replace("/", "_")
                shares.setdefault(key, []).append(statistics.mean(answers))
    flat = {
        f"{name}_{what}": value
        for name, each in shares.items()
        for what, value in spread(each).items()
    }
    record.write(flat, {"by_seed": shares}, seeds=list(SEEDS))
    print(json.dumps(flat))


if __name__ == "__main__":
    main()
