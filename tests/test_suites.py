"""The suites: what they ask is what they say, planted knowledge is found, chance is chance."""

import itertools
import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engram_lm import corpus
from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluate.answers import Question, answers
from engram_lm.evaluate.suites import mqar, needles, people, two_source, variables
from engram_lm.evaluate.suites.minimal_pairs import Pair, preferred, read_pairs
from engram_lm.evaluate.suites.wordnet_facts import CHANCE, chosen, facts


class Planted(torch.nn.Module):
    """Says what it was told to say after each text, and nothing (all alike) after others."""

    device = torch.device("cpu")

    def __init__(self, vocabulary: int, known: dict[tuple[int, ...], int]) -> None:
        super().__init__()
        self.vocabulary, self.known = vocabulary, known
        self.weight = torch.nn.Parameter(torch.zeros(7))
        self.longest = max(map(len, known), default=0)

    def forward(self, input_ids, logits_to_keep: int, **_options):
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for row, ids in enumerate(input_ids.tolist()):
            for end in range(len(ids) - logits_to_keep, len(ids)):
                for begin in range(max(0, end + 1 - self.longest), end + 1):
                    said = self.known.get(tuple(ids[begin : end + 1]))
                    if said is not None:
                        logits[row, end, said] = 50.0
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def test_answers_are_right_where_every_token_is_and_cost_what_they_cost():
    model = Planted(8, {(1, 2): 3, (2, 3): 4, (5,): 6})
    asked = [
        Question(prompt=(1, 2), answer=(3, 4), kind="both"),
        Question(prompt=(1, 2), answer=(3, 7), kind="half"),
        Question(prompt=(0, 1, 5), answer=(6,), kind="one"),
        Question(prompt=(0,), answer=(2,), kind="none"),
    ]
    seen = []
    found = answers(model, asked, batch=1, progress=seen.append)
    assert found.right.tolist() == [True, False, True, False]
    assert found.tokens.tolist() == [1, 0.5, 1, 0] and seen == [1, 2, 3, 4]
    assert found.nats == pytest.approx([0, 50, 0, math.log(8)], abs=1e-6)
    whole = answers(model, asked, batch=64)
    assert np.array_equal(whole.nats, found.nats)
    with pytest.raises(DataError, match="question 1: a prompt and an answer"):
        answers(model, [asked[0], Question(prompt=(), answer=(1,), kind="")])
    with pytest.raises(DataError, match="no questions"):
        answers(model, [])


def test_a_model_whose_logits_are_not_numbers_is_refused():
    class Diverged(Planted):
        def forward(self, *arguments, **options):
            return SimpleNamespace(logits=super().forward(*arguments, **options).logits * math.nan)

    with pytest.raises(DataError, match="logits are not finite numbers"):
        answers(Diverged(8, {}), [Question(prompt=(1,), answer=(3,), kind="k")])


def spelled(ids) -> str:
    """Such that what is part of a text is part of its spelling."""
    return f" {' '.join(map(str, ids))} "


WORLD = two_source.TwoSource(entities=30, parts=20, values=10)


def test_a_model_that_was_told_the_facts_knows_the_trained_ones_alone():
    names, known = WORLD.names(), WORLD.facts()
    told = {
        tuple(WORLD.query(names[entity], relation, layout)): WORLD.answer(
            relation, int(known[entity, relation])
        )
        for entity in range(WORLD.entities)
        for relation in range(WORLD.relations)
        for layout in two_source.LAYOUTS
    }
    asked = WORLD.questions(40)
    right = answers(Planted(WORLD.vocabulary, told), asked).right
    by_kind = {
        kind: right[[question.kind == kind for question in asked]].mean()
        for kind in dict.fromkeys(question.kind for question in asked)
    }
    assert by_kind["trained/after"] == by_kind["trained/later"] == 1
    for kind in ("given/after", "given/later"):  # right by chance alone: 4 standard deviations
        assert by_kind[kind] < WORLD.chance + 4 * (0.1 * 0.9 / 40) ** 0.5
    assert by_kind["unknown/after"] == by_kind["unknown/later"] == 0


