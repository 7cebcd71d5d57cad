"""What the pages say of recipes/two_source.py is in its results, verdicts included."""

from itertools import product

import numpy as np
from study_results import LOG, README, TEXT, TWINS, TwoSource, all_there, text_gain

from engram_lm.analysis.student import half_width


def alignment(study: TwoSource, block: int, **how: str) -> str:
    return study(f"alignment_above_null_block_{block}", **how)


def twins_said(s: TwoSource) -> list[str]:
    off, gate = "Engram, memory off", "gate_auroc_{}_layer_{}_stream_0_order_2"
    chance = 1 - (7 / 8) ** 6
    return [
        f"keeps {s.left(off, 'trained/after')} of trained facts right behind the name, "
        f"{s.left(off, 'trained/later')} beyond an n-gram",
        f"rows permuted {s.kept('rows permuted', 'trained/after')} stay, with random rows of "
        f"equal norm {s.kept('random rows of equal norm', 'trained/after')}",
        f"of layer 5 keeps {s.left('MoE, experts of layer 5 off', 'trained/after')}",
        f"{s.left(off, 'given/after')} of given facts right behind the name; "
        f"{s.left(off, 'given/later')} beyond an n-gram",
        f"layer 1 alone off keeps {s.left('Engram, layer 1 off', 'given/after')} of given facts "
        f"right behind the name and {s.left('Engram, layer 1 off', 'trained/after')} of trained",
        f"random rows {s.kept('random rows of equal norm', 'given/later')} stay beyond",
        f"at its mean {s.kept('updates at their mean', 'given/later')}, where on the same "
        f"questions none at all leaves {s.kept('memory off', 'given/later')}",
        f"over blocks: {s('lens_final_to_layer_Engram')} against {s('lens_final_to_layer_MoE')} "
        f"of the MoE; below the middle {s('lens_final_to_layer_Engram_below_middle')} against "
        f"{s('lens_final_to_layer_MoE_below_middle')}",
        f"by {s('lens_loss_difference', scale=-1)} nats",
        f"nearer by {s('lens_final_to_layer_difference_block_0', scale=-1)} already; with memory "
        f"off the mean is {s('lens_final_to_layer_Engram_memory_off')} to a final distribution "
        f"that knows less, and the readings' loss {s('lens_loss_Engram_memory_off')} "
        f"(MoE: {s('lens_loss_MoE')})",
        f"alignment index {s('alignment_index_block_0')} and {s('alignment_index_block_1')}",
        f"by {alignment(s, 0)} and {alignment(s, 1)} (p = {s.p(0):.2f} and {s.p(1):.2f}); above 0 "
        f"in each of three MoEs, which chance alone gives to a block in eight, and to at least one "
        f"of six in {100 * chance:.0f} % of studies; blocks 2 to 5 by at most {alignment(s, 4)}",
        f"{s(gate.format('names', 1))} (layer 1) and {s(gate.format('names', 3))} (layer 3)",
        f"keep {s.kept('gates at their mean', 'trained/after')} of trained facts and cost "
        f"{s('without_gates_at_their_mean')} nats",
    ]


def text_said(s: TwoSource) -> list[str]:
    off, gate = "Engram, memory off", "gate_auroc_{}_layer_{}_stream_0_order_2"
    moe, memory_off = "MoE, experts of layer 0 off", "Engram_memory_off"
    twins = TwoSource("two_source")
    return [
        f"keeps {s.left(off, 'trained/after')} of trained facts right behind the name, "
        f"{s.left(off, 'trained/later')} beyond an n-gram",
        f"rows permuted {s.kept('rows permuted', 'trained/after')}, random rows of equal norm "
        f"{s.kept('random rows of equal norm', 'trained/after')}. The MoE without the routed "
        f"experts of layer 0 keeps {s.left(moe, 'trained/after')}, and "
        f"{s.left(moe, 'trained/later')} beyond",
        f"{s.left(off, 'given/after')} of given facts stay right behind the name, "
        f"{s.left(off, 'given/later')} beyond",
        f"leaves {s.kept('updates at their mean', 'given/after')} behind the name. The MoE "
        f"without layer 0's experts keeps {s.left(moe, 'given/after')} and "
        f"{s.left(moe, 'given/later')}",
        f"values alone: {s.among(memory_off, 'given_after')} right, and "
        f"{s.among(memory_off, 'given_later')} beyond an n-gram, where trained facts have "
        f"{s.among(memory_off, 'trained_after')} and {s.among(memory_off, 'trained_later')}",
        f"The twins have {twins.among(memory_off, 'given_after')} and "
        f"{twins.among(memory_off, 'given_later')} so, trained facts "
        f"{twins.among(memory_off, 'trained_after')} and "
        f"{twins.among(memory_off, 'trained_later')}",
        f"layer 0's experts reads {s.among('MoE_experts_of_layer_0_off', 'given_after')} behind",
        f"by {s('lens_final_to_layer_difference')} nats, below the middle by "
        f"{s('lens_final_to_layer_difference_below_middle')}",
        f"the readings' loss by {s('lens_loss_difference')}",
        f"of blocks 3 and 5 lies above two seeds of the MoE by {alignment(s, 3)} and "
        f"{alignment(s, 5)}",
        f"blocks 2 and 4, above 0 in each of three MoEs as well, by {alignment(s, 2)} and "
        f"{alignment(s, 4)}: not told from 0. Blocks 1 and 6 by "
        f"{alignment(s, 1, form='.3f')} and {alignment(s, 6, form='.3f')}",
        f"names {s(gate.format('names', 1))} (layer 1) and {s(gate.format('names', 3))} (layer 3)",
        f"more {s(gate.format('frequent', 1))} and {s(gate.format('frequent', 3))}. Gates held "
        f"at their mean cost {s('without_gates_at_their_mean')} nats",
    ]


