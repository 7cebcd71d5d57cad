"""The command line in process: what it prints, and that mistakes are one line."""

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEEPSEEK_TOKENIZER

from engram_lm import corpus
from engram_lm.cli import main, parser
from engram_lm.memory.canonical import CanonicalMap, backend_of
from engram_lm.model import EngramLMForCausalLM
from engram_lm.model.presets import configure, nano_engram

MAPS: dict[str, CanonicalMap] = {}


@pytest.fixture(autouse=True)
def mapped_once(monkeypatch):
    """A canonical map of 129,280 tokens takes seconds: each tokenizer's is made once."""
    make = CanonicalMap.from_tokenizer

    def kept(tokenizer):
        key = backend_of(tokenizer).to_str()
        if key not in MAPS:
            MAPS[key] = make(tokenizer)
        return MAPS[key]

    monkeypatch.setattr(CanonicalMap, "from_tokenizer", kept)


def run(capsys, *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert not captured.out and captured.err.count("\n") == 1
    return captured.err


def rows(spec: str, *arguments: str) -> list[str]:
    return ["rows", "--spec", spec, "--tokenizer", str(DEEPSEEK_TOKENIZER), *arguments]


def verbs() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


def test_verbs_have_help_and_at_most_ten_options():
    assert set(verbs()) == {
        *("demo", "data", "train", "generate"),
        *("eval", "rows", "budget", "serve", "size", "info", "inspect", "analyze"),
        *("gates", "lens", "bands", "addresses", "alignment", "ablation"),
        *("plan", "pack"),
        "plan serve",
    }
    for name, verb in verbs().items():
        options = [action for action in verb._actions if action.dest != "help"]
        assert len(options) <= 10, name
        assert all(action.help for action in options) and verb.description


def test_rows_of_the_demo_equal_the_recorded_ones(capsys, golden):
    for case in golden("demo_hash.json")[0]["cases"]:
        found = run(capsys, *rows("demo", f"--text={case['text']}"))
        assert found["token_ids"] == case["token_ids"]
        assert found["canonical_ids"] == case["canonical_ids"]
        heads = {layer: kinds["head_rows"] for layer, kinds in found["layers"].items()}
        assert heads == case["heads"]


def test_rows_of_deepseek_v41_equal_the_recorded_ones(capsys, golden):
    for case in golden("deepseek_v41_rows.json")["cases"]:
        ids = ",".join(map(str, case["token_ids"]))
        masked = ",".join(map(str, case.get("masked_positions", [])))
        found = run(capsys, *rows("deepseek-v4.1", f"--ids={ids}", f"--masked={masked}"))
        tables = {layer: kinds["table_rows"] for layer, kinds in found["layers"].items()}
        assert tables == case["rows"]


@pytest.mark.parametrize("history", [[], [5], [5, 6], [5, 6, 7], [4, 5, 6, 7, 8]], ids=len)
def test_rows_after_a_history_are_those_of_the_whole_text(capsys, history):
    ids = [*history, 11, 12, 13]
    whole = run(capsys, *rows("deepseek-v4.1", "--ids", ",".join(map(str, ids))))
    part = rows("deepseek-v4.1", "--ids", "11,12,13", "--history", ",".join(map(str, history)))
    part = run(capsys, *part)
    for layer, kinds in part["layers"].items():
        assert kinds["table_rows"] == whole["layers"][layer]["table_rows"][len(history) :]


def test_a_saved_specification_gives_the_same_rows_and_hash(capsys, tmp_path):
    first = run(capsys, *rows("paper", "--ids", "5,6", "--save", str(tmp_path / "s.json")))
    again = run(capsys, *rows(str(tmp_path / "s.json"), "--ids", "5,6"))
    assert again["layers"] == first["layers"] and again["spec_hash"] == first["spec_hash"]
    assert list(first) == [
        *("spec", "spec_hash", "token_ids", "canonical_ids", "layers", "specification")
    ]


@pytest.mark.parametrize("family", ["deepseek_v41", "qwen4_exp"])
def test_rows_of_a_released_checkpoint_equal_the_conformance_kit(capsys, family):
    kit = Path(__file__).parents[1] / "conformance" / family
    case = json.loads((kit / "expected.json").read_text())["cases"][0]
    ids = ",".join(map(str, case["token_ids"]))
    for given in (
        ["--ids", ids],
        ["--text=Only Alexander the Great could tame the horse Bucephalus."],
    ):
        found = run(capsys, "rows", "--spec", str(kit), *given)
        tables = {layer: kinds["table_rows"] for layer, kinds in found["layers"].items()}
        assert tables == case["rows"] and found["token_ids"] == case["token_ids"]


def test_raw_ids_need_no_tokenizer_but_text_does(capsys):
    found = run(capsys, "rows", "--spec=qwen4-exp", "--ids=5,248319")
    assert found["canonical_ids"] == [5, 248_319]
    assert main(["rows", "--spec=qwen4-exp", "--ids=5"]) == 0
    capsys.readouterr()
    assert "--tokenizer: needed for --text" in refused(
        capsys, "rows", "--spec=qwen4-exp", "--text=a"
    )
    assert "--tokenizer: needed, because" in refused(capsys, "rows", "--spec=paper", "--ids=5")


def test_rows_are_printed_for_people_too(capsys):
    assert main(rows("demo", "--text", "a cat")) == 0
    assert "layer 15" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ids", "1,x"], "'x' at position 1"),
        (["--ids", "1,2.5"], "'2.5' at position 1"),
        (["--ids", "1,-2"], "token id -2 at position 1"),
        (["--ids", "129280"], "token id 129280 at position 0"),
        (["--ids", "99999999999999999999"], "does not fit in 64 bits"),
        (["--ids", "1", "--history=-1"], "--history=-1"),
        (["--ids", "1", "--history", "129280"], "history id 129280"),
        (["--ids", "1", "--masked", "1"], "position 1; there are 1 tokens"),
        (["--ids", "1", "--masked=-1"], "position -1"),
        (["--ids", "1", "--text", "a"], "either --text or --ids"),
        ([], "either --text or --ids"),
    ],
    ids=str,
)
def test_wrong_ids_are_one_line(capsys, arguments, message):
    assert message in refused(capsys, *rows("demo", *arguments))