def test_a_given_fact_stands_in_its_document_once_and_a_trained_one_nowhere():
    for question in WORLD.questions(30):
        prompt = question.prompt
        if question.kind.startswith("trained"):
            assert question.answer[0] not in prompt and two_source.ASK not in prompt
            continue
        asked = prompt[prompt.index(two_source.ASK) + 1 :]
        said = spelled(prompt[: prompt.index(two_source.ASK)])
        (name,) = (each for each in WORLD.names() if set(each) <= set(asked))
        stated = [
            layout
            for relation in range(WORLD.relations)
            for layout in two_source.LAYOUTS
            if spelled([*WORLD.query(name, relation, layout), *question.answer]) in said
        ]
        assert len(stated) == 1


def test_documents_hold_no_unknown_entity_and_trained_facts_never_change():
    names = WORLD.names()
    assert len(set(names)) == len(names) == 33 and {len(name) for name in names} == {2, 3}
    ends = {(name[0], name[-1]) for name in names}
    assert len(ends) == len(names)  # told apart without the middle
    documents = list(itertools.islice(WORLD.documents(seed=5), 400))
    text = [spelled(document) for document in documents]
    assert all(max(document) < WORLD.vocabulary for document in documents)
    for name in names[WORLD.entities :]:
        assert not any(spelled(name) in one for one in text)
    values = {}
    for document in documents:
        if two_source.GIVEN in document:
            continue
        query: list[int] = []
        for token in document[1:]:
            if token == two_source.STOP:
                *asked, value = query
                assert values.setdefault(tuple(asked), value) == value
                query = []
            else:
                query.append(token)
    given = sum(two_source.GIVEN in document for document in documents)
    assert 140 < given < 260
    assert list(itertools.islice(WORLD.documents(seed=5), 400)) == documents
    assert next(WORLD.documents(seed=6)) != documents[0]


def test_every_token_has_a_word_of_its_own():
    words = WORLD.words()
    assert len(words) == len(set(words)) == WORLD.vocabulary
    name = next(name for name in WORLD.names() if len(name) == 3)
    parts = ["first", "middle", "last"]
    assert [words[id].rstrip("0123456789") for id in name] == parts
    query = [words[id] for id in WORLD.query(name, 2, "later")][3:]
    assert query == [f"relation2bridge{n}" for n in range(3)]
    assert words[WORLD.query(name, 2, "after")[0]] == "relation2"
    assert words[WORLD.answer(2, 7)] == "relation2value7"


@pytest.mark.parametrize("seed", [0, 1])
def test_every_key_of_mqar_is_asked_once_and_answered_with_its_value(seed):
    suite = mqar.MQAR(vocabulary=256, length=64, pairs=8)
    ids, labels = suite.sequences(20, seed)
    for ids_T, labels_T in zip(ids.tolist(), labels.tolist(), strict=True):
        pairs = dict(zip(ids_T[0:16:2], ids_T[1:16:2], strict=True))
        assert len(pairs) == 8 and all(0 < key < 128 <= value for key, value in pairs.items())
        asked = [place for place, label in enumerate(labels_T) if label != mqar.IGNORED]
        assert len(asked) == 8 and min(asked) >= 16
        assert {ids_T[place]: labels_T[place] for place in asked} == pairs
        assert all(ids_T[place + 1] == labels_T[place] for place in asked)
        assert sum(id < 128 for id in ids_T) == 16
    again = suite.sequences(20, seed)
    assert np.array_equal(again.ids_NT, ids)


def test_induction_wants_what_was_said_before():
    suite = mqar.Induction(vocabulary=4096, length=64, stretch=10)
    ids, labels = suite.sequences(20, 0)
    for ids_T, labels_T in zip(ids.tolist(), labels.tolist(), strict=True):
        asked = [place for place, label in enumerate(labels_T) if label != mqar.IGNORED]
        assert asked == list(range(54, 63))
        assert [labels_T[place] for place in asked] == ids_T[55:]
        first = " ".join(map(str, ids_T[:54]))
        assert " ".join(map(str, ids_T[54:])) in first


