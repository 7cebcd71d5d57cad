"""Our own suites on a model of any tokenizer: one value a question, so that intervals can be taken.

Shapes: N questions (or people, sequences, words, pairs) of one kind, A attributes, T tokens.
The same suite, number and seed ask the same, so that models, and one model with parts taken away,
are judged on equal questions.
"""

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluate.answers import Question, answers
from engram_lm.evaluate.rendering import check_known, rendered
from engram_lm.evaluate.suites.minimal_pairs import CHANCE as PAIR_CHANCE
from engram_lm.evaluate.suites.minimal_pairs import MinimalPairs, preferred
from engram_lm.evaluate.suites.mqar import IGNORED, MQAR, Induction, Labelled, recalled
from engram_lm.evaluate.suites.needles import Needles
from engram_lm.evaluate.suites.people import People
from engram_lm.evaluate.suites.two_source import TwoSource
from engram_lm.evaluate.suites.variables import Variables
from engram_lm.evaluate.suites.wordnet_facts import CHANCE as FACT_CHANCE
from engram_lm.evaluate.suites.wordnet_facts import CHOICES, WORDINGS, WordnetFacts, chosen
from engram_lm.model.budget import ledger
from engram_lm.model.config import EngramLMConfig

Suite = TwoSource | People | Variables | Needles | MQAR | Induction | WordnetFacts | MinimalPairs
SUITES: dict[str, type[Suite]] = {
    "two_source": TwoSource,
    "people": People,
    "variables": Variables,
    "needles": Needles,
    "mqar": MQAR,
    "induction": Induction,
    "wordnet_facts": WordnetFacts,
    "minimal_pairs": MinimalPairs,
}
"""By the names that users know them by."""
Progress = Callable[[int, int], None]
"""Told how much is done, and of how much."""


@dataclass(frozen=True, kw_only=True)
class SuiteScore:
    """One metric of one kind of question."""

    suite: str
    kind: str
    metric: str
    """right: the whole answer, by teacher forcing; tokens: share of its tokens; recalled: share of
    a sequence's labels; preferred: the likelier of two; bits: what is known of a person;
    bits_per_parameter, bits_per_active_parameter: of all people, for each of the model's;
    bits_per_byte: the one of which less is better."""
    chance: float | None
    """The score of a guess; None where a tokenizer that splits words leaves it unknown."""
    values_N: npt.NDArray[np.float64]

    @property
    def mean(self) -> float:
        """The score."""
        return float(self.values_N.mean())


def suite_scores(
    model: Any,
    tokenizer: Any,
    suite: Suite,
    *,
    questions: int = 200,
    seed: int = 0,
    batch: int = 32,
    progress: Progress | None = None,
) -> list[SuiteScore]:
    """Every metric of every kind of question.

    questions: of each kind, at most; of `people`, people. seed: of which are drawn; what a world's
    facts are is up to its own. To judge parts of a memory, call inside `analysis.ablation`'s
    blocks. ConfigError or DataError for a suite that is longer than the model's context, has more
    ids than its vocabulary, or cannot be asked in its tokenizer.
    """
    if min(questions, batch) < 1 or seed < 0:
        raise ConfigError(f"questions={questions}, batch={batch}, seed={seed}: at least 1, 1 and 0")
    told = progress or (lambda _done, _of: None)
    try:
        if isinstance(suite, MQAR | Induction):
            return _recalled(model, tokenizer, suite, suite.sequences(questions, seed), batch, told)
        if isinstance(suite, WordnetFacts):
            return _chosen(model, tokenizer, suite, questions, seed, batch, told)
        if isinstance(suite, MinimalPairs):
            return _preferred(model, tokenizer, suite, questions, seed, batch, told)
        if isinstance(suite, People):
            return _known(model, tokenizer, suite, questions, seed, batch, told)
        return _answered(model, tokenizer, suite, suite.questions(questions, seed), batch, told)
    except (ConfigError, DataError) as error:
        raise type(error)(f"{name_of(suite)}: {error}") from error


