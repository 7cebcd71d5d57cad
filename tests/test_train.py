"""The loop: batches, schedule, logs, and going on bit for bit after being killed."""

import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from engram_lm import corpus
from engram_lm.errors import ConfigError, MismatchError
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.model import EngramLMForCausalLM
from engram_lm.model.presets import configure, nano_engram
from engram_lm.train import checkpoint
from engram_lm.train.batches import Batches
from engram_lm.train.config import TrainConfig
from engram_lm.train.journal import read_metrics
from engram_lm.train.loop import Run
from engram_lm.train.stream import Continuous
from engram_lm.train.text import wordnet_stream

CONFIG = TrainConfig(
    tokens=8 * 4 * 32,
    batch=4,
    context=32,
    lr=4e-3,
    evaluate_every=3,
    checkpoint_every=3,
    validation_tokens=400,
)


@pytest.fixture(scope="module")
def parts():
    tokenizer = corpus.tokenizer()
    return (
        tokenizer,
        CanonicalMap.from_tokenizer(tokenizer),
        wordnet_stream("train", 3000),
        wordnet_stream("validation", 600),
    )


def small_model(
    canonical: CanonicalMap, seed: int = 0, specification: dict | None = None
) -> EngramLMForCausalLM:
    torch.manual_seed(seed)
    changes = {"hidden_size": 32, "num_hidden_layers": 4, "mlp_layer_types": ["sparse"] * 4}
    changes |= {"memory.specification.rows_per_head": [97, 97]}
    for name, value in (specification or {}).items():
        changes[f"memory.specification.{name}"] = value
    model = EngramLMForCausalLM(configure(nano_engram(), changes))
    model.set_canonical_map(canonical)
    return model


def in_memory(ids) -> Continuous:
    return Continuous(ids, corpus.token_bytes())


def start(parts, out: Path, config: TrainConfig = CONFIG, training=None, model=None) -> Run:
    tokenizer, canonical, training_stream, validation = parts
    return Run(
        small_model(canonical, config.seed) if model is None else model,
        tokenizer,
        config,
        out,
        training=training_stream if training is None else training,
        validation=validation,
    )


def finish(run: Run) -> Run:
    while not run.done:
        run.step()
    run.close()
    return run


def test_loss_falls_and_everything_is_logged(parts, tmp_path):
    run = finish(start(parts, tmp_path, replace(CONFIG, tokens=60 * 4 * 32, evaluate_every=20)))
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    assert lines[-1]["validation_bpb"] < lines[19]["validation_bpb"]
    assert list((tmp_path / "tensorboard").iterdir())
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["train"]["lr"] == CONFIG.lr
    specification = run.model.model.addresses.specification
    assert record["specification_sha256"] == specification.digest
    assert run.model.model.tables["1"].weight.grad is None


def test_the_exported_model_is_the_trained_one(parts, tmp_path):
    run = finish(start(parts, tmp_path))
    loaded = EngramLMForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert states_equal(loaded.state_dict(), run.model.state_dict())
    loaded.set_attn_implementation(CONFIG.attention)
    tokens = torch.randint(2, 8000, (2, 19))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, run.model.eval()(tokens).logits)