class Repeats(torch.nn.Module):
    """Says what followed the last time that the token stood; at first, the token itself."""

    device = torch.device("cpu")

    def forward(self, input_ids, **_options):
        logits = torch.zeros(*input_ids.shape, 300)
        for row, ids in enumerate(input_ids.tolist()):
            for at, token in enumerate(ids):
                seen = [place for place in range(at) if ids[place] == token]
                logits[row, at, ids[seen[-1] + 1] if seen else token] = 1.0
        return SimpleNamespace(logits=logits)


def test_who_looks_back_recalls_every_pair_and_who_does_not_recalls_none():
    pairs = mqar.MQAR(vocabulary=256, length=64, pairs=8).sequences(7, 3)
    assert mqar.recalled(Repeats(), pairs, batch=3).tolist() == [1.0] * 7
    assert mqar.recalled(Likes(300, {0}), pairs).tolist() == [0.0] * 7
    half = mqar.Labelled(pairs.ids_NT, pairs.labels_NT.copy())
    for labels_T in half.labels_NT:
        labels_T[np.flatnonzero(labels_T != mqar.IGNORED)[:2]] = 0  # wrong ones, two of eight
    assert mqar.recalled(Repeats(), half).tolist() == [0.75] * 7


def test_learned_bits_are_all_for_who_knows_all_and_none_for_who_knows_nothing():
    suite = people.People(number=30, first_names=7, middle_names=5, last_names=9)
    asked = suite.questions()
    assert len(asked) == 30 * 6 and len({tuple(name) for name in suite.names()}) == 30
    known = {question.prompt[1:]: question.answer[0] for question in asked}
    found = answers(Planted(suite.vocabulary, known), asked)
    assert suite.learned_bits(found) == pytest.approx(suite.bits) and found.right.all()
    assert suite.bits == pytest.approx(30 * math.log2(200 * 300 * 100 * 263 * 12 * 28))
    ignorant = answers(Planted(suite.vocabulary, {}), asked)
    assert suite.learned_bits(ignorant) == 0
    half = {prompt: said for prompt, said in known.items() if asked[0].prompt[-1] == prompt[-1]}
    some = answers(Planted(suite.vocabulary, half), asked)
    assert suite.learned_bits(some) == pytest.approx(30 * math.log2(200))
    with pytest.raises(DataError, match="1 answers: they are not those"):
        suite.learned_bits(answers(Planted(suite.vocabulary, {}), asked[:1]))


def test_each_person_is_told_once_a_round_with_every_attribute():
    suite = people.People(number=12)
    documents = list(itertools.islice(suite.documents(seed=1), 24))
    names = [tuple(document[1:4]) for document in documents]
    assert Counter(names) == dict.fromkeys(names, 2) and len(set(names[:12])) == 12
    wanted = {(question.prompt[1:], question.answer[0]) for question in suite.questions()}
    told = {
        (tuple(ids[at : at + 4]), ids[at + 4]) for ids in documents for at in range(1, len(ids), 6)
    }
    assert told == wanted
    assert max(max(ids) for ids in documents) < suite.vocabulary


def test_chains_of_variables_can_be_followed():
    suite = variables.Variables(length=90)
    for question in suite.questions(20):
        assert len(question.prompt) + len(question.answer) + 1 <= 90
        held, ids = {}, question.prompt
        for at, token in enumerate(ids):
            if token == variables.SET:
                held[ids[at + 1]] = held.get(ids[at + 3], ids[at + 3])
        assert tuple(name for name, value in held.items() if value == ids[-1]) == question.answer
        assert len(question.answer) == 4 and len(held) == 8
    document = next(suite.documents(seed=0))
    assert len(document) == 90 and document[-1] == variables.STOP
    assert max(document) < suite.vocabulary


STATED = {"single": 1, "multivalue": 4, "multiquery": 4}


