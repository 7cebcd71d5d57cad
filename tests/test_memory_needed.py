"""What training needs of memory: the count against what processes took, and the refusal before."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from engram_lm.cli import main
from engram_lm.errors import ConfigError
from engram_lm.model import EngramLMForCausalLM
from engram_lm.model.budget import ledger
from engram_lm.model.presets import configure, preset
from engram_lm.model.units import bytes_of
from engram_lm.train import memory_needed
from engram_lm.train.config import TrainConfig
from engram_lm.train.journal import read_metrics
from engram_lm.train.loop import Run
from engram_lm.train.memory_needed import check, free_memory, needed
from engram_lm.train.text import wordnet_stream
from engram_lm.train.workers import Workers

PRESETS = {
    "nano-moe": ("nano-moe",),
    "nano-engram": ("nano-engram",),
    "wide nano-engram": ("nano-engram", "--set", "model.hidden_size=256"),
}


@pytest.fixture
def small_machine(monkeypatch):
    """A machine of 24 GB, whatever this one is."""
    monkeypatch.setattr(memory_needed, "free_memory", lambda: (24 * 10**9, "MemAvailable"))


@pytest.mark.parametrize("name", PRESETS)
def test_the_estimate_is_within_15_percent_of_what_a_run_took(name, prepared, tmp_path):
    command = [sys.executable, "-m", "engram_lm", "train", "--data", str(prepared)]
    command += ["--preset", *PRESETS[name], "--out", str(tmp_path), "--tokens", str(6 * 4096)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    told = re.search(r"about ([\d.]+ [MG]B) of memory", run.stderr)
    estimate = bytes_of("estimate", told[1])
    taken = max(line["memory/resident_peak"] for line in read_metrics(tmp_path))
    assert estimate == pytest.approx(taken, rel=0.15)


@pytest.mark.parametrize("name", ["engram_27b", "engram-40b", "moe-27b", "dense-4b"])
def test_a_model_that_does_not_fit_is_one_line(name, prepared, tmp_path, capsys, small_machine):
    out = tmp_path / "run"
    arguments = ["train", "--preset", name, "--out", str(out), "--data", str(prepared)]
    arguments += ["--set", "train.batch=64", "--tokens", "20000"]
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert name in line and "needs about" in line and "are free" in line and "overcommit" in line
    assert not out.exists()


def test_overcommit_goes_on_all_the_same(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory_needed, "free_memory", lambda: (10**6, "a test's word"))
    arguments = ["train", "--data", str(prepared), "--out", str(tmp_path / "run"), "--tokens"]
    arguments += ["256", "--set", "train.batch=2", "--set", "train.validation_tokens=200"]
    assert main(arguments) == 2
    assert "1 MB are free (a test's word)" in capsys.readouterr().err
    assert main([*arguments, "--set", "machine.overcommit=1"]) == 2
    assert "machine.overcommit=1: accepted is" in capsys.readouterr().err
    assert main([*arguments, "--set", "machine.overcommit=true"]) == 0
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 2
    assert "both arms of the demo" in capsys.readouterr().err


def test_the_parts_are_those_of_the_ledger():
    config, train = preset("nano-engram"), TrainConfig(precision="fp32")
    counts, found = ledger(config, train.context), needed(config, train)
    assert found.weights == 4 * counts.parameters
    assert found.moments == counts.optimizer_bytes
    assert found.gradients > 4 * (counts.parameters - counts.tables)
    rowwise = TrainConfig(precision="fp32", table_optimizer="rowwise")
    assert needed(config, rowwise).moments == found.moments - 4 * counts.tables
    half = configure(config, {"table_dtype": "bf16"})
    assert needed(half, train).weights == found.weights - 2 * counts.tables


SIZES = {
    "hidden_size": 160,
    "moe_intermediate_size": 48,
    "shared_intermediate_size": 56,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
}
DENSE = SIZES | {"mlp_layer_types": ["dense"] * 6, "intermediate_size": 72}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("nano-moe", SIZES),
        ("nano-moe", SIZES | {"streams": 4}),
        ("nano-moe", DENSE),
        ("nano-engram", {"hidden_size": 160}),
        ("nano-engram", {"hidden_size": 160, "streams": 4}),
    ],
    ids=["moe", "moe with streams", "dense", "engram", "engram with streams"],
)
def test_activations_are_what_autograd_keeps(
    name, sizes, precision, canonical, tokenizer, tmp_path, monkeypatch
):
    for constant in ("FRAGMENTS", "SCORES", "LOSS_CHUNK"):
        monkeypatch.setattr(memory_needed, constant, 0)
    batch, context = 8, 64
    config = configure(preset(name), sizes)
    model = EngramLMForCausalLM(config)
    if config.memory is not None:
        model.set_canonical_map(canonical)
    train = TrainConfig(tokens=2 * batch * context, batch=batch, context=context)
    train = replace(train, precision=precision)
    streams = [wordnet_stream(split, 2 * batch * context + 1) for split in ("train", "validation")]
    run = Run(model, tokenizer, train, tmp_path, training=streams[0], validation=streams[1])
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run._backward()
    run.close()
    # What is counted are the large ones; the rest are masks, indices and numbers a token.
    assert needed(config, train).activations == pytest.approx(sum(kept.values()), rel=0.05)


def test_frozen_parts_have_no_gradients_and_no_moments():
    config, train = preset("engram-27b"), TrainConfig(precision="fp32")
    counts, whole = ledger(config, train.context), needed(config, train)
    fusion = sum(part.total for part in counts.components if part.name.startswith("Engram"))
    memory_alone = needed(config, replace(train, frozen=("backbone",)))
    assert memory_alone.weights == whole.weights
    assert 4 * fusion < memory_alone.gradients < 4 * fusion + 10**9  # and those of rows
    assert 8 * counts.tables < memory_alone.moments < 8 * counts.tables + 8 * fusion
    without = needed(config, replace(train, frozen=("tables",)))
    assert without.moments == whole.moments - 8 * counts.tables
    assert without.gradients == 4 * (counts.parameters - counts.tables)
    first, second = config.memory_config.specification.layers
    halves = [needed(config, replace(train, frozen=(f"tables.{n}",))) for n in (first, second)]
    assert sum(half.moments for half in halves) == pytest.approx(whole.moments + without.moments)


def test_validation_counts_where_its_logits_are_larger():
    config, train = preset("nano-engram"), TrainConfig(precision="fp32")
    wide = configure(config, {"vocab_size": 800_000})
    logits = 800_000 * (4 * train.batch * train.context + 8 * train.context)
    assert needed(wide, train).activations == logits > 2 * needed(config, train).activations
    parts = needed(wide, replace(train, micro_batches=32))
    assert parts.activations < logits / 2  # what is left are the logits of the loss's pieces


def test_fewer_tokens_at_once_and_more_workers_need_less():
    config, train = preset("engram-27b"), TrainConfig(precision="fp32")
    whole = needed(config, train)
    parts = needed(config, TrainConfig(precision="fp32", micro_batches=4))
    assert whole.activations / 4 < parts.activations < whole.activations / 3
    assert parts[:2] == whole[:2]
    sharded = TrainConfig(precision="fp32", backbone="fully_shard")
    eighth = needed(config, sharded, Workers(0, 8))
    for name in ("weights", "gradients", "moments", "activations"):  # the loss's piece stays
        assert getattr(eighth, name) < getattr(whole, name) / 7.5, name
    replicated = needed(config, train, Workers(0, 8))
    tables = 4 * ledger(config, train.context).tables
    assert replicated.weights == pytest.approx(whole.weights - tables * 7 / 8)


def test_workers_of_one_machine_share_its_memory(monkeypatch):
    wanted = needed(preset("nano-moe"), TrainConfig(precision="fp32"))
    monkeypatch.setattr(memory_needed, "free_memory", lambda: (2 * wanted.activations, "a test"))
    check(wanted, Workers(), "nano-moe")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="nano-moe: each of 4 workers needs about"):
        check(wanted, Workers(0, 4), "nano-moe")


def system(root, cgroup: str, groups: dict[str, dict[str, str]], available: int = 8_000_000):
    """A machine's files: /proc and control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:  {available} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for group, files in groups.items():
        place = root / "cgroups" / group
        place.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (place / name).write_text(text)
    return free_memory(root / "proc", root / "cgroups")


