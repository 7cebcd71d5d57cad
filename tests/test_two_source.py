"""recipes/two_source.py in small: equal arms, every switch, and the record that it writes."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_suites import Planted

from engram_lm import EngramLMForCausalLM
from engram_lm.errors import DataError
from engram_lm.model.budget import ledger

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(RECIPES))
    try:
        import two_source

        yield two_source
    finally:
        sys.path.remove(str(RECIPES))


@pytest.mark.parametrize("study", ["twins", "text"])
def test_arms_are_equal_in_parameters_and_flops(recipe, study):
    made = recipe.STUDIES[study](small=False).arms()
    moe, engram = (ledger(made[arm], 128).to_dict() for arm in recipe.ARMS)
    for name in ("p_tot", "p_act", "flops_per_token"):
        assert engram[name] == pytest.approx(moe[name], rel=0.005)
    assert made["MoE"].memory is None and made["Engram"].memory is not None
    for arm in recipe.ARMS:  # as docs/analysis.md has it
        parameters = sum(each.numel() for each in EngramLMForCausalLM(made[arm]).parameters())
        assert f"{parameters / 1e6:.1f}M" == {"twins": "5.3M", "text": "8.0M"}[study]


def test_experts_of_a_layer_are_off_and_come_back(recipe):
    torch.manual_seed(0)
    made = recipe.STUDIES["twins"](small=True).arms()["MoE"]
    model = EngramLMForCausalLM(made).eval()
    ids = torch.randint(made.vocab_size, (1, 9))
    with torch.no_grad():
        before = model(ids).logits
        with recipe.experts_off(model, 2):
            off = model(ids).logits
        assert torch.equal(model(ids).logits, before) and not torch.equal(off, before)
        for parameter in model.model.layers[2].mlp.experts.parameters():
            parameter.zero_()
        assert torch.allclose(model(ids).logits, off, atol=1e-6)


def test_half_of_the_text_studys_tokens_are_text_and_worlds_words_are_one_token_each(recipe):
    study = recipe.STUDIES["text"](small=True)
    ids = study.ids(20_000, 0)
    own = study.tokenizer.convert_tokens_to_ids("<given>")
    made = (ids >= own).mean()  # the separators of both are the tokenizer's
    assert 0.45 < made < 0.5 and len(ids) == 20_001
    (question,) = (each for each in study.questions(1) if each.kind == "trained/after")
    assert len(question.prompt) in (4, 5) and len(question.answer) == 1
    documents = " ".join(map(str, ids))
    assert " ".join(map(str, question.prompt[1:])) in documents  # asked as it was told
    assert study.ids(200, 2_000).tolist() != ids[:201].tolist()  # held-out text is other text


def test_a_summary_retains_nothing_of_what_was_at_chance(recipe):
    seeds = {
        seed: {
            "Engram": {"trained/after": 0.5, "given/after": 0.1},
            "Engram, memory off": {"trained/after": 0.2, "given/after": 0.1},
        }
        for seed in (0, 1)
    }
    flat = recipe.two_source_summary.asked(list(seeds.values()), chance=0.1, number=100)
    assert flat["Engram_memory_off_trained_after_retained_mean"] == pytest.approx(0.4)
    assert flat["Engram_memory_off_trained_after_above_chance_mean"] == pytest.approx(0.25)
    assert "Engram_memory_off_given_after_retained_mean" not in flat
    assert flat["Engram_given_after_sd"] == 0


def test_what_a_part_leaves_is_told_where_all_seeds_had_a_score(recipe):
    def row(part: str, kind: str, metric: str, above: float | None) -> dict:
        return {
            "suite": "two_source",
            "part": part,
            "kind": kind,
            "metric": metric,
            "above_chance": above,
        }

    seeds = [
        [
            row("as it is", "given/later", "right", 1.0),
            row("rows permuted", "given/later", "right", value),
            row("rows permuted", "given/later", "bits", 9.0),
            row("rows permuted", "given/after", "right", other),
        ]
        for value, other in ((0.25, 0.5), (0.75, None))
    ]
    flat = recipe.two_source_summary.kept(SimpleNamespace(suites=seeds))
    name = "kept_rows_permuted_two_source_given_later"
    # Of two seeds: 12.706 standard errors to each side.
    half = pytest.approx(12.706 * 0.25, rel=1e-4)
    assert flat == {
        f"{name}_mean": 0.5,
        f"{name}_sd": pytest.approx(0.125**0.5),
        f"{name}_t95": half,
    }


def test_a_value_is_asked_among_those_of_its_relation(recipe):
    import two_source_values

    study = recipe.STUDIES["twins"](small=True)
    values = two_source_values.values_of(study)
    words = study.world.words()
    assert [[words[value] for value in each] for each in values] == [
        [f"relation{relation}value{value}" for value in range(20)] for relation in (0, 1)
    ]
    questions = study.questions(9)
    known = {question.prompt: question.answer[0] for question in questions[::2]}

    def loud(_module, _inputs, output):
        output.logits[..., 2] = 99.0  # another kind of word above all

    model = Planted(len(words), known)
    with model.register_forward_hook(loud):
        found = two_source_values.among(model, questions, values)
    # What it was not told it takes for the first value of the relation.
    first = {each[0] for each in values}
    wanted = [place % 2 == 0 or q.answer[0] in first for place, q in enumerate(questions)]
    assert found == wanted and not all(found)


@pytest.mark.long
@pytest.mark.parametrize("study", ["twins", "text"])
def test_the_recipe_runs_in_small_and_goes_on_where_it_was(
    recipe, tmp_path, monkeypatch, capsys, study
):
    monkeypatch.chdir(tmp_path)
    name = {"twins": "two_source-smoke", "text": "two_source_text-smoke"}[study]
    command = ["two_source.py", "--smoke", "--threads", "1", "--seeds", "0", "1", "--study", study]
    monkeypatch.setattr(sys, "argv", [*command, "--arms", "MoE"])
    recipe.main()
    assert not capsys.readouterr().out  # one arm says nothing of both
    monkeypatch.setattr(sys, "argv", [*command, "--arms", "MoE"])
    with pytest.raises(DataError, match="a run of 1,024 tokens"):
        monkeypatch.setattr(recipe, "SMOKE_TOKENS", 2_048)
        recipe.main()
    monkeypatch.setattr(recipe, "SMOKE_TOKENS", 1_024)
    monkeypatch.setattr(sys, "argv", command)
    recipe.main()
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    record = json.loads(Path(f"results/{name}.json").read_text())
    assert record["summary"] == first and first["seeds"] == 2
    assert set(record["raw"]["asked"][0]) >= {"MoE", "Engram", "Engram, memory off"}
    assert first["lens_loss_difference_mean"] == pytest.approx(
        first["lens_loss_Engram_mean"] - first["lens_loss_MoE_mean"]
    )
    above = first["alignment_index_block_0_mean"] - first["alignment_null_block_0_mean"]
    assert first["alignment_above_null_block_0_mean"] == pytest.approx(above)
    assert "lens_final_to_layer_Engram_memory_off_block_0_mean" in first
    for suffix in ("svg", "png"):
        assert Path(f"results/{name}.{suffix}").stat().st_size > 1000
        assert Path(f"results/{name}_claims.{suffix}").stat().st_size > 1000
    assert Path(f"runs/{name}/report/report.html").stat().st_size > 100_000
    recipe.main()  # nothing is trained or measured again
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == first