@pytest.mark.parametrize("kind", needles.KINDS)
def test_needles_are_said_once_and_fit(kind):
    suite = needles.Needles(length=160)
    asked = [question for question in suite.questions(15) if question.kind == kind]
    for question in asked:
        ids = question.prompt
        begin = max(at for at, token in enumerate(ids) if token == needles.ASK)
        key = ids[begin + 1 : -1]
        haystack = ids[: ids.index(needles.ASK)]
        said = [
            haystack[at + len(key) + 1 : at + len(key) + 1 + suite.digits]
            for at in range(len(haystack))
            if haystack[at : at + len(key) + 1] == (*key, needles.IS)
        ]
        assert len(said) == (4 if kind == "multivalue" else 1)
        assert tuple(itertools.chain(*said)) == question.answer
        assert len(ids) + len(question.answer) <= 160 and max(ids) < suite.vocabulary
        statements = haystack.count(needles.IS)
        assert statements > 10 if kind == "multikey" else statements == STATED[kind]
    documents = list(itertools.islice(suite.documents(seed=0), 8))
    assert all(len(document) <= 160 for document in documents)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: two_source.TwoSource(entities=1000, parts=20), "make too few names"),
        (lambda: two_source.TwoSource(bridge=0), "1 or more"),
        (lambda: mqar.MQAR(length=64, pairs=17), "pairs=17: 1 to 16 go into length=64"),
        (lambda: mqar.Induction(length=64, stretch=33), "stretch=33: 2 to 32"),
        (lambda: people.People(number=0), "number=0: 1 to"),
        (lambda: people.People(attributes={}), "attributes: one or more"),
        (lambda: variables.Variables(length=20), "length=20: 2 chains of 3 hops need"),
        (lambda: variables.Variables(names=7), "names=7, values=32: too few"),
        (lambda: needles.Needles(length=50), "length=50: 69 tokens are needed"),
        (lambda: needles.Needles(parts=1), "parts 2"),
    ],
)
def test_sizes_that_cannot_be_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


class Likes(torch.nn.Module):
    """Finds some tokens likelier than the others, whatever comes before."""

    device = torch.device("cpu")

    def __init__(self, vocabulary: int, liked: set[int]) -> None:
        super().__init__()
        self.logits = torch.zeros(vocabulary)
        self.logits[list(liked)] = 30.0

    def forward(self, input_ids, logits_to_keep: int = 0, **_options):
        kept = logits_to_keep or input_ids.shape[1]
        return SimpleNamespace(logits=self.logits.expand(len(input_ids), kept, -1))


def test_the_likelier_sentence_of_a_pair_is_preferred(tmp_path):
    tokenizer = corpus.tokenizer()
    path = tmp_path / "agreement.jsonl"
    lines = [
        {"sentence_good": "The dogs bark.", "sentence_bad": "The dogs barks.", "UID": "number"},
        {"sentence_good": "The dog barks.", "sentence_bad": "The dog bark."},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = read_pairs(path)
    assert [pair.kind for pair in pairs] == ["number", "agreement"]
    same = set(tokenizer(pairs[0].good)["input_ids"])
    model = Likes(len(tokenizer), same)
    assert preferred(model, tokenizer, pairs).tolist() == [True, False]
    swapped = [Pair(good=pair.bad, bad=pair.good, kind=pair.kind) for pair in pairs]
    assert preferred(model, tokenizer, swapped).tolist() == [False, True]
    path.write_text('{"sentence_good": "a"}\n')
    with pytest.raises(DataError, match="line 1 is no pair"):
        read_pairs(path)
    path.write_text("")
    with pytest.raises(DataError, match="no pairs"):
        read_pairs(path)
    with pytest.raises(DataError, match="No such file"):
        read_pairs(tmp_path / "nowhere.jsonl")


def test_a_gloss_that_is_likely_is_chosen_in_both_wordings():
    tokenizer = corpus.tokenizer()
    asked = facts(corpus.documents("validation"))[:40]
    fact = asked[0]
    assert fact.asked("worded").startswith("The ") and fact.asked("otherwise").endswith(":")
    assert fact.word.lower() in fact.asked("otherwise").lower()
    liked = set(tokenizer(" " + fact.choices[fact.gold])["input_ids"])
    model = Likes(len(tokenizer), liked)
    for wording in ("worded", "otherwise"):
        assert chosen(model, tokenizer, [fact], wording).tolist() == [True]
    indifferent = chosen(Likes(len(tokenizer), set()), tokenizer, asked, "worded")
    assert 0.02 < indifferent.mean() < CHANCE + 4 * (0.25 * 0.75 / 40) ** 0.5
    with pytest.raises(DataError, match="wording='sung'"):
        chosen(model, tokenizer, asked, "sung")
