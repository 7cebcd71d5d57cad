"""Suites in a model's own tokenizer, planted answers, and `engram eval --suites`."""

import itertools
import json
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_analysis import build
from test_suites import Likes, Planted, Repeats
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from engram_lm import CanonicalMap, EngramLMForCausalLM, corpus
from engram_lm.cli import evaluate_suites, main
from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluate.answers import Question, answers
from engram_lm.evaluate.rendering import rendered, texts, tokenizer_of
from engram_lm.evaluate.suite_scores import (
    SUITES,
    SuiteScore,
    ordinary_ids,
    parameters_of,
    statement,
    suite_scores,
)
from engram_lm.evaluate.suites.minimal_pairs import MinimalPairs, Pair
from engram_lm.evaluate.suites.mqar import MQAR, Induction
from engram_lm.evaluate.suites.needles import Needles
from engram_lm.evaluate.suites.people import People
from engram_lm.evaluate.suites.two_source import TwoSource
from engram_lm.evaluate.suites.variables import Variables
from engram_lm.evaluate.suites.wordnet_facts import WordnetFacts
from engram_lm.evaluate.token_losses import token_losses
from engram_lm.model.presets import configure, nano_engram
from engram_lm.studies import frequency_bands
from engram_lm.studies.frequency_bands import FrequencyBands

WORLDS = {
    "two_source": TwoSource(entities=30, parts=20, values=10),
    "people": People(number=20),
    "variables": Variables(length=90),
    "needles": Needles(length=90),
}
every_world = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)


def questions_of(world, number: int) -> list[Question]:
    return world.questions() if isinstance(world, People) else world.questions(number)


@every_world
def test_a_tokenizer_of_a_worlds_words_gives_its_own_ids(world):
    words, tokenizer = world.words(), tokenizer_of(world)
    assert len(set(words)) == len(words) == world.vocabulary == len(tokenizer)
    assert not any(character.isspace() for word in words for character in word)
    # A memory tells all of them apart as well.
    assert CanonicalMap.from_tokenizer(tokenizer).canonical_ids == world.vocabulary
    asked = questions_of(world, 5)
    assert rendered(world, asked, tokenizer) == asked
    documents = itertools.islice(world.documents(seed=3), 8)
    for text, document in zip(texts(world, seed=3), documents, strict=False):
        assert tokenizer(text)["input_ids"] == document[1:]


@every_world
def test_any_other_tokenizer_says_the_same_words(world):
    words, tokenizer = world.words(), corpus.tokenizer()
    asked = questions_of(world, 4)
    for question, own in zip(asked, rendered(world, asked, tokenizer), strict=True):
        prompt = " ".join(words[id] for id in question.prompt[1:])
        answer = " " + " ".join(words[id] for id in question.answer)
        assert own.prompt[0] == tokenizer.bos_token_id and own.kind == question.kind
        assert tokenizer.decode(own.prompt[1:]) == prompt
        assert tokenizer.decode(own.answer) == answer
        # As a model has read it in training, where nothing marks where the answer begins.
        assert tokenizer(prompt + answer)["input_ids"] == [*own.prompt[1:], *own.answer]


def test_a_tokenizer_that_does_not_know_the_words_is_refused():
    world, other = WORLDS["variables"], tokenizer_of(WORLDS["people"])
    with pytest.raises(DataError, match=r"no token for part of '<set>': one that makes bytes"):
        rendered(world, world.questions(1), other)
    with pytest.raises(DataError, match="wordnet_facts: the tokenizer has no token for part of"):
        suite_scores(Likes(3, set()), other, WordnetFacts(), questions=2)
    with pytest.raises(DataError, match="no token for part of"):
        FrequencyBands().read(other)


def test_a_tokenizer_that_joins_an_answer_to_its_question_is_refused():
    world = SimpleNamespace(words=lambda: ["s", "p", "a", "b"])
    tokens = ["s", " a", " b", "a", "a b"]
    joining = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            models.WordLevel({token: place for place, token in enumerate(tokens)}, "s")
        ),
        bos_token="s",
    )
    with pytest.raises(DataError, match=r"joins an answer to its question: \.\.\.'a b'"):
        rendered(world, [Question(prompt=(0, 2), answer=(3,), kind="")], joining)