def states_equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(states_equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return all(states_equal(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def final(out: Path) -> dict:
    (path,) = (out / "checkpoints").iterdir()
    with warnings.catch_warnings():  # without a process group it says so
        warnings.simplefilter("ignore")
        tensors = _load_state_dict_from_keys(checkpoint_id=path)
    record = json.loads((path / "checkpoint.json").read_text())
    return {"tensors": tensors, "step": record["step"], "identity": record["identity"]}


def losses(out: Path) -> list[tuple]:
    return [(m["step"], m["loss"], m.get("validation_loss")) for m in read_metrics(out)]


def test_a_run_that_is_interrupted_goes_on_bit_for_bit(parts, tmp_path):
    finish(start(parts, tmp_path / "whole"))
    broken = start(parts, tmp_path / "broken")
    for _ in range(5):  # two steps past the checkpoint at 3: they are taken again
        broken.step()
    broken.close()
    resumed = start(parts, tmp_path / "broken")
    assert resumed.step_number == 3
    finish(resumed)
    assert states_equal(final(tmp_path / "whole"), final(tmp_path / "broken"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")


def test_a_finished_run_is_not_trained_again(parts, tmp_path):
    finish(start(parts, tmp_path))
    again = start(parts, tmp_path)
    assert again.done
    again.close()


def test_a_checkpoint_of_other_data_settings_or_model_is_refused(parts, tmp_path):
    finish(start(parts, tmp_path))
    with pytest.raises(MismatchError, match=r"train.lr is 0.004, this run has 0.001"):
        start(parts, tmp_path, replace(CONFIG, lr=1e-3))
    with pytest.raises(MismatchError, match="data_sha256"):
        start(parts, tmp_path, training=in_memory(parts[2].ids_T[1:]))


def test_every_window_is_seen_once_in_each_pass():
    batches = Batches(in_memory(np.arange(321, dtype=np.uint16)), batch=4, context=32, seed=5)
    inputs = torch.cat([batches[step][0] for step in range(5)])  # 20 windows, 10 a pass
    for part in (inputs[:10], inputs[10:]):
        assert sorted(part.flatten().tolist()) == list(range(320))
    assert not torch.equal(inputs[:10], inputs[10:])
    first, later, positions = batches[0]
    assert positions is None
    assert torch.equal(first + 1, later)


def test_batches_are_a_function_of_seed_and_step():
    ids = in_memory(np.arange(3000, dtype=np.uint16))
    one, other = (Batches(ids, batch=4, context=32, seed=5) for _ in range(2))
    later = one[7][0]
    assert torch.equal(later, [other[step] for step in (9, 0, 7)][2][0])
    assert not torch.equal(later, Batches(ids, batch=4, context=32, seed=6)[7][0])


def test_schedule_warms_up_and_then_falls_in_steps():
    config = TrainConfig(tokens=100 * 4096, warmup=0.1, decay_at=(0.8, 0.9), decay_factor=0.1)
    assert config.steps == 100
    factors = [config.factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1 == factors[79]
    assert factors[80] == pytest.approx(0.1) and factors[90] == pytest.approx(0.01)


@pytest.mark.parametrize(
    "change",
    [{"batch": 0}, {"lr": 0.0}, {"tokens": 10}, {"warmup": 1.0}, {"precision": "fp8"}],
    ids=str,
)
def test_impossible_settings_are_refused_by_name(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(TrainConfig(), **change)


def test_keeping_freed_memory_is_reported_where_it_is_possible():
    code = "from engram_lm.train.allocator import keep_freed_memory as k; print(k())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(sys.platform.startswith("linux"))


def test_weights_of_another_specification_are_refused_whatever_is_recorded(
    parts, tmp_path, monkeypatch
):
    run = start(parts, tmp_path)
    for _ in range(3):
        run.step()
    run.close()
    monkeypatch.setattr(checkpoint, "difference", lambda *_: None)
    other = small_model(parts[1], specification={"seed": "7"})
    with pytest.raises(MismatchError, match="the weights were trained with the specification of"):
        start(parts, tmp_path, model=other)


def test_what_a_save_took_is_logged_with_the_next_step(parts, tmp_path):
    finish(start(parts, tmp_path))
    logged = [line for line in read_metrics(tmp_path) if "checkpoint_bytes" in line]
    assert [line["step"] for line in logged] == [4, 7]
    (path,) = (tmp_path / "checkpoints").iterdir()
    assert logged[0]["checkpoint_bytes"] > sum(f.stat().st_size for f in path.iterdir()) * 0.99
    assert all(line["checkpoint_seconds"] > 0 for line in logged)