def name_of(suite: Suite) -> str:
    """Its name among SUITES; a changed copy of one has the same."""
    return next(name for name, kind in SUITES.items() if isinstance(suite, kind))


def statement(suite: object) -> str:
    """What a suite asks, what it shows and what it cannot: its module's own words."""
    return inspect.getdoc(sys.modules[type(suite).__module__]) or ""


def ordinary_ids(model: Any, tokenizer: Any) -> npt.NDArray[np.int64]:
    """Ascending: the model's token ids that its tokenizer has, special ones excluded."""
    known = np.arange(min(len(tokenizer), model.config.vocab_size))
    return np.setdiff1d(known, np.array(tokenizer.all_special_ids, dtype=np.int64))


def _answered(
    model: Any,
    tokenizer: Any,
    world: TwoSource | Variables | Needles,
    questions: Sequence[Question],
    batch: int,
    told: Progress,
) -> list[SuiteScore]:
    asked = rendered(world, questions, tokenizer)
    found = answers(model, asked, batch=batch, progress=lambda done: told(done, len(asked)))
    kinds = np.array([question.kind for question in questions])
    # Of one word: needles have one of ten digits.
    guess = world.chance ** (1 / world.digits) if isinstance(world, Needles) else world.chance
    scores = []
    for kind in dict.fromkeys(kinds.tolist()):
        places = np.flatnonzero(kinds == kind)
        words = len(questions[places[0]].answer)

        def score(
            metric: str, chance: float | None, values_N: npt.NDArray[Any], kind: str = kind
        ) -> SuiteScore:
            return SuiteScore(
                suite=name_of(world),
                kind=kind,
                metric=metric,
                chance=chance,
                values_N=values_N.astype(np.float64),
            )

        scores.append(score("right", guess**words, found.right[places]))
        if words > 1:
            whole = all(len(asked[place].answer) == words for place in places)
            scores.append(score("tokens", guess if whole else None, found.tokens[places]))
    return scores


def _known(
    model: Any,
    tokenizer: Any,
    world: People,
    number: int,
    seed: int,
    batch: int,
    told: Progress,
) -> list[SuiteScore]:
    """Attribute by attribute, and the bits of all of them together: times the number of people, the
    mean is what `learned_bits` gives, and over the model's parameters its capacity ratio."""
    drawn = np.random.default_rng([2, seed]).permutation(world.number)[:number]
    all_NA = np.array(range(world.number * len(world.attributes))).reshape(world.number, -1)
    every = world.questions()
    questions = [every[place] for place in all_NA[np.sort(drawn)].flatten()]
    asked = rendered(world, questions, tokenizer)
    found = answers(model, asked, batch=batch, progress=lambda done: told(done, len(asked)))
    right_NA = found.right.reshape(-1, len(world.attributes)).astype(np.float64)
    counts_A = np.array(list(world.attributes.values()))
    bits_NA = np.log2(counts_A) - found.nats.reshape(right_NA.shape) / math.log(2)
    # Less than nothing is known of no attribute, whatever it costs.
    bits_N = np.where(bits_NA.mean(axis=0) > 0, bits_NA, 0.0).sum(axis=1)
    scores = [
        SuiteScore(
            suite="people", kind=attribute, metric="right", chance=1 / count, values_N=right_N
        )
        for (attribute, count), right_N in zip(world.attributes.items(), right_NA.T, strict=True)
    ]
    # Drawn people stand for all of them.
    per = {"bits": 1.0} | {
        f"bits_per_{what}": world.number / number for what, number in parameters_of(model).items()
    }
    return [
        *scores,
        *(
            SuiteScore(
                suite="people",
                kind="a person" if metric == "bits" else "everyone",
                metric=metric,
                chance=0.0,
                values_N=factor * bits_N,
            )
            for metric, factor in per.items()
        ),
    ]