def configured(model: torch.nn.Module, vocabulary: int, positions: int = 4096):
    model.config = SimpleNamespace(vocab_size=vocabulary, max_position_embeddings=positions)
    return model


def by_kind(scores: list[SuiteScore], metric: str = "right") -> dict[str, float]:
    return {score.kind: score.mean for score in scores if score.metric == metric}


def told(questions: list[Question]) -> dict[tuple[int, ...], int]:
    """What a model says that knows every answer to them."""
    return {
        (*question.prompt, *question.answer[:place]): said
        for question in questions
        for place, said in enumerate(question.answer)
    }


@pytest.mark.parametrize("name", ["two_source", "variables", "needles"])
@pytest.mark.parametrize("own", [True, False], ids=["words", "bpe"])
def test_who_knows_every_answer_scores_one_and_who_knows_none_nothing(name, own):
    world = WORLDS[name]
    tokenizer = tokenizer_of(world) if own else corpus.tokenizer()
    asked = rendered(world, world.questions(3, seed=4), tokenizer)
    model = Planted(len(tokenizer), told(asked))
    seen: list[tuple[int, int]] = []
    scores = suite_scores(
        model,
        tokenizer,
        world,
        questions=3,
        seed=4,
        progress=lambda done, of: seen.append((done, of)),
    )
    assert all(score.values_N.tolist() == [1.0] * 3 for score in scores)
    assert seen[-1] == (len(asked), len(asked)) and {score.suite for score in scores} == {name}
    nothing = suite_scores(Planted(len(tokenizer), {}), tokenizer, world, questions=3, seed=4)
    assert {score.mean for score in nothing} == {0.0}
    other = suite_scores(model, tokenizer, world, questions=3, seed=5)
    assert min(score.mean for score in other) == 0


def test_chance_is_of_the_whole_answer_and_of_one_word_where_words_are_tokens():
    def chances(name: str, tokenizer) -> dict:
        model = Planted(len(tokenizer), {})
        scores = suite_scores(model, tokenizer, WORLDS[name], questions=1)
        return {(score.kind, score.metric): score.chance for score in scores}

    own = chances("variables", tokenizer_of(WORLDS["variables"]))
    assert own == {("variables", "right"): (1 / 8) ** 4, ("variables", "tokens"): 1 / 8}
    split = chances("variables", corpus.tokenizer())
    assert split == {("variables", "right"): (1 / 8) ** 4, ("variables", "tokens"): None}
    needles = chances("needles", tokenizer_of(WORLDS["needles"]))
    assert needles["single", "right"] == pytest.approx(1e-3)
    assert needles["multivalue", "right"] == pytest.approx(1e-12)
    assert needles["multiquery", "tokens"] == pytest.approx(0.1)
    assert set(chances("two_source", corpus.tokenizer()).values()) == {0.1}


def test_who_guesses_scores_chance():
    world = TwoSource(entities=60, parts=20, values=4)
    drawn = np.random.default_rng(0)
    guesses = {
        tuple(world.query(name, relation, layout)): world.answer(relation, int(drawn.integers(4)))
        for name in world.names()
        for relation in range(world.relations)
        for layout in ("after", "later")
    }
    scores = suite_scores(Planted(world.vocabulary, guesses), tokenizer_of(world), world)
    for kind, value in by_kind(scores).items():
        if not kind.startswith("unknown"):  # of those there are 6, of whom 24 guesses are made
            assert abs(value - 1 / 4) < 4 * (0.25 * 0.75 / 150) ** 0.5