def test_numbers_of_the_twins_that_read_made_up_documents_are_those_of_their_result():
    study = TwoSource("two_source")
    flat = study.flat
    assert flat["seeds"] == 3 and f"{flat['tokens'] / 1e6:.1f}M tokens" in TWINS
    all_there(twins_said(study), TWINS)
    # "Know and read everything", "not told apart", "one seed of three keeps less than half".
    for arm, kind in product(("MoE", "Engram"), study.asked[0]["MoE"]):
        assert flat[f"{arm}_{kind.replace('/', '_')}_mean"] > 0.995
    error = study.bands["difference_error"]
    assert abs(study.bands["difference_mean"]) < half_width(error, 3)
    for part in ("memory off", "layer 1 off"):
        later = [seed[f"Engram, {part}"]["given/later"] for seed in study.asked]
        assert sum(score < 0.5 for score in later) == 1 and len(later) == 3
    for layer in (1, 3):
        auroc = study.interval(f"gate_auroc_names_layer_{layer}_stream_0_order_2")
        assert auroc[0] < 0.5 < auroc[1]  # "0.5 is in both intervals"


def test_numbers_of_the_pair_that_reads_wordnet_are_those_of_its_result():
    study = TwoSource("two_source_text")
    flat = study.flat
    assert flat["seeds"] == 3 and f"{flat['tokens'] / 1e6:.1f}M tokens" in TEXT
    all_there(text_said(study), TEXT)
    nats, _ = text_gain()
    assert f"lower by {nats['mean']:.3f} ± {nats['t95']:.3f} nats a token" in TEXT
    for arm, kind in product(("MoE", "Engram"), study.asked[0]["MoE"]):
        assert flat[f"{arm}_{kind.replace('/', '_')}_mean"] > 0.99  # "know and read everything"
    facts = [
        {row["part"]: row["value"] for row in seed if row["kind"] == "train/worded"}
        for seed in study.analysis["suites"]
    ]
    means = {part: np.mean([seed[part] for seed in facts]) for part in ("as it is", "memory off")}
    assert f"{means['as it is']:.2f} with memory, {means['memory off']:.2f} without" in TEXT
    given = [seed["Engram, memory off"]["given/after"] for seed in study.asked]
    assert sum(score > 0.1 for score in given) == 1  # "but for one seed of three"
    runs = [run for arm in study.record["raw"]["runs"].values() for run in arm]
    assert sum("dirty" in run["commit"] for run in runs) == 5 and len(runs) == 6
    assert "Five of the six runs were trained with uncommitted changes" in TEXT


def test_verdicts_on_the_alignment_are_those_of_students_t():
    twins, text = TwoSource("two_source"), TwoSource("two_source_text")
    # Twins: two blocks are above the null in every MoE, and no block's interval is above 0.
    assert (twins.above[:, :2] > 0).all() and twins.above.shape == (3, 6)
    assert all(twins.p(block) > 0.05 for block in range(6))
    index = twins.analysis["alignment"]
    assert index["likest"][:2] == [3, 3]
    first = [each[0] for each in index["index"]]
    assert f"({min(first):.1f} to {max(first):.1f} for block 0, by MoE)" in TWINS
    most = max(twins.flat[f"alignment_above_null_block_{block}_mean"] for block in range(2, 6))
    assert most == twins.flat["alignment_above_null_block_4_mean"]
    assert "| not shown: it may be so for the first two blocks, three MoEs do not tell |" in TWINS
    # The pair: which stand alone, and by Holm's rule for eight tests.
    p = [text.p(block) for block in range(8)]
    assert (text.above[:, 2:6] > 0).all()
    assert [block for block in range(8) if p[block] < 0.05] == [1, 3, 5, 6]
    ordered = sorted(range(8), key=p.__getitem__)
    assert ordered[0] == 5 and 8 * p[5] < 0.05 and 7 * p[ordered[1]] > 0.05
    assert "by Holm's rule block 5 alone stands" in TEXT


def test_the_readme_and_the_log_have_the_seeds_of_the_two_source_studies():
    off = "Engram, memory off"
    twins, text = TwoSource("two_source"), TwoSource("two_source_text")
    kinds = ("trained/after", "given/after", "given/later")
    for study in (twins, text):
        assert all(study.left(off, kind) in README for kind in kinds)
    all_there([text.left(off, kind) for kind in kinds[1:]], LOG)
    names = "gate_auroc_names_layer_{}_stream_0_order_2"
    all_there([twins(names.format(layer)) for layer in (1, 3)], LOG)
    all_there([text(names.format(1)), text("lens_final_to_layer_difference")], LOG)
    for kind in ("given_after", "given_later", "trained_after", "trained_later"):
        assert text.among("Engram_memory_off", kind) in LOG