def test_wrong_files_are_one_line(capsys, tmp_path):
    assert "accepted are paper, demo" in refused(capsys, *rows("papre", "--ids", "1"))
    (tmp_path / "s.json").write_text("{")
    assert "s.json" in refused(capsys, *rows(str(tmp_path / "s.json"), "--ids", "1"))
    missing = ["rows", "--spec", "demo", "--ids", "1", "--tokenizer", str(tmp_path)]
    assert "No such file" in refused(capsys, *missing)
    assert "no config.json" in refused(capsys, "generate", f"--model={tmp_path}", "--prompt=a")
    assert "no config.json" in refused(capsys, "budget", f"--model={tmp_path}")


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("lr=1", "train.KEY=VALUE"),
        ("train.speed=1", "train.speed: unknown"),
        ("train.lr=fast", "train.lr='fast': float is needed"),
        ("train.lr=-1", "lr=-1.0: above 0"),
        ("model.width=1", "model.width"),
        ("model.hidden_size=big", "hidden_size"),
    ],
)
def test_wrong_settings_are_one_line(capsys, tmp_path, pair, message):
    error = refused(capsys, "train", f"--out={tmp_path}/x", "--set", pair)
    assert message in error and not (tmp_path / "x").exists()


def test_wrong_devices_presets_and_threads_are_one_line(capsys, tmp_path):
    out = f"--out={tmp_path}/x"
    assert "device='tpu'" in refused(capsys, "train", out, "--device=tpu")
    assert "preset='giga'" in refused(capsys, "train", out, "--preset=giga")
    assert "threads=0" in refused(capsys, "train", out, "--threads=0")
    assert "tokens=5" in refused(capsys, "demo", out, "--tokens=5")


