"""Runs with other rows: bfloat16, one moment a row, skipped steps, tables beyond memory."""

import gc
import json
import mmap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import CONFIG, final, finish, losses, states_equal
from tiny import phrases, tiny_model
from torch import nn

from engram_lm import corpus
from engram_lm.cli import main
from engram_lm.errors import MismatchError
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.model import EngramLMForCausalLM
from engram_lm.model.presets import configure, nano_engram
from engram_lm.train.config import TrainConfig
from engram_lm.train.journal import read_metrics
from engram_lm.train.loop import Run
from engram_lm.train.optimizers import Optimizers
from engram_lm.train.text import wordnet_stream

SMALL = replace(CONFIG, tokens=5 * 4 * 32, evaluate_every=100)


@pytest.fixture(scope="module")
def parts():
    tokenizer = corpus.tokenizer()
    streams = {split: wordnet_stream(split, 700) for split in corpus.SPLITS}
    return tokenizer, CanonicalMap.from_tokenizer(tokenizer), streams


def start(parts, out: Path, config: TrainConfig, table_dtype: str | None) -> Run:
    tokenizer, canonical, streams = parts
    changes = {"hidden_size": 32, "num_hidden_layers": 4, "mlp_layer_types": ["sparse"] * 4}
    changes |= {"memory.specification.rows_per_head": [97, 97], "table_dtype": table_dtype}
    torch.manual_seed(0)
    model = EngramLMForCausalLM(configure(nano_engram(), changes))
    model.set_canonical_map(canonical)
    training, validation = streams["train"], streams["validation"]
    return Run(model, tokenizer, config, out, training=training, validation=validation)


def test_bf16_rows_with_a_moment_each_go_on_bit_for_bit_and_load_with_the_same_bits(
    parts, tmp_path
):
    config = replace(SMALL, table_dtype="bf16", table_optimizer="rowwise")
    whole = finish(start(parts, tmp_path / "whole", config, "bf16"))
    broken = start(parts, tmp_path / "broken", config, "bf16")
    for _ in range(4):  # one past the checkpoint at 3
        broken.step()
    broken.close()
    finish(start(parts, tmp_path / "broken", config, "bf16"))
    assert states_equal(final(tmp_path / "whole"), final(tmp_path / "broken"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")

    loaded = EngramLMForCausalLM.from_pretrained(tmp_path / "whole" / "model").eval()
    assert {table.weight.dtype for table in loaded.model.tables.values()} == {torch.bfloat16}
    assert loaded.lm_head.weight.dtype == torch.float32
    assert states_equal(loaded.state_dict(), whole.model.state_dict())
    loaded.set_attn_implementation(config.attention)
    tokens = torch.randint(2, 8000, (2, 19))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, whole.model.eval()(tokens).logits)
    wide = EngramLMForCausalLM.from_pretrained(tmp_path / "whole" / "model", dtype=torch.float64)
    assert wide.model.tables["1"].weight.dtype == torch.bfloat16


def test_a_run_of_another_table_dtype_than_its_model_is_refused(parts, tmp_path):
    with pytest.raises(MismatchError, match="table_dtype='bf16': .* layer 1 is torch.float32"):
        start(parts, tmp_path, replace(SMALL, table_dtype="bf16"), None)
    with pytest.raises(MismatchError, match="table_dtype='fp32': .* layer 1 is torch.bfloat16"):
        start(parts, tmp_path, SMALL, "bf16")


def test_a_run_counts_steps_that_it_skips_and_goes_on(parts, tmp_path):
    run = start(parts, tmp_path, SMALL, None)
    run.step()
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    objective, run.objective = run.objective, lambda *inputs: objective(*inputs) * float("nan")
    run.step()
    assert states_equal(before, dict(run.model.state_dict()))  # the router's biases among them
    run.objective = objective
    finish(run)
    assert [line["skipped"] for line in read_metrics(tmp_path)] == [0, 1, 1, 1, 1]


def test_the_command_trains_bf16_rows_with_a_moment_each(tmp_path, capsys):
    settings = "tokens=256 batch=4 context=32 evaluate_every=8 validation_tokens=300"
    settings += " table_dtype=bf16 table_optimizer=rowwise"
    sets = [f"--set=train.{pair}" for pair in settings.split()]
    sets += ["--set=model.hidden_size=32", "--threads=1", "--json"]
    assert main(["train", f"--out={tmp_path}", *sets]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 2
    record = json.loads((tmp_path / "model" / "config.json").read_text())
    assert record["table_dtype"] == "bf16"


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def take_steps(model: EngramLMForCausalLM, table_optimizer: str) -> Optimizers:
    optimizers = Optimizers(
        model, lr=1e-2, table_lr_multiplier=5, weight_decay=0, table_optimizer=table_optimizer
    )
    for seed in range(3):
        ids = phrases(4, 40, seed=seed)
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizers.clip(1.0)
        optimizers.step()
        optimizers.zero_grad()
    return optimizers


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is not told")
@pytest.mark.parametrize("table_optimizer", ["adam", "rowwise"])
def test_a_step_takes_memory_for_touched_rows_and_none_for_the_rest(table_optimizer):
    take_steps(tiny_model().train(), table_optimizer)  # what it compiles and keeps is there now
    model, rows = tiny_model().train(), 10**8
    for table in model.model.tables.values():
        pages = mmap.mmap(-1, rows * 8 * 4, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        spread = rows // len(table.weight)
        table.weight = nn.Parameter(torch.frombuffer(pages, dtype=torch.float32).view(rows, 8))
        start = table.start
        table.start = lambda rows_M, start=start, spread=spread: start(rows_M * spread)
    gc.collect()
    before = resident()
    optimizers = take_steps(model, table_optimizer)
    # At most 3 pages for each of about 200 rows a table, and a few megabytes for the steps
    # themselves; a bit for each row would be 12.5 MB a table.
    assert min(optimizers.rows.touched()) > 100
    assert resident() - before < 20 * 2**20
