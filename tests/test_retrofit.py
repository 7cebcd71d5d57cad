"""recipes/retrofit.py: its arms are compared fairly, and its numbers are what they say."""

import hashlib
import json
import math
import re
import statistics
import sys
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engram_lm import corpus, detach
from engram_lm.errors import ConfigError
from engram_lm.memory.table import Table
from engram_lm.train.batches import Batches

pytestmark = [
    pytest.mark.long,  # a small study: forty seconds, for each worker of xdist that takes a part
    # transformers' new name for what PEFT still calls by the old one.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning"),
]
RECIPES = Path(__file__).parent.parent / "recipes"
SEEDS = (0, 1)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke run, its record, and the study as it stands on the disk."""
    directory = tmp_path_factory.mktemp("retrofit")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPES))
        patch.chdir(directory)
        import retrofit
        import retrofit_arms
        import retrofit_text

        seeds = [str(seed) for seed in SEEDS]
        patch.setattr(sys, "argv", ["retrofit.py", "--smoke", "--threads", "1", "--seeds", *seeds])
        retrofit.main()
        torch.set_flush_denormal(False)
        record = json.loads(Path("results/retrofit-smoke.json").read_text())
        study = retrofit.Study(
            retrofit.SMOKE,
            list(SEEDS),
            directory / "runs" / "retrofit-smoke",
            retrofit.Console(quiet=True),
        )
        yield SimpleNamespace(
            study=study,
            arms=retrofit_arms,
            text=retrofit_text,
            recipe=retrofit,
            directory=directory,
            summary=record["summary"],
            facts=record["raw"]["facts"],
            runs=record["raw"]["runs"],
        )
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def backbone(smoke):
    return smoke.study.backbone(0)[0]


def given(smoke, backbone, arm):
    return smoke.arms.arm_of(arm, backbone, smoke.study.sizes, 0, smoke.study.canonical)


def test_arms_see_equal_data_in_equal_order(smoke):
    sizes, orders = smoke.study.sizes, {}
    for seed in SEEDS:
        found = smoke.runs[str(seed)]
        searched = [run for tried in found["searched"].values() for run in tried]
        runs = [*found["arms"].values(), *searched]
        batches = Batches(smoke.study.new, batch=sizes.batch, context=sizes.context, seed=seed)
        steps = sizes.tokens // (sizes.batch * sizes.context)
        seen = hashlib.sha256()
        for step in range(steps):
            for ids_BT in batches[step][:2]:
                seen.update(ids_BT.numpy().tobytes())
        assert {run["order_sha256"] for run in runs} == {seen.hexdigest()}
        assert {len(run["losses"]) for run in runs} == {steps}
        # Memory and LoRA add nothing at first, so all begin with one loss; then they part.
        assert len({run["losses"][0] for run in runs}) == 1
        assert len({run["losses"][-1] for run in found["arms"].values()}) == len(found["arms"])
        orders[seed] = seen.hexdigest()
    assert len(set(orders.values())) == len(SEEDS)
    assert batches.windows >= steps * sizes.batch  # no token is read twice


@pytest.mark.parametrize("arm", ["memory", "lora_flops", "lora_parameters", "memory_lora", "full"])
def test_an_arm_moves_all_of_its_own_and_no_bit_of_the_rest(smoke, backbone, arm):
    study, model = smoke.study, given(smoke, backbone, arm)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = study.sizes.config(study.sizes.tokens, 6e-3, 0)
    smoke.arms.teach(model, study.new, config, 0.0, lambda record: None)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(trained)
    parts = {"memory": ".engram.|.tables.", "lora": ".lora_[AB]."}
    own = "|".join(each for part, each in parts.items() if part in arm) or "."
    assert all(re.search(own, name) for name in trained)
    tables = [part for part in model.modules() if isinstance(part, Table)]
    assert bool(tables) == arm.startswith("memory")
    assert all(table.weight.grad is None for table in tables)
    if arm == "memory":
        ids = torch.from_numpy(study.judged["old_bpb"][None, :20].astype(np.int64))
        wanted = backbone(ids).logits
        assert not torch.equal(model(ids).logits, wanted)
        assert torch.equal(detach(model)(ids).logits, wanted)


def test_frozen_parameters_are_recorded_as_the_backbones(smoke, backbone):
    wanted = smoke.arms.sha256(backbone.parameters())
    arms = smoke.runs["0"]["arms"]
    for arm in ("memory", "lora_flops", "lora_parameters", "memory_lora"):
        assert arms[arm]["frozen_sha256"] == wanted
        assert arms[arm]["backbone_parameters"] == sum(p.numel() for p in backbone.parameters())


def test_trainable_flops_are_equal_and_what_torch_counts(smoke, backbone):
    sizes, arms = smoke.study.sizes, smoke.runs["0"]["arms"]
    bare = smoke.arms.counted_flops(backbone, sizes, backward=False)
    for arm in ("memory", "lora_flops", "lora_parameters", "memory_lora"):
        model = given(smoke, backbone, arm)
        added = smoke.arms.counted_flops(model, sizes, backward=False) - bare
        assert 3 * added == arms[arm]["trainable_flops"]  # forward 2, backward 4
    assert arms["memory"]["trainable_flops"] == arms["lora_flops"]["trainable_flops"]
    assert arms["memory_lora"]["trainable_flops"] == 2 * arms["memory"]["trainable_flops"]


def test_parameters_are_equal_to_half_a_rank(smoke):
    arms, ranks = smoke.runs["0"]["arms"], smoke.facts["ranks"]
    per_rank = arms["lora_flops"]["trained_parameters"] / ranks["lora_flops"]
    apart = arms["lora_parameters"]["trained_parameters"] - arms["memory"]["trained_parameters"]
    assert abs(apart) <= per_rank / 2
    assert smoke.facts["rank_limited_by_width"] == []


def test_the_whole_studys_ranks_fit(smoke):
    sizes = smoke.arms.Sizes()
    assert sizes.ranks["lora_flops"] == sizes.rank("lora_flops") == 8
    wanted, rank = sizes.ranks["lora_parameters"], sizes.rank("lora_parameters")
    assert rank < sizes.width and abs(rank / wanted - 1) < 0.005
    larger = smoke.arms.Sizes(rows=20_000)
    assert larger.ranks["lora_parameters"] > larger.rank("lora_parameters") == larger.width
    with pytest.raises(ConfigError, match="whole rank"):
        smoke.arms.Sizes(head_dim=16).rank("lora_flops")


def test_parts_share_no_module_and_no_run_of_words(smoke):
    text = smoke.text.read(smoke.study.sizes.modules)
    assert smoke.text.sha256(text) == smoke.facts["text_sha256"]
    assert all(text[part] for part in smoke.text.PARTS)
    runs = {  # of 13 words; a shorter paragraph is one
        part: {
            tuple(each[first : first + 13])
            for said in text[part].values()
            for paragraph in said.split("\n\n")
            for each in [re.findall(r"\w+", paragraph.lower())]
            for first in range(max(1, len(each) - 12))
        }
        for part in text
    }
    assert len(runs["train"]) > 3_000 and all(runs.values())
    for one, other in combinations(smoke.text.PARTS, 2):
        assert not text[one].keys() & text[other].keys()
        assert not runs[one] & runs[other]
    dealt = [smoke.text.part_of(name) for name in smoke.text.modules()]
    assert 0.75 < dealt.count("train") / len(dealt) < 0.85


def test_bits_per_byte_are_those_of_a_direct_computation(smoke, backbone):
    sizes, ids_T = smoke.study.sizes, smoke.study.judged["old_bpb"]
    nats = 0.0
    for first in range(0, len(ids_T) - 1, sizes.context):
        window = torch.from_numpy(ids_T[first : first + sizes.context + 1].astype(np.int64))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits_TV = backbone(window[None, :-1]).logits[0]
        nats += F.cross_entropy(logits_TV.float(), window[1:], reduction="sum").item()
    said = corpus.tokenizer().decode(ids_T[1:].tolist(), skip_special_tokens=True)
    wanted = nats / math.log(2) / len(said.encode())
    # In bfloat16, batches of another size may be rounded otherwise.
    assert smoke.arms.bits_per_byte(backbone, ids_T, sizes) == pytest.approx(wanted, rel=1e-3)
    assert smoke.runs["0"]["backbone"]["old_bpb"] == pytest.approx(wanted, rel=1e-3)


def test_the_summary_is_that_of_the_runs(smoke):
    forgetting, differences = [], []
    for seed in map(str, SEEDS):
        before, arms = smoke.runs[seed]["backbone"], smoke.runs[seed]["arms"]
        forgetting.append(arms["full"]["old_bpb"] - before["old_bpb"])
        differences.append(arms["memory"]["new_bpb"] - arms["full"]["new_bpb"])
    for name, values in (
        ("full_forgetting", forgetting),
        ("memory_minus_full_new_bpb", differences),
    ):
        assert smoke.summary[f"{name}_mean"] == pytest.approx(statistics.mean(values))
        assert smoke.summary[f"{name}_sd"] == pytest.approx(statistics.stdev(values))
    for suffix in ("svg", "png"):
        assert (smoke.directory / "results" / f"retrofit-smoke.{suffix}").stat().st_size > 1000


def test_every_arm_searches_as_many_rates_and_takes_the_best_on_validation(smoke):
    for arm, tried in smoke.runs["0"]["searched"].items():
        assert len({each["lr"] for each in tried}) == len(tried) == 3
        best = min(tried, key=lambda each: each["validation_bpb"])
        assert smoke.runs["0"]["arms"][arm] == best
        assert smoke.runs["1"]["arms"][arm]["lr"] == best["lr"]
        rates = sorted(each["lr"] for each in tried)
        assert all(high == pytest.approx(3 * low) for low, high in pairwise(rates))
    judged = smoke.study.judged
    assert not np.array_equal(judged["validation_bpb"], judged["new_bpb"])


def test_an_interrupted_study_goes_on_to_the_same_numbers(smoke, monkeypatch):
    study = smoke.study
    (lost,) = (study.out / "seed-1").glob("memory_lora-*.json")
    lost.unlink()
    trained = []
    teach = smoke.recipe.teach
    monkeypatch.setattr(
        smoke.recipe, "teach", lambda *args: (trained.append(args[2].lr), teach(*args))[1]
    )
    found = json.loads(json.dumps(study.run()))
    assert trained == [smoke.runs["1"]["arms"]["memory_lora"]["lr"]]
    for runs in (found, smoke.runs):
        for measured in ("seconds", "tokens_per_second"):
            runs["1"]["arms"]["memory_lora"].pop(measured)
    assert found == smoke.runs