def test_budget_prints_the_ledger_and_the_twin(capsys):
    found = run(capsys, "budget", "--preset=nano-moe", "--rho=0.5")
    assert found["tables"] == 0 and found["rho"] == 1
    assert found["twin"]["p_tot"] == pytest.approx(found["p_tot"], rel=0.005)
    wide = run(capsys, "budget", "--preset=nano-moe", "--set", "model.hidden_size=256")
    assert wide["p_tot"] > 1.9 * found["p_tot"]
    assert main(["budget"]) == 0
    assert "routed experts inactive" in capsys.readouterr().out


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    changes = {"hidden_size": 32, "memory.specification.rows_per_head": [97, 97]}
    model = EngramLMForCausalLM(configure(nano_engram(), changes))
    model.set_canonical_map(CanonicalMap.from_tokenizer(corpus.tokenizer_file()))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    corpus.tokenizer().save_pretrained(directory)
    return directory


def test_generate_streams_text_with_and_without_memory(capsys, saved, monkeypatch):
    base = ["generate", f"--model={saved}", "--tokens=8"]
    on = run(capsys, *base, "--prompt=The Nile")
    off = run(capsys, *base, "--prompt=The Nile", "--memory=off")
    assert on["text"] != off["text"] and len(on["token_ids"]) == 8
    disk = run(capsys, *base, "--prompt=The Nile", "--memory=disk", "--memory-budget=1MB")
    assert disk["token_ids"] == on["token_ids"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("The Nile"))
    assert run(capsys, *base, "--prompt=-") == on
    assert main([*base, "--prompt=The Nile"]) == 0
    assert capsys.readouterr().out.startswith("The Nile")
    sampled = [run(capsys, *base, "--prompt=a", "--temperature=1", "--seed=3") for _ in range(2)]
    assert sampled[0] == sampled[1]


def test_generate_refuses_what_makes_no_sense(capsys, saved):
    base = ["generate", f"--model={saved}", "--prompt=a"]
    assert "tokens=0" in refused(capsys, *base, "--tokens=0")
    assert "temperature=-1" in refused(capsys, *base, "--temperature=-1")
    assert "how much memory it may take" in refused(capsys, *base, "--memory=disk")
    assert "memory_budget='1 x'" in refused(capsys, *base, "--memory=disk", "--memory-budget=1 x")


def test_a_saved_model_has_a_ledger(capsys, saved):
    assert run(capsys, "budget", f"--model={saved}")["tables"] > 0


def test_the_command_is_installed_and_answers():
    installed = str(Path(sys.executable).parent / "engram")
    for command in ([installed], [sys.executable, "-m", "engram_lm"]):
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
        assert "generate" in done.stdout


def test_demo_trains_both_arms_and_writes_the_report(capsys, tmp_path, monkeypatch):
    whole = corpus.documents

    def some(split: str) -> list[str]:
        # Judging both arms by all of the validation text takes minutes and shows nothing more.
        return whole(split)[:60] if split == "validation" else whole(split)

    monkeypatch.setattr(corpus, "documents", some)
    small = ["--tokens=4096", "--set=train.batch=8", "--set=train.validation_tokens=500"]
    found = run(capsys, "demo", f"--out={tmp_path}", *small)
    assert {"moe_bpb", "engram_bpb", "engram_memory_off_bpb"} <= set(found)
    assert (tmp_path / "report.html").stat().st_size > 100_000
    assert found["moe_ledger"]["p_tot"] == pytest.approx(found["engram_ledger"]["p_tot"], rel=5e-3)
    again = run(capsys, "demo", f"--out={tmp_path}", *small)  # nothing is trained twice
    assert again["engram_bpb"] == found["engram_bpb"]
