"""What README and docs say is what the code does and what results/ hold."""

import json
import re
import shlex
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from conftest import DEEPSEEK_TOKENIZER
from test_harness import COMMAND as HARNESS_COMMAND

from engram_lm.cli import VERBS, main, parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "conformance/README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


# TRL and PEFT still ask for it by its old name.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_snippets_run(page, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for snippet in blocks(page.read_text(), "python"):
        exec(compile(snippet, str(page), "exec"), {})


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "analysis.md"])
def test_every_command_is_one_that_parses(page):
    lines = [line for shell in blocks(page.read_text(), "sh") for line in shell.splitlines()]
    assert lines
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "engram"
        parser().parse_args(arguments)


def test_every_command_on_the_page_of_the_ecosystem_is_one_that_parses():
    page = (ROOT / "docs" / "ecosystem.md").read_text()
    assert HARNESS_COMMAND in page
    lines = [line for shell in blocks(page, "sh") for line in shell.splitlines()]
    ours = [
        line.removeprefix("HF_ALLOW_CODE_EVAL=1 ") for line in lines if "lm_eval run" not in line
    ]
    assert len(ours) == 4
    for line in ours:
        program, *arguments = shlex.split(line)
        assert program == "engram"
        parser().parse_args(arguments)


def test_numbers_of_the_comparison_with_engram_peft_are_those_of_its_result():
    result = json.loads((ROOT / "results" / "compare_retrofit.json").read_text())["summary"]
    page = (ROOT / "docs" / "ecosystem.md").read_text().replace("\n", " ")
    arms = ("bare", "ours", "peft", "peft_dense")
    for row, name in (
        ("tokens/s (median of rounds)", "tokens_per_second"),
        ("tokens per CPU second", "tokens_per_cpu_second"),
        ("peak memory, MB", "peak_mb"),
    ):
        assert f"| {row} | " + " | ".join(f"{result[f'{arm}_{name}']:,.0f}" for arm in arms) in page
    for kind in ("", "_cpu"):
        for other in ("bare", "peft", "peft_dense"):
            name = f"ours_over_{other}{kind}"
            median, least, most = (result[f"{name}{end}"] for end in ("", "_least", "_most"))
            assert f"{median:.2f} ({least:.2f}, {most:.2f})" in page
    bare = result["bare_tokens_per_cpu_second"] / result["peft_tokens_per_cpu_second"]
    assert f"the ceiling, runs at {bare:.1f}x its speed" in page
    dense = min(result["ours_over_peft_dense"], result["ours_over_peft_dense_cpu"])
    assert f"ours is {dense:.1f}x as fast" in page
    plain, sparse = (
        1 - result["ours_peak_mb"] / result[f"{arm}_peak_mb"] for arm in ("peft", "peft_dense")
    )
    assert f"Peak memory is {plain:.0%} lower, or {sparse:.0%} lower than with dense" in page
    sound = result["cells"] - result["bare_model_deviates"]
    assert (
        f"Of {sound} cells in which the bare model is sound ours has {result['ours_ok']} right, "
        f"engram-peft {result['peft_ok']}; with its convolution at zero, "
        f"{result['peft_no_conv_ok']}." in page
    )


def test_numbers_of_the_retrofit_study_are_those_of_its_result():
    result = json.loads((ROOT / "results" / "retrofit.json").read_text())["summary"]
    page = (ROOT / "docs" / "ecosystem.md").read_text()
    readme = README.replace("\n", " ")
    log = (ROOT / "docs" / "log.md").read_text()

    def spread(name: str) -> str:
        return f"{result[f'{name}_mean']:.3f} ± {result[f'{name}_sd']:.3f}"

    rows = {
        "memory": "memory",
        "lora_flops": "LoRA, equal FLOPs",
        "lora_parameters": "LoRA, equal parameters",
        "full": "all parameters",
        "memory_lora": "memory + LoRA",
    }
    for arm, label in rows.items():
        (row,) = (line for line in page.splitlines() if line.startswith(f"| {label} |"))
        flops = result.get(f"{arm}_trainable_flops")
        assert row == (
            f"| {label} | {result[f'{arm}_trained_parameters'] / 1e6:.2f}M "
            f"| {'-' if flops is None else f'{flops / 1e6:.1f}M'} "
            f"| {result[f'{arm}_step_flops'] / 1e6:.1f}M | {spread(f'{arm}_new_bpb')} "
            f"| {spread(f'{arm}_gain')} | {spread(f'{arm}_forgetting')} |"
        )
        assert not result[f"{arm}_lr_at_edge"]
    for name in ("lora_flops_new_bpb", "lora_flops_forgetting", "lora_parameters_new_bpb"):
        mean, sd = result[f"memory_minus_{name}_mean"], result[f"memory_minus_{name}_sd"]
        assert f"{mean:+.3f} ± {sd:.3f}" in page
    for name in ("backbone_new_bpb", "backbone_old_bpb"):
        assert spread(name) in page
    assert f"A Llama of {result['backbone_parameters'] / 1e6:.2f}M parameters" in page
    assert f"read {result['tokens'] / 1e3:.0f}k tokens of something else" in page
    ours = result["memory_trainable_flops"]
    assert f"at {result['lora_parameters_trainable_flops'] / ours:.0f}x the trainable" in page
    assert f"come near it at {result['memory_lora_trainable_flops'] / ours:.0f}x" in page
    runs = json.loads((ROOT / "results" / "retrofit.json").read_text())["raw"]["runs"]
    for seed in runs.values():  # the log: LoRA is ahead in every seed
        assert seed["arms"]["lora_flops"]["new_bpb"] < seed["arms"]["memory"]["new_bpb"]
    tried = {each["lr"]: each for each in runs["0"]["searched"]["memory"]}
    high, lora = tried[max(tried)], runs["0"]["arms"]["lora_flops"]
    assert max(tried) == pytest.approx(3 * result["memory_lr"])
    assert high["old_bpb"] >= lora["old_bpb"] and high["new_bpb"] >= lora["new_bpb"]
    for arm in ("memory", "lora_flops"):
        assert spread(f"{arm}_new_bpb") in readme and spread(f"{arm}_forgetting") in readme
        assert spread(f"{arm}_gain") in log and spread(f"{arm}_forgetting") in log