def test_bits_of_a_person_are_those_that_learned_bits_sums_up():
    world, number = WORLDS["people"], 20
    tokenizer, asked = tokenizer_of(world), world.questions()
    known = {question.prompt[1:]: question.answer[0] for question in asked}
    model = Planted(world.vocabulary, known)
    scores = suite_scores(model, tokenizer, world, questions=99)
    assert by_kind(scores) == dict.fromkeys(world.attributes, 1.0)
    (bits,) = by_kind(scores, "bits").values()
    assert bits * number == pytest.approx(world.bits)
    own = sum(each.numel() for each in model.parameters())
    assert by_kind(scores, "bits_per_parameter") == {"everyone": pytest.approx(world.bits / own)}
    half = {prompt: said for prompt, said in known.items() if said % 2}
    partly = Planted(world.vocabulary, half)
    (bits,) = by_kind(suite_scores(partly, tokenizer, world), "bits").values()
    assert bits * number == pytest.approx(world.learned_bits(answers(partly, asked)))
    assert 0 < bits < world.bits / number
    few = suite_scores(model, tokenizer, world, questions=7)
    assert {len(score.values_N) for score in few} == {7}
    assert few[0].chance == 1 / 200 and few[-1].chance == 0


class FirstValue(Repeats):
    """Says the first pair's value, whatever is asked: a guess among the sequence's own."""

    def forward(self, input_ids, **_options):
        logits = torch.zeros(*input_ids.shape, 300)
        logits[torch.arange(len(input_ids)), :, input_ids[:, 1]] = 1.0
        return SimpleNamespace(logits=logits)


def test_random_ids_are_those_of_the_model_and_never_special():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({str(id): id for id in range(270)}, "7")),
        bos_token="7",
        eos_token="100",
    )
    model = configured(Repeats(), 260)
    ids = ordinary_ids(model, tokenizer)
    assert len(ids) == 258 and not {7, 100} & set(ids.tolist()) and ids.max() == 259
    seen = []
    model.register_forward_pre_hook(
        lambda _module, _inputs, options: seen.append(options["input_ids"]), with_kwargs=True
    )
    suite = MQAR(vocabulary=258, length=64, pairs=8)
    (score,) = suite_scores(model, tokenizer, suite, questions=9, batch=4)
    assert score.values_N.tolist() == [1.0] * 9 and score.chance == 1 / 8
    assert set(torch.cat(seen).flatten().tolist()) <= set(ids.tolist())
    guess = configured(FirstValue(), 260)
    assert suite_scores(guess, tokenizer, suite, questions=9)[0].mean == score.chance
    again = Induction(vocabulary=258, length=64, stretch=8)
    assert suite_scores(model, tokenizer, again, questions=2)[0].kind == "induction"
    with pytest.raises(ConfigError, match="mqar: vocabulary=300: the model has 258 ordinary ids"):
        suite_scores(model, tokenizer, replace(suite, vocabulary=300))
    with pytest.raises(ConfigError, match="mqar: length=64: the model has 32 positions"):
        suite_scores(configured(Repeats(), 260, positions=32), tokenizer, suite)


def test_what_does_not_fit_into_a_model_is_refused_in_one_line():
    world = WORLDS["needles"]
    tokenizer = tokenizer_of(world)
    short = configured(Planted(world.vocabulary, {}), world.vocabulary, positions=40)
    with pytest.raises(DataError, match=r"needles: question 0: \d+ tokens, the model has 40 posi"):
        suite_scores(short, tokenizer, world, questions=1)
    small = configured(Planted(world.vocabulary, {}), 100)
    with pytest.raises(DataError, match=r"needles: question 0: token id \d+, the model has 100"):
        suite_scores(small, tokenizer, world, questions=1)
    for wrong in ({"questions": 0}, {"batch": 0}, {"seed": -1}):
        with pytest.raises(ConfigError, match="at least 1, 1 and 0"):
            suite_scores(small, tokenizer, world, **wrong)


