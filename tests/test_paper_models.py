"""The paper's four models: against its printed numbers, and against the models themselves."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from engram_lm import config
from engram_lm.cli import main
from engram_lm.errors import ConfigError
from engram_lm.memory.fuse import Fuse
from engram_lm.model import EngramLMForCausalLM
from engram_lm.model.budget import ledger, memory_components
from engram_lm.model.memory_budget import MEMORIES, memory_budget
from engram_lm.model.presets import PRESETS, configure, engram_27b, moe_27b, preset
from engram_lm.model.twin import twin

BUDGETS = (Path(__file__).parents[1] / "docs" / "budgets.md").read_text()
# Table 5 of arXiv 2601.07372, in billions; tables by its own arithmetic, layers x width x rows.
PAPER = {
    "dense_4b": (4.1, 3.8, 0, None),
    "moe_27b": (26.7, 3.8, 0, 1),
    "engram_27b": (26.7, 3.8, 5.79, 0.743),
    "engram_40b": (39.5, 3.8, 18.53, None),
}
COMPONENTS = [
    (r"model\.embed_tokens", "token embedding"),
    (r"lm_head", "LM head"),
    (r"model\.tables", "tables"),
    (r".*\.engram\.kv", "Engram projections"),
    (r".*\.engram\.conv\.weight", "Engram conv"),
    (r".*\.engram", "Engram norms and biases"),
    (r".*norm", "norms"),
    (r".*self_attn", "attention"),
    (r".*_hc|.*hc_head", "mHC"),
    (r".*shared_experts", "shared expert"),
    (r".*mlp\.experts", "routed experts"),
    (r".*mlp\.gate\.weight", "router"),
    (r".*mlp", "dense FFN"),
]


def budget(capsys, *arguments: str) -> dict:
    assert main(["budget", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", PAPER)
def test_budgets_are_the_papers_within_a_percent_and_a_half(capsys, name):
    found = budget(capsys, "--preset", name)
    total, active, tables, rho = PAPER[name]
    assert found["total"] == pytest.approx(total * 1e9, rel=0.015)
    assert found["active"] == pytest.approx(active * 1e9, rel=0.015)
    assert found["tables"] == pytest.approx(tables * 1e9, rel=0.001)
    if rho is not None:
        assert found["rho"] == pytest.approx(rho, abs=0.0005)
    counted = [line for line in found["components"] if line["counted"]]
    assert found["active"] == sum(line["active"] for line in counted)
    embedding = next(x for x in found["components"] if x["name"] == "token embedding")
    assert found["total"] == sum(line["total"] for line in counted) + embedding["total"]
    assert embedding["total"] == 129_280 * 2_560


@pytest.mark.parametrize("name", PAPER)
def test_every_component_is_the_models_own_to_the_last_parameter(name):
    with torch.device("meta"):
        model = EngramLMForCausalLM(preset(name))
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    found = Counter()
    for key, parameter in model.named_parameters():
        component = next(c for pattern, c in COMPONENTS if re.match(pattern, key))
        found[component] += parameter.numel()
    expected = Counter()
    for line in ledger(model.config).components:
        whole = line.name.removesuffix(" active").removesuffix(" inactive")
        expected["tables" if whole == "table rows" else whole] += line.total
    assert found == +expected


def test_rho_is_the_share_of_sparse_experts_that_stay():
    # The paper's pair: what leaves the experts is what the tables hold, to 0.4 %.
    assert ledger(engram_27b()).rho == pytest.approx((55 - 6) / (72 - 6), abs=0.001)
    assert ledger(preset("dense_4b")).rho is None


def test_only_the_twin_is_within_half_a_percent_of_the_moes_active_parameters():
    moe, direct = ledger(moe_27b()), ledger(engram_27b())
    other = ledger(twin(moe_27b(), 0.743, config.paper()))
    assert 0.008 < direct.p_act / moe.p_act - 1 < 0.009
    assert other.p_act == pytest.approx(moe.p_act, rel=1e-4)
    assert other.p_tot == pytest.approx(moe.p_tot, rel=1e-4)
    assert other.rho == pytest.approx(direct.rho, abs=0.001)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_named_with_dashes_or_underscores(name):
    assert preset(name).to_dict() == preset(name.replace("-", "_")).to_dict()


def test_a_memory_alone_is_what_it_adds_to_a_model():
    for name in ("engram_27b", "engram_40b"):
        model = preset(name)
        alone = memory_components(model.memory_config, model.hidden_size, model.streams)
        whole = ledger(model)
        assert all(whole[line.name] == line for line in alone)
    without = configure(engram_27b(), {"memory": None})
    added = sum(line.total for line in memory_budget("paper").components)
    assert ledger(engram_27b()).p_tot - ledger(without).p_tot == added


@pytest.mark.parametrize("name", MEMORIES)
def test_a_memorys_components_are_its_modules_parameters(name):
    budget = memory_budget(name)
    memory = budget.memory
    with torch.device("meta"):
        fuses = [
            Fuse(
                budget.streams,
                budget.hidden_size,
                memory.memory_dim,
                memory.fusion,
                memory.specification.max_order,
            )
            for _ in memory.specification.layers
        ]
    values = sum(parameter.numel() for fuse in fuses for parameter in fuse.parameters())
    assert sum(line.total for line in budget.components) - budget.to_dict()["tables"] == values


def test_deepseek_v41s_memory_has_the_published_sizes(capsys):
    found = budget(capsys, "--memory", "deepseek-v4.1")
    assert found["rows"] == {"1": 384_006_168, "14": 384_016_682}
    assert found["row_bytes"] == 264
    assert found["table_bytes"] / 2**30 == pytest.approx(188.83, abs=0.005)
    assert found["rows_per_token"] == 48 and found["bytes_per_token"] == 12_672
    projections = next(x for x in found["components"] if x["name"] == "Engram projections")
    assert projections["total"] == 2 * 25_600 * 6_144  # wkv.weight of two layers


def test_a_memory_changes_with_the_settings_of_a_model(capsys):
    half = ["--set", "model.memory.specification.rows_per_head=[8000000, 8000000, 8000000]"]
    found = budget(capsys, "--memory=deepseek-v4.1", *half, "--set=model.streams=1")
    whole = budget(capsys, "--memory=deepseek-v4.1")
    assert found["table_bytes"] == pytest.approx(whole["table_bytes"] / 2, rel=1e-4)
    assert found["active"] == pytest.approx(whole["active"] * 2 / 5, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory=v4"], "memory='v4': accepted are paper"),
        (["--memory=paper", "--rho=0.5"], "no twin"),
        (["--memory=paper", "--preset=moe_27b"], "give one of"),
        (["--memory=paper", "--set=model.streams=0"], "model.streams=0"),
        (["--memory=paper", "--set=model.layers=3"], "no such field"),
        (["--memory=deepseek-v4.1", "--set=model.memory.head_dim=100"], "must divide dim=100"),
        (["--memory=paper", "--set=model.memory.head_dim=big"], "head_dim='big'"),
        (["--set=model.memory.fusion.conv_kernel=a"], "conv_kernel='a'"),
        (["--preset=moe-28b"], "preset='moe-28b': accepted are nano-moe"),
    ],
    ids=str,
)
def test_budgets_that_cannot_be_are_one_line(capsys, arguments, message):
    assert main(["budget", *arguments]) == 2
    captured = capsys.readouterr()
    assert not captured.out and captured.err.count("\n") == 1 and message in captured.err


def test_an_unknown_memory_is_refused_in_python_too():
    with pytest.raises(ConfigError, match="accepted are paper, demo, deepseek-v4.1"):
        memory_budget("qwen")


def billions(value: float) -> str:
    return f"{value / 1e9:.2f}B"


def table_row(first: str) -> list[str]:
    (line,) = re.findall(rf"^\| {re.escape(first)} \|.*$", BUDGETS, flags=re.MULTILINE)
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.parametrize("name", PAPER)
def test_the_docs_table_holds_the_ledgers_numbers(name):
    found = ledger(preset(name))
    rho = "–" if found.rho is None else f"{found.rho:.1%}"
    sizes = [billions(value) for value in (found.total, found.p_act, found.tables)]
    assert table_row(f"`{name}`")[::2] == [*sizes, rho]


@pytest.mark.parametrize("name", MEMORIES)
def test_the_docs_table_holds_the_memories_numbers(name):
    found = memory_budget(name).to_dict()
    rows, per_token = sum(found["rows"].values()), found["bytes_per_token"]
    assert table_row(f"`{name}`") == [
        f"{rows:,}",
        billions(found["tables"]),
        f"{found['row_bytes']} B",
        f"{found['table_bytes'] / 2**30:.2f} GiB",
        f"{found['rows_per_token']}",
        f"{per_token:,} B",
        f"{found['active'] / 1e6:.1f}M",
    ]


def test_the_docs_tell_the_pairs_difference():
    moe, other = ledger(moe_27b()), twin(moe_27b(), 0.743, config.paper())
    pair = {
        "`engram_27b`, as the paper has it": engram_27b(),
        "`twin(moe_27b(), 0.743, paper())`": other,
    }
    for label, model in pair.items():
        found = ledger(model)
        assert table_row(label) == [
            f"{model.memory_config.specification.rows_per_head[0]:,}",
            f"{model.shared_intermediate_size:,}",
            difference(found.p_act, moe.p_act),
            difference(found.p_tot, moe.p_tot),
        ]


def difference(value: int, reference: int) -> str:
    return f"{round(value / reference - 1, 4) + 0.0:+.2%}"