def parameters_of(model: Any) -> dict[str, int]:
    """All there are, tied ones once; of a model of ours, wherever its tables are, and how many of
    them are active for a token, its embedding and head included."""
    if not isinstance(getattr(model, "config", None), EngramLMConfig):
        return {"parameter": sum(each.numel() for each in model.parameters())}
    found = ledger(model.config)
    active = sum(component.active for component in found.components)
    return {"parameter": found.parameters, "active_parameter": active}


def _recalled(
    model: Any,
    tokenizer: Any,
    suite: MQAR | Induction,
    drawn: Labelled,
    batch: int,
    told: Progress,
) -> list[SuiteScore]:
    name, ids = name_of(suite), ordinary_ids(model, tokenizer)
    if suite.vocabulary > len(ids):
        raise ConfigError(f"vocabulary={suite.vocabulary}: the model has {len(ids)} ordinary ids")
    positions = getattr(model.config, "max_position_embeddings", suite.length)
    if suite.length > positions:
        raise ConfigError(f"length={suite.length}: the model has {positions} positions")
    labels_NT = np.where(drawn.labels_NT == IGNORED, IGNORED, ids[drawn.labels_NT.clip(min=0)])
    values_N = recalled(
        model,
        Labelled(ids[drawn.ids_NT], labels_NT),
        batch=batch,
        progress=lambda done: told(done, len(labels_NT)),
    )
    return [
        SuiteScore(suite=name, kind=name, metric="recalled", chance=suite.chance, values_N=values_N)
    ]


def _chosen(
    model: Any,
    tokenizer: Any,
    suite: WordnetFacts,
    number: int,
    seed: int,
    batch: int,
    told: Progress,
) -> list[SuiteScore]:
    asked = {split: suite.some(split, number, seed) for split in ("train", "validation")}
    for facts in asked.values():
        said = [fact.asked(wording) for fact in facts for wording in WORDINGS]
        check_known(tokenizer, said + [choice for fact in facts for choice in fact.choices])
    total = len(WORDINGS) * CHOICES * sum(map(len, asked.values()))
    scores: list[SuiteScore] = []
    before = 0

    def so_far(done: int) -> None:
        told(before + done, total)

    for split, facts in asked.items():
        for wording in WORDINGS:
            right_N = chosen(model, tokenizer, facts, wording, batch=batch, progress=so_far)
            before += CHOICES * len(facts)
            scores.append(
                SuiteScore(
                    suite="wordnet_facts",
                    kind=f"{split}/{wording}",
                    metric="right",
                    chance=FACT_CHANCE,
                    values_N=right_N.astype(np.float64),
                )
            )
    return scores


def _preferred(
    model: Any,
    tokenizer: Any,
    suite: MinimalPairs,
    number: int,
    seed: int,
    batch: int,
    told: Progress,
) -> list[SuiteScore]:
    pairs = suite.some(number, seed)
    check_known(tokenizer, [text for pair in pairs for text in (pair.good, pair.bad)])
    right = preferred(
        model,
        tokenizer,
        pairs,
        batch=batch,
        progress=lambda done: told(done, 2 * len(pairs)),
    )
    kinds = np.array([pair.kind for pair in pairs])
    by_kind = {
        kind: right[kinds == kind].astype(np.float64) for kind in dict.fromkeys(kinds.tolist())
    }
    if len(by_kind) > 1:
        by_kind["mean over kinds"] = _mean_over(list(by_kind.values()))
    return [
        SuiteScore(
            suite="minimal_pairs",
            kind=kind,
            metric="preferred",
            chance=PAIR_CHANCE,
            values_N=values_N,
        )
        for kind, values_N in by_kind.items()
    ]


def _mean_over(kinds: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """Values whose mean is the mean of the kinds' means, as BLiMP is reported, and whose spread is
    that within kinds."""
    mean = np.mean([values_N.mean() for values_N in kinds])
    each = sum(map(len, kinds)) / len(kinds)
    off = [(values_N - values_N.mean()) * each / len(values_N) for values_N in kinds]
    spread: npt.NDArray[np.float64] = mean + np.concatenate(off)
    return spread
