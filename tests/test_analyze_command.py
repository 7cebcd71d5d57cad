"""`engram analyze` and its verbs, run as a user runs them."""

import json
import re

import pytest
import torch
from test_analysis import HOSTILE, build

from engram_lm.analysis.analyze import PARTS
from engram_lm.analysis.findings import Analysis
from engram_lm.cli import main


@pytest.fixture(scope="module")
def saved(canonical, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("a", "b")):
        model = build(canonical)
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.lm_head.weight, std=0.1)
        model.save_pretrained(out / name / "model")
        tokenizer.save_pretrained(out / name / "model")
    for number, name in enumerate(("plain", "plain1")):
        plain = build(canonical, memory=False)
        torch.nn.init.normal_(plain.lm_head.weight, std=0.1 + number)
        plain.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    (out / "text.txt").write_text("New York is a city in the United States.\n世界\n" * 60)
    return out


def test_analyze_writes_a_report_of_several_seeds(saved, tmp_path, capsys):
    text = str(saved / "text.txt")
    command = [
        *("analyze", str(saved / "a/model"), str(saved / "b/model")),
        *("--against", str(saved / "plain"), str(saved / "plain1")),
        *("--text", text, "--corpus", text),
        *("--out", str(tmp_path), "--set=analyze.context=32", "--set=analyze.tokens=640"),
    ]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "a (2 seeds): 640 tokens of text.txt" in said and "report.html" in said
    made = Analysis.load(tmp_path / "analysis.json")
    assert (made.name, made.against) == ("a", "plain")
    assert re.fullmatch(r"text\.txt \([\d,]+ tokens\)", made.corpus)
    assert made.alignment is not None and made.ablation is None
    assert made.gates.traces[0].text == "New York is a city in the United States."


@pytest.mark.parametrize("verb", ["gates", "lens", "bands", "addresses", "alignment", "ablation"])
def test_each_part_has_a_verb(saved, tmp_path, capsys, verb):
    text = str(saved / "text.txt")
    command = [
        *(verb, str(saved / "a/model"), "--text", text, "--corpus", text, "--memory=disk"),
        "--memory-budget=200kB",
        *("--set=analyze.context=32", "--set=analyze.tokens=640"),
        *(("--against", str(saved / "plain")) if verb == "alignment" else ()),
    ]
    assert main(command) == 0
    shown = capsys.readouterr().out
    titles = {
        "gates": "gates: white 0, orange 1",
        "lens": "each place read by the model's head",
        "bands": "loss, nats per token",
        "addresses": "who shares rows",
        "alignment": "null: one seed, none",
        "ablation": "loss without a part",
    }
    assert [name for name, title in titles.items() if title in shown] == [verb]
    assert main([*command, "--json", "--out", str(tmp_path)]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [name for name in PARTS if made[name] is not None] == [verb]
    assert Analysis.load(tmp_path / "analysis.json").name == "a"


def test_ablation_asks_suites(saved, capsys):
    command = [
        *("ablation", str(saved / "a/model"), "--text", str(saved / "text.txt")),
        *("--set=analyze.context=32", "--set=analyze.tokens=64", "--set=suites.names=induction"),
        *("--set=induction.length=24", "--set=induction.stretch=6", "--set=suites.questions=3"),
    ]
    assert main(command) == 0
    assert "suites without a part" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["suites"][0]
    assert {row["suite"] for row in rows} == {"induction"} and rows[1]["part"] == "memory off"


def test_gates_colours_any_sentence(saved, capsys):
    command = ["gates", str(saved / "a/model"), "--sentence", HOSTILE, "--sentence", "世界"]
    text = ["--text", str(saved / "text.txt"), "--set=analyze.tokens=320"]
    assert main([*command, *text, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [trace["text"] for trace in made["gates"]["traces"]] == [HOSTILE, "世界"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gates", "plain"], "gates: a memory is needed"),
        (["addresses", "a/model"], "addresses: a corpus (--corpus) is needed"),
        (["alignment", "a/model"], "a model to compare with"),
        (["gates", "nowhere"], "nowhere: no config.json"),
        (["lens", "a/model", "plain"], "seeds of one model have one configuration"),
        (["bands", "a/model", "--set=analyze.context=2"], "context=2"),
        (["bands", "a/model", "--set=analyze.tokens=100000"], None),
        (["bands", "plain"], None),
        (["ablation", "a/model", "--set=suites.heads=3"], "suites.heads=true or false"),
        (["gates", "a/model", "--sentence", ""], "text=''"),
        (["analyze", "a/model", "--out", "x", "--parts=all"], "'all'"),
        (["ablation", "a/model", "--set=suites.names=mqra"], "suite 'mqra': unknown"),
        (["bands", "a/model", "b/model", "a/model"], "named twice"),
        (["bands", "a/model", "--out", "text.txt"], "text.txt: not a directory"),
        (["ablation", "a/model", "--set=minimal_pairs.foo=3"], "minimal_pairs.foo: unknown"),
        (["analyze", "a/model", "--out", "x", "--parts=gates,addresses"], "a corpus (--corpus)"),
        (["ablation", "a/model", "--set=suites.seed=1"], "suites.names=a,b"),
        (["ablation", "a/model", "--set=suites.names=frequency_bands"], "a part of its own"),
    ],
)
def test_bad_input_gets_one_line(saved, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(saved)
    status = main([*arguments, "--text", "text.txt"])
    captured = capsys.readouterr()
    if said is None:  # a text shorter than what was asked for; a model without memory alone
        assert status == 0
        return
    assert status == 2 and said in captured.err and captured.err.count("\n") == 1
    assert not captured.out and not (saved / "x").exists()