def test_the_readmes_quick_commands_run(capsys):
    (shell,) = blocks(README, "sh")
    for line in shell.splitlines():
        arguments = shlex.split(line)[1:]
        if arguments[0] in ("rows", "budget"):
            arguments = [str(DEEPSEEK_TOKENIZER) if a == "tokenizer.json" else a for a in arguments]
            assert main(arguments) == 0


def test_the_readme_names_every_verb_with_help():
    for verb in VERBS:
        assert f"| `engram {verb}` |" in README


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_numbers_in_the_readme_are_those_of_the_results():
    demos = [
        json.loads((ROOT / "results" / f"demo_{precision}.json").read_text())["summary"]
        for precision in ("bf16", "fp32")
    ]
    speed = json.loads((ROOT / "results" / "train_step.json").read_text())["summary"]
    rows = {
        "MoE": "moe",
        "Engram": "engram",
        "Engram, memory switched off": "engram_memory_off",
        "Engram minus MoE, seed by seed": "difference",
    }
    for title, name in rows.items():
        sign = "+" if name == "difference" else ""
        cells = [
            f"{demo[f'{name}_{unit}_mean']:{sign}.4f} ± {demo[f'{name}_{unit}_t95']:.4f}"
            for demo in demos
            for unit in ("loss", "bpb")
        ]
        assert f"| {title} | {' | '.join(cells)} |" in README
    assert f"{speed['ratio_of_medians']:.2f}x" in README


def test_numbers_of_addressing_are_those_of_its_result():
    result = json.loads((ROOT / "results" / "addressing.json").read_text())["summary"]
    ratios = [value for name, value in result.items() if name.endswith("_compiled_over_demo")]
    shares = [value for name, value in result.items() if name.endswith("_share_of_fill")]
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    other = json.loads((ROOT / "results" / "addressing_epyc.json").read_text())["summary"]
    slower = [value for name, value in other.items() if name.endswith("_compiled_over_demo")]
    assert f"{min(ratios):.1f}x to {max(ratios):.1f}x the tokens/s" in README
    assert f"{min(slower):.1f}x to {max(slower):.1f}x on" in README
    assert f"at {min(shares):.0%} to {max(shares):.0%} of the speed" in page


def test_numbers_of_table_sizes_are_those_of_their_result():
    result = json.loads((ROOT / "results" / "table_size.json").read_text())["summary"]
    steps = [value for name, value in result.items() if name.endswith("_step_ratio")]
    alone = [value for name, value in result.items() if name.endswith("_1e8_optimizer_ratio")]
    page = (ROOT / "docs" / "how-it-works.md").read_text().replace("\n", " ")
    assert f"at most {max(steps):.2f}x as long" in page
    assert f"takes {min(alone):.1f}x to {max(alone):.1f}x as long with 1e8 rows" in page


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.json")), ids=lambda p: p.stem)
def test_every_result_says_how_it_was_made(path):
    record = json.loads(path.read_text())
    assert {"summary", "command", "commit", "machine", "seeds", "wall_seconds", "raw"} <= set(
        record
    )
    assert all(isinstance(value, int | float) for value in record["summary"].values())