def test_pairs_and_facts_are_counted_kind_by_kind():
    tokenizer = corpus.tokenizer()
    pairs = [
        Pair(good=f"The {noun}s bark.", bad=f"The {noun}s barks.", kind=kind)
        for kind, nouns in (("few", ["dog"]), ("many", ["cat", "cow", "hen", "ant"]))
        for noun in nouns
    ]
    model = Likes(len(tokenizer), set(tokenizer(pairs[0].good)["input_ids"]))
    scores = suite_scores(model, tokenizer, MinimalPairs(pairs=tuple(pairs)), questions=3)
    told = [(score.kind, len(score.values_N)) for score in scores]
    assert told == [("few", 1), ("many", 3), ("mean over kinds", 4)]
    assert scores[0].mean == 1 and scores[0].chance == 0.5
    seen: list[tuple[int, int]] = []
    scores = suite_scores(
        Likes(len(tokenizer), set()),
        tokenizer,
        WordnetFacts(documents=300),
        questions=5,
        progress=lambda done, of: seen.append((done, of)),
    )
    splits, wordings = ("train", "validation"), ("worded", "otherwise")
    assert [score.kind for score in scores] == [f"{s}/{w}" for s in splits for w in wordings]
    assert {score.chance for score in scores} == {0.25} and seen[-1] == (80, 80)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    for split in splits:
        known = "\n".join(corpus.documents(split))
        for fact in WordnetFacts(documents=300).some(split, 5, 0):
            assert f"{fact.opening} {fact.choices[fact.gold]}" in known
    with pytest.raises(ConfigError, match="documents=1: too few for 4 glosses"):
        WordnetFacts(documents=1).some("train", 5, 0)
    with pytest.raises(ConfigError, match="pairs: 1 or more"):
        MinimalPairs(pairs=())


def test_bits_per_byte_of_a_band_are_its_bits_over_its_bytes(monkeypatch):
    documents = {split: corpus.documents(split)[:60] for split in corpus.SPLITS}
    documents["train"] += documents["validation"][:5]
    monkeypatch.setattr(corpus, "documents", documents.__getitem__)
    tokenizer = corpus.tokenizer()
    suite = FrequencyBands(tokens=640, context=64)
    judged = suite.read(tokenizer)
    ids_T = judged.material.stream_T
    bytes_T = corpus.token_bytes()[ids_T[1:]]
    assert np.array_equal(judged.material.bytes_T[1 : len(ids_T)], bytes_T)
    assert judged.bands_OT.shape == (2, 640)
    indifferent = configured(Likes(8192, set()), 8192)
    scores = suite.scores(indifferent, judged)
    assert len({score.kind for score in scores}) == len(scores) > 4
    for score in scores:
        order, band = int(score.kind[0]), score.kind.split(", ")[1]
        within = judged.bands_OT[order - 2] == frequency_bands.BANDS.index(band)
        wanted = within.sum() * 13 / bytes_T[within].sum()  # 8192 ids are 13 bits
        assert score.mean == pytest.approx(wanted, rel=1e-5) and len(score.values_N) == 10
    # Apart, an n-gram that began in another document is in no band.
    apart = suite.read(tokenizer, apart=True)
    begins_T = (ids_T[:-1] == tokenizer.bos_token_id) | (np.arange(640) % 64 == 0)
    assert ((apart.bands_OT[0] == -1) == begins_T).all()
    assert (suite.read(tokenizer).bands_OT[0][begins_T] >= 0).sum() > 5
    for wrong in ({"tokens": 100}, {"context": 0}, {"max_order": 1}):
        with pytest.raises(ConfigError, match="2 windows of 1 or more tokens"):
            FrequencyBands(**wrong)


def test_documents_are_judged_apart_for_a_model_that_sees_them_so(monkeypatch, canonical):
    documents = {split: corpus.documents(split)[:60] for split in corpus.SPLITS}
    monkeypatch.setattr(corpus, "documents", documents.__getitem__)
    suite, model = FrequencyBands(tokens=640, context=64), build(canonical).eval()
    judged = suite.read(corpus.tokenizer(), apart=True)
    ids_T = judged.material.stream_T
    losses_T = token_losses(model, ids_T, context=64, batch=4, starts_T=ids_T == 0)
    within_T = judged.bands_OT[0] == 0
    wanted = losses_T[within_T].sum() / judged.material.bytes_T[1:][within_T].sum() / np.log(2)
    assert suite.scores(model, judged)[0].mean == pytest.approx(wanted, rel=1e-5)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(DataError, match="frequency_bands: some of the model's logits"):
        suite.scores(model, judged)


def test_every_suite_says_what_it_shows_and_what_it_cannot():
    assert (*SUITES, "frequency_bands") == evaluate_suites.NAMES
    for suite in (*WORLDS.values(), MQAR(), WordnetFacts(), FrequencyBands()):
        words = " ".join(statement(suite).split())
        assert "Shows:" in words and "Cannot show" in words