def v2(limit: str, current: int, cache: int = 0) -> dict[str, str]:
    statistics = f"anon 5\ninactive_file {cache}\nactive_file 0\n"
    return {"memory.max": f"{limit}\n", "memory.current": f"{current}\n", "memory.stat": statistics}


def test_free_memory_is_the_machines_without_a_limit(tmp_path):
    assert system(tmp_path, "0::/a\n", {"a": v2("max", 10)}) == (8_192_000_000, "MemAvailable")


def test_a_control_groups_limit_counts_and_so_do_those_above_it(tmp_path):
    groups = {"a": v2("5000000000", 2_000_000_000, cache=500_000_000), "a/b": v2("max", 1)}
    free, where = system(tmp_path, "0::/a/b\n", groups)
    assert free == 3_500_000_000 and where.endswith("cgroups/a/memory.max")


def test_a_containers_own_group_is_the_root(tmp_path):
    free, _ = system(tmp_path, "0::/docker/of-the-host\n", {"": v2("1000000", 400_000)})
    assert free == 600_000


def test_control_groups_of_version_1(tmp_path):
    files = {
        "memory.limit_in_bytes": "3000000",
        "memory.usage_in_bytes": "1000000",
        "memory.stat": "inactive_file 10\n",
    }
    free, _ = system(tmp_path, "5:cpu,memory:/x\n0::/\n", {"memory/x": files})
    assert free == 2_000_010


@pytest.mark.gpu
def test_a_gpus_free_memory_counts_there():
    wanted = needed(preset("engram-27b"), TrainConfig(), Workers(device=torch.device("cuda")))
    with pytest.raises(ConfigError, match="on cuda"):
        check(wanted, Workers(device=torch.device("cuda")), "engram-27b")


def test_the_parts_are_told(capsys, prepared, tmp_path, small_machine):
    arguments = ["train", "--preset", "engram-27b", "--out", str(tmp_path), "--data", str(prepared)]
    assert main([*arguments, "--set", "train.batch=64", "--tokens", "20000", "--json"]) == 2
    captured = capsys.readouterr()
    for part in ("process", "weights", "gradients", "moments", "activations"):
        assert part in captured.err
    assert captured.out == ""