def test_the_page_on_analysis_says_what_its_report_costs():
    cost = json.loads((ROOT / "results" / "analyze_report.json").read_text())["summary"]
    page = (ROOT / "docs" / "analysis.md").read_text()
    assert f"takes {cost['seconds_median']:.0f} s on {cost['threads']} cores" in page
    assert cost["seconds_max"] < 120


def spread(flat: dict, name: str, scale: float = 1, form: str = ".2f") -> str:
    mean, sd = flat[f"{name}_mean"] * scale, flat[f"{name}_sd"] * abs(scale)
    return f"{mean:{form}} ± {sd:{form}}"


def percent(flat: dict, name: str) -> str:
    return f"{spread(flat, name, 100, '.0f')} %"


def test_numbers_of_the_pair_that_reads_wordnet_are_those_of_its_result():
    record = json.loads((ROOT / "results" / "two_source_text.json").read_text())
    flat, page = record["summary"], (ROOT / "docs" / "analysis.md").read_text()
    _, _, page = page.partition("### And a pair that reads WordNet as well")
    told, share = partial(spread, flat), partial(percent, flat)
    assert flat["seeds"] == 3 and f"{flat['tokens'] / 1e6:.1f}M tokens" in page
    off, kept = "Engram_memory_off_{}_above_chance", "kept_{}_two_source_{}"
    moe = "MoE_experts_of_layer_0_off_{}_above_chance"
    bands = record["raw"]["analysis"]["bands"]
    above = "alignment_above_null_block_{}"
    among = json.loads((ROOT / "results" / "two_source_values.json").read_text())["summary"]

    def text(kind: str) -> str:
        return spread(among, f"two_source_text_Engram_memory_off_{kind}")

    def twins(kind: str) -> str:
        return spread(among, f"two_source_Engram_memory_off_{kind}")

    moe_reads = spread(among, "two_source_text_MoE_experts_of_layer_0_off_given_after")
    page = page.replace("\n", " ")
    gate = "gate_auroc_{}_layer_{}_stream_0_order_2"
    for said in (
        f"lower by {-bands['difference_mean']:.3f} ± {bands['difference_error']:.3f} nats",
        f"keeps {share(off.format('trained_after'))} of trained facts right behind the name, "
        f"{share(off.format('trained_later'))} beyond an n-gram",
        f"rows permuted {share(kept.format('rows_permuted', 'trained_after'))}, random rows of "
        f"equal norm {share(kept.format('random_rows_of_equal_norm', 'trained_after'))}. The MoE "
        f"without the routed experts of layer 0 keeps {share(moe.format('trained_after'))}, and "
        f"{share(moe.format('trained_later'))} beyond",
        f"{share(off.format('given_after'))} of given facts stay right behind the name, "
        f"{share(off.format('given_later'))} beyond",
        f"leaves {share(kept.format('updates_at_their_mean', 'given_after'))} behind the name. "
        f"The MoE without layer 0's experts keeps {share(moe.format('given_after'))} and "
        f"{share(moe.format('given_later'))}",
        f"values alone: {text('given_after')} right, and {text('given_later')} beyond an n-gram, "
        f"where trained facts have {text('trained_after')} and {text('trained_later')}",
        f"The twins have {twins('given_after')} and {twins('given_later')} so, trained facts "
        f"{twins('trained_after')} and {twins('trained_later')}",
        f"layer 0's experts reads {moe_reads} behind the name",
        f"by {told('lens_final_to_layer_difference')} nats, below the middle by "
        f"{told('lens_final_to_layer_difference_below_middle')}",
        f"the readings' loss by {told('lens_loss_difference')}",
        f"by {told(above.format(2))}, {told(above.format(3))}, {told(above.format(4))} and "
        f"{told(above.format(5))}, above 0",
        f"by {told(above.format(0))} and {told(above.format(1))}",
        f"names {told(gate.format('names', 1))} (layer 1) and "
        f"{told(gate.format('names', 3))} (layer 3)",
        f"more {told(gate.format('frequent', 1))} and {told(gate.format('frequent', 3))}. Gates "
        f"held at their mean cost {told('without_gates_at_their_mean')} nats",
    ):
        assert said in page, said
    line = README.replace("\n", " ")
    assert ", ".join(share(off.format(kind)) for kind in ("trained_after", "given_after")) in line
    for arm, kind in product(("MoE", "Engram"), record["raw"]["asked"][0]["MoE"]):
        assert flat[f"{arm}_{kind.replace('/', '_')}_mean"] > 0.99  # "know and read everything"
    for moe_seed in record["raw"]["analysis"]["alignment"]["above"]:
        assert min(moe_seed[2:6]) > 0
    facts = [
        {row["part"]: row["value"] for row in seed if row["kind"] == "train/worded"}
        for seed in record["raw"]["analysis"]["suites"]
    ]
    means = {part: np.mean([seed[part] for seed in facts]) for part in ("as it is", "memory off")}
    assert f"{means['as it is']:.2f} with memory, {means['memory off']:.2f} without" in page
    given = [seed["Engram, memory off"]["given/after"] for seed in record["raw"]["asked"]]
    assert sum(score > 0.1 for score in given) == 1  # "but for one seed of three"