def test_rows_are_means_over_seeds_and_retain_only_what_all_of_them_have():
    def score(values: list[float], chance: float | None = 0.1) -> list[SuiteScore]:
        return [
            SuiteScore(suite="s", kind="k", metric="m", chance=chance, values_N=np.array(values))
        ]

    on = [score([1, 1, 0, 0] * 9), score([1, 1, 1, 0] * 9)]
    off = [score([1, 0, 0, 0] * 9), score([0, 0, 0, 0] * 9)]
    (row,) = evaluate_suites.rows({"on": on, "off": off})
    assert row["value"] == pytest.approx(0.625) and row["checkpoints"] == [0.5, 0.75]
    assert row["sd"] == pytest.approx(0.125 * math.sqrt(2)) and row["off_value"] == 0.125
    assert row["low"] <= row["value"] <= row["high"] and row["questions"] == 36
    assert row["retained"] == pytest.approx((0.5 + 0) / 2)
    assert row["above_chance"] == pytest.approx((0.15 / 0.4 + -0.1 / 0.65) / 2)
    (row,) = evaluate_suites.rows({"on": [score([1, 1, 0, 0], 0.5)], "off": [score([1, 0, 0, 0])]})
    assert row["retained"] is row["above_chance"] is row["sd"] is None
    unknown = [score([1, 1, 0, 0] * 9, None)]
    (row,) = evaluate_suites.rows({"on": unknown, "off": unknown})
    assert row["retained"] == 1 and row["above_chance"] is None
    unknown[0][0] = replace(unknown[0][0], metric="bits_per_byte")  # less is better
    (row,) = evaluate_suites.rows({"on": unknown, "off": unknown})
    assert row["retained"] is row["above_chance"] is None
    few = [score([1, 1, 0, 0], 0.4)]  # 0.5 of four questions is not told from a guess of 0.4
    (row,) = evaluate_suites.rows({"on": few, "off": few})
    assert row["retained"] is row["above_chance"] is None
    (row,) = evaluate_suites.rows({"off": [score([1])]})
    assert row["low"] is row["high"] is None and "retained" not in row


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One small model with two seeds."""
    directories = []
    for seed in range(2):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "memory.specification.rows_per_head": [97, 97]}
        model = EngramLMForCausalLM(configure(nano_engram(), sizes))
        model.set_canonical_map(CanonicalMap.from_tokenizer(corpus.tokenizer_file()))
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
        directories.append(tmp_path_factory.mktemp(f"seed{seed}"))
        model.save_pretrained(directories[-1])
        corpus.tokenizer().save_pretrained(directories[-1])
    return directories


def evaluated(capsys, *arguments: object) -> dict:
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


class Longest(torch.nn.Module):
    """Likes token 5 and no other: the more of it, the likelier a sentence."""

    device = torch.device("cpu")

    def forward(self, input_ids, logits_to_keep: int, **_options):
        logits = torch.zeros(*input_ids.shape, 1_000)
        logits[..., 5] = 3.0
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def test_minimal_pairs_are_told_kind_by_kind_and_as_the_mean_over_kinds():
    tokenizer = corpus.tokenizer()
    liked, other = tokenizer.decode([5]), tokenizer.decode([9])
    assert tokenizer(liked)["input_ids"] == [5]
    right, wrong = (
        Pair(good=good, bad=bad, kind=kind)
        for good, bad, kind in ((liked, other, "a"), (other, liked, "a"))
    )
    pairs = (right, right, right, wrong, replace(wrong, kind="b"))
    scores = suite_scores(Longest(), tokenizer, MinimalPairs(pairs=pairs))
    assert by_kind(scores, "preferred") == {"a": 0.75, "b": 0.0, "mean over kinds": 0.375}
    # The standard error of the mean of the kinds' means: only kind a has any.
    error = np.sqrt(scores[0].values_N.var() / 4) / 2
    assert scores[-1].values_N.std() / np.sqrt(5) == pytest.approx(error)
    assert len(suite_scores(Longest(), tokenizer, MinimalPairs(pairs=pairs[:4]))) == 1


def test_parameters_are_counted_wherever_they_are(saved):
    model = EngramLMForCausalLM.from_pretrained(saved[0])
    disk = EngramLMForCausalLM.from_pretrained(saved[0], memory="disk", memory_budget="1MB")
    found = parameters_of(model)
    assert found == parameters_of(disk)
    assert found["parameter"] == sum(each.numel() for each in model.parameters())
    idle = 0
    for table in model.model.tables.values():
        idle += table.weight.numel() - 2 * model.config.memory_config.specification.heads * (
            model.config.memory_config.head_dim
        )
    for layer in model.model.layers:
        experts = getattr(layer.mlp, "experts", None)
        if experts is not None:
            size = sum(each.numel() for each in experts.parameters())
            share = 1 - model.config.num_experts_per_tok / model.config.n_routed_experts
            idle += round(share * size)
    assert found["active_parameter"] == found["parameter"] - idle
    disk.model.served.close()


FEW = [
    "--limit=3",
    "--set=two_source.entities=30",
    "--set=mqar.length=64",
    "--set=mqar.pairs=4",
]


def test_the_command_scores_several_seeds_with_memory_and_without(capsys, saved, tmp_path):
    out, pairs = tmp_path / "scores.json", tmp_path / "agreement.jsonl"
    lines = [{"sentence_good": f"The {n}s bark.", "sentence_bad": "X"} for n in ("dog", "cat")]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = [*FEW, "--suites=two_source,mqar,minimal_pairs", f"--set=minimal_pairs.files={pairs}"]
    found = evaluated(capsys, *saved, *options, "--memory=both", "--out", out)
    assert json.loads(out.read_text()) == found and sorted(os.listdir(tmp_path)) == sorted(
        [out.name, pairs.name]
    )
    assert found["models"] == [str(each) for each in saved] and found["tasks"] == []
    assert found["suites"]["mqar"]["settings"]["vocabulary"] == 8190
    assert found["suites"]["two_source"]["settings"]["entities"] == 30
    assert "Cannot show" in found["suites"]["two_source"]["statement"]
    rows = {(row["suite"], row["kind"]): row for row in found["suite_scores"]}
    assert len(rows) == 6 + 1 + 1
    row = rows["minimal_pairs", "agreement"]
    suite = MinimalPairs(
        pairs=tuple(
            Pair(good=line["sentence_good"], bad=line["sentence_bad"], kind="agreement")
            for line in lines
        )
    )
    for place, directory in enumerate(saved):
        model, tokenizer = EngramLMForCausalLM.from_pretrained(directory), corpus.tokenizer()
        (on,) = suite_scores(model, tokenizer, suite)
        with model.base_model.without_memory():
            (off,) = suite_scores(model, tokenizer, suite)
        assert row["checkpoints"][place] == on.mean
        assert row["off_checkpoints"][place] == off.mean
    assert row["questions"] == 2 and row["low"] <= row["value"] <= row["high"]


def test_the_tables_say_how_many_seeds_there_were(capsys, saved):
    options = ["--suites=induction", "--limit=2", "--tasks=engram_wordnet_bpb", "--limit=2"]
    assert main(["eval", *map(str, saved), *options, "--memory=both"]) == 0
    both = capsys.readouterr().out
    assert "means of 2 seeds" in both and "sd 0." in both and "memory off" in both
    found = evaluated(capsys, *saved, *options)
    alone = [evaluated(capsys, each, *options) for each in saved]
    values = [each["scores"][0]["on_value"] for each in alone]
    assert found["scores"][0]["on_value"] == pytest.approx(sum(values) / 2)
    assert f"{sum(values) / 2:.4f}" in both
    assert alone[0]["scores"][0]["on_sd"] is None
    assert main(["eval", str(saved[0]), "--suites=induction", "--limit=2"]) == 0
    one = capsys.readouterr().out
    assert "one seed" in one and "recalled" in one and "memory off" not in one


def test_rows_on_disk_give_the_same_scores(capsys, saved):
    options = ["--suites=wordnet_facts,induction", "--limit=4", "--memory=both"]
    options.append("--set=wordnet_facts.documents=400")
    inside = evaluated(capsys, saved[0], *options)["suite_scores"]
    assert (
        evaluated(capsys, saved[0], *options, "--set=memory.budget=2MB")["suite_scores"] == inside
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--suites or --tasks is needed; suites are two_source, people"),
        (["--suites=sudoku"], "suite 'sudoku': unknown; accepted are two_source"),
        (["--suites=,"], "suites=',': none is named"),
        (["--suites=mqar", "--set=mqar.keys=3"], "mqar.keys: unknown; accepted are vocabulary"),
        (["--suites=mqar", "--set=people.number=3"], "--suites does not name people"),
        (["--suites=mqar", "--set=horses.number=3"], "two_source.KEY=VALUE or people.KEY=VALUE"),
        (["--suites=mqar", "--set=suites.limit=3"], "suites.limit: unknown; accepted are suites.s"),
        (["--suites=mqar", "--set=suites.seed=a"], "suites.seed='a': int is needed"),
        (["--suites=mqar", "--set=suites.seed=-1"], "suites.seed=-1: 0 or more"),
        (["--suites=mqar", "--set=tasks.shots=1"], "--set tasks.shots: without --tasks"),
        (["--suites=mqar", "--set=mqar.pairs=500"], "mqar.pairs=500: 1 to 64 go into"),
        (["--suites=mqar", "--set=mqar.vocabulary=9000"], "mqar: vocabulary=9000: the model has"),
        (["--suites=mqar", "--set=mqar.exponent=9"], "mqar.exponent=9.0: 0 to 2"),
        (["--suites=induction", "--set=induction.vocabulary=1"], "induction.vocabulary=1: 2 ids"),
        (["--suites=people", '--set=people.attributes={"a b":3}'], "'a b' is no word of lower"),
        (["--suites=people", '--set=people.attributes={"a":"3"}'], "of 2 values or more each"),
        (["--suites=people", "--set=people.seed=-1"], "people.seed=-1: 0 or more"),
        (["--suites=two_source", "--set=two_source.seed=-1"], "two_source.seed=-1: 0 or more"),
        (["--suites=variables", "--set=variables.noise=0"], "variables.noise=0: 1 or more"),
        (["--suites=needles", "--set=needles.parts=2"], "needles.parts=2: 4 keys are too few"),
        (["--suites=minimal_pairs"], "minimal_pairs needs its files, and they it"),
        (["--suites=mqar", "--set=minimal_pairs.files=x"], "minimal_pairs needs its files, and"),
        (["--suites=minimal_pairs", "--set=minimal_pairs.files=/none"], "/none: No such file"),
        (["--suites=minimal_pairs", "--set=minimal_pairs.files=[1]"], "files=[1]: one path or"),
        (["--suites=mqar", "--limit=0"], "limit=0: at least 1"),
        (["--suites=mqar", "--batch-size=0"], "batch_size=0: at least 1"),
        (["--suites=mqar", "--out=/none/at/all"], "/none/at/all: no such directory"),
        (["--suites=mqar", "--set=memory.budget=much"], "memory_budget='much': a number"),
    ],
)
def test_mistakes_are_one_line(capsys, saved, options, words):
    assert main(["eval", str(saved[0]), *options]) == 2
    captured = capsys.readouterr()
    assert not captured.out and captured.err.count("\n") == 1 and words in captured.err


def test_directories_that_are_no_seeds_of_one_model_are_refused(capsys, saved, tmp_path):
    world = tokenizer_of(WORLDS["people"])
    sizes = {"hidden_size": 32, "memory": None, "vocab_size": len(world)}
    EngramLMForCausalLM(configure(nano_engram(), sizes)).save_pretrained(tmp_path)
    world.save_pretrained(tmp_path)

    def refused(*arguments: object) -> str:
        assert main(["eval", *map(str, arguments), "--suites=mqar", *FEW[:1]]) == 2
        return capsys.readouterr().err

    assert "not the model of" in refused(saved[0], tmp_path)
    assert "named twice" in refused(saved[0], saved[0])
    assert "memory='disk', and the model has no memory" in refused(
        tmp_path, "--set=memory.budget=2MB"
    )
    assert "memory='off': this model has none" in refused(tmp_path, "--memory=off")