def test_numbers_of_the_two_source_study_are_those_of_its_result():
    record = json.loads((ROOT / "results" / "two_source.json").read_text())
    flat, page = record["summary"], (ROOT / "docs" / "analysis.md").read_text()
    told, share = partial(spread, flat), partial(percent, flat)
    assert flat["seeds"] == 3 and f"{flat['tokens'] / 1e6:.1f}M tokens" in page
    off, kept = "Engram_memory_off_{}_above_chance", "kept_{}_two_source_{}"
    for said in (
        f"keeps {share(off.format('trained_after'))} of trained facts right behind the name, "
        f"{share(off.format('trained_later'))} beyond an n-gram",
        f"rows permuted {share(kept.format('rows_permuted', 'trained_after'))} stay, with random "
        f"rows of equal norm {share(kept.format('random_rows_of_equal_norm', 'trained_after'))}",
        f"of layer 5 keeps {share('MoE_experts_of_layer_5_off_trained_after_above_chance')}",
        f"{share(off.format('given_after'))} of given facts right behind the name; "
        f"{share(off.format('given_later'))} beyond an n-gram",
        f"layer 1 alone off keeps {share('Engram_layer_1_off_given_after_above_chance')} of given "
        "facts right behind the name and "
        f"{share('Engram_layer_1_off_trained_after_above_chance')} of trained ones",
        f"random rows {share(kept.format('random_rows_of_equal_norm', 'given_later'))} stay beyond",
        f"at its mean {share(kept.format('updates_at_their_mean', 'given_later'))}, where on the "
        f"same questions none at all leaves {share(kept.format('memory_off', 'given_later'))}",
        f"over blocks: {told('lens_final_to_layer_Engram')} against "
        f"{told('lens_final_to_layer_MoE')} of the MoE; below the middle "
        f"{told('lens_final_to_layer_Engram_below_middle')} against "
        f"{told('lens_final_to_layer_MoE_below_middle')}",
        f"by {told('lens_loss_difference', -1)} nats",
        f"nearer by {told('lens_final_to_layer_difference_block_0', -1)} already; with memory "
        f"off the mean is {told('lens_final_to_layer_Engram_memory_off')} to a final distribution "
        f"that knows less, and the readings' loss {told('lens_loss_Engram_memory_off')} "
        f"(MoE: {told('lens_loss_MoE')})",
        f"alignment index {told('alignment_index_block_0')} and {told('alignment_index_block_1')}",
        f"by {told('alignment_above_null_block_0')} and {told('alignment_above_null_block_1')}, "
        "above 0 in each of three MoEs; blocks 2 to 5 by at most "
        f"{told('alignment_above_null_block_4')}",
        f"{told('gate_auroc_names_layer_1_stream_0_order_2')} (layer 1) and "
        f"{told('gate_auroc_names_layer_3_stream_0_order_2')} (layer 3)",
        f"keep {share(kept.format('gates_at_their_mean', 'trained_after'))} of trained facts and "
        f"cost {told('without_gates_at_their_mean')} nats",
    ):
        assert said in page
    line = README.replace("\n", " ")
    for kind in ("trained_after", "given_after", "given_later"):
        assert f" {share(off.format(kind))}" in line
    # "Know and read everything", "no block lies above", "one seed of three keeps less than half".
    for arm, kind in product(("MoE", "Engram"), record["raw"]["asked"][0]["MoE"]):
        assert flat[f"{arm}_{kind.replace('/', '_')}_mean"] > 0.995
    bands = record["raw"]["analysis"]["bands"]
    assert abs(bands["difference_mean"]) < 2 * bands["difference_error"]  # "not told apart"
    alignment = record["raw"]["analysis"]["alignment"]
    assert all(min(above[:2]) > 0 for above in alignment["above"]) and len(alignment["above"]) == 3
    most = max(flat[f"alignment_above_null_block_{block}_mean"] for block in range(2, 6))
    assert most == flat["alignment_above_null_block_4_mean"]
    assert alignment["likest"][:2] == [3, 3]
    first = [index[0] for index in alignment["index"]]
    assert f"({min(first):.1f} to {max(first):.1f} for block 0, by MoE)" in page
    for part in ("memory off", "layer 1 off"):
        later = [seed[f"Engram, {part}"]["given/later"] for seed in record["raw"]["asked"]]
        assert sum(score < 0.5 for score in later) == 1 and len(later) == 3
