"""What a step logs is what it did; and micro-batches are the same step in parts."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import CONFIG, small_model

from engram_lm import corpus
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.fuse import Gate
from engram_lm.train import telemetry
from engram_lm.train.batches import Batches
from engram_lm.train.console import Display
from engram_lm.train.journal import read_metrics
from engram_lm.train.loop import Run
from engram_lm.train.shards import Packed, Split
from engram_lm.train.text import wordnet_stream

EXACT = replace(CONFIG, precision="fp32", tokens=4 * 4 * 32, checkpoint_every=2)


@pytest.fixture(scope="module")
def make_run():
    tokenizer = corpus.tokenizer()
    canonical = CanonicalMap.from_tokenizer(tokenizer)
    training = wordnet_stream("train", 2000)
    validation = wordnet_stream("validation", 200)

    def make(out, config=EXACT, gate=None) -> Run:
        model = small_model(canonical)
        for module in model.modules():
            if isinstance(module, Gate) and gate is not None:
                module.rule = gate
        return Run(model, tokenizer, config, out, training=training, validation=validation)

    return make


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_micro_batches_leave_the_gradient_of_the_whole_step(make_run, tmp_path, parts):
    # The gate's square root turns a last bit of a logit near 0 into a thousandth of a gradient.
    whole = make_run(tmp_path / "whole", gate="plain")
    split = make_run(tmp_path / "split", replace(EXACT, micro_batches=parts), gate="plain")
    for run in (whole, split):
        run.model.train()
        run.loss = run._backward()
        run.close()
    # float32, the same sums in another order: a last bit is 6e-8 of the largest partial sum, some
    # hundred of which cancel in a gradient. A part that counts for another is off by its share.
    torch.testing.assert_close(split.loss, whole.loss, rtol=1e-5, atol=0)
    for (name, one), other in zip(
        whole.model.named_parameters(), split.model.parameters(), strict=True
    ):
        if one.grad is not None:
            largest = one.grad.abs().max().item()
            torch.testing.assert_close(other.grad, one.grad, rtol=0, atol=1e-4 * largest, msg=name)
    for one, other in zip(
        whole.model.model.tables.values(), split.model.model.tables.values(), strict=True
    ):
        assert torch.equal(one.row_gradient.rows_U, other.row_gradient.rows_U)
        wanted = one.row_gradient.values_UE
        largest = wanted.abs().max().item()
        torch.testing.assert_close(
            other.row_gradient.values_UE, wanted, rtol=0, atol=1e-4 * largest
        )


def test_parts_of_a_batch_keep_its_sequences_in_order(make_run, tmp_path):
    run = make_run(tmp_path)
    batch = run.batches[0]
    parts = batch.split(3)
    assert [len(part.inputs_BT) for part in parts] == [2, 1, 1]
    assert torch.equal(torch.cat([part.targets_BT for part in parts]), batch.targets_BT)
    assert [len(part.inputs_BT) for part in batch.split(5)] == [1, 1, 1, 1, 0]
    run.close()


def test_bits_per_byte_are_those_of_the_steps_own_targets(make_run, tmp_path):
    run = make_run(tmp_path)
    targets = run.batches[0].targets_BT
    text = run.tokenizer.decode([i for i in targets.flatten() if i], skip_special_tokens=False)
    record = run.step()
    nats = record["loss"] * targets.numel()
    # Cut characters decode to U+FFFD of three bytes: counted by id instead.
    size = corpus.token_bytes()[targets.numpy()].sum()
    assert size == pytest.approx(len(text.encode()), rel=0.01)
    assert record["bpb"] == pytest.approx(nats / math.log(2) / size, rel=1e-12)
    run.close()


def test_packed_windows_share_out_the_bytes_of_their_documents():
    sizes, bytes_of_text = [7, 1, 13, 4, 9], np.array([30, 1, 50, 12, 41])
    starts = np.cumsum([0, *sizes[:-1]])
    ids = np.arange(34, dtype=np.uint16)
    split = Split(
        [
            Packed(ids[:21], starts[:3], bytes_of_text[:3]),
            Packed(ids[21:], starts[3:] - 21, bytes_of_text[3:]),
        ],
        "",
    )
    by_token = np.repeat(bytes_of_text / np.array(sizes), sizes)
    for first in range(34):
        for last in range(first + 1, 35):
            wanted = by_token[first:last].sum()
            assert split.text_bytes(first, last) == pytest.approx(wanted, rel=1e-12)
    batches = Batches(split, batch=3, context=11, seed=0)
    assert batches.text_bytes(0) == pytest.approx(by_token[1:34].sum(), rel=1e-12)


def test_gates_are_summed_up_by_layer_and_stream_over_micro_batches(make_run, tmp_path):
    run = make_run(tmp_path, replace(EXACT, micro_batches=2))
    gates = [module for module in run.model.modules() if isinstance(module, Gate)]
    for gate in gates:  # every third wide open
        gate.register_forward_hook(lambda gate, inputs, values: values.where(values < 0.51, 0.99))
    seen: list[list[torch.Tensor]] = [[] for _ in gates]
    for one, found in zip(gates, seen, strict=True):
        one.register_forward_hook(lambda gate, i, values, found=found: found.append(values))
    run.telemetry.close()
    run.telemetry = telemetry.Telemetry(run.model)
    record = run.step()
    for layer, found in zip(run.telemetry.gates, seen, strict=True):
        values = torch.cat(found).double().flatten()
        assert len(values) == 128
        place = f"layer_{layer}_stream_0"
        assert record[f"gate_mean/{place}"] == pytest.approx(values.mean().item(), rel=1e-12)
        spread = values.std(unbiased=False).item()
        assert record[f"gate_spread/{place}"] == pytest.approx(spread, rel=1e-9)
        share = (values > 0.95).double().mean().item()
        assert record[f"gate_saturation/{place}"] == share > 0
    run.close()


def test_streams_have_figures_of_their_own():
    seen = [[[4, 4], [2, 4], [1, 4], [0, 4]], [[2, 2], [1, 0], [1, 0], [2, 2]]]
    found = telemetry.gate_figures([2, 5], 2, torch.tensor(seen).flatten().tolist())
    assert found == {
        "gate_mean/layer_2_stream_0": 0.5,
        "gate_spread/layer_2_stream_0": 0,
        "gate_saturation/layer_2_stream_0": 0,
        "gate_mean/layer_2_stream_1": 1,
        "gate_spread/layer_2_stream_1": 0,
        "gate_saturation/layer_2_stream_1": 1,
        "gate_mean/layer_5_stream_0": 0.5,
        "gate_spread/layer_5_stream_0": 0.5,
        "gate_saturation/layer_5_stream_0": 1,
        "gate_mean/layer_5_stream_1": 0,
        "gate_spread/layer_5_stream_1": 0,
        "gate_saturation/layer_5_stream_1": 1,
    }


def test_router_load_is_told_by_layer():
    found = telemetry.load_figures([1, 3], [4, 4, 4, 4, 0, 8, 4, 4])
    assert found == {
        "expert_load/layer_1": 1,
        "expert_load_min/layer_1": 1,
        "expert_load/layer_3": 2,
        "expert_load_min/layer_3": 0,
        "expert_load": 2,
    }
    assert telemetry.load_figures([], []) == {}


def test_gradient_norms_of_the_groups_make_up_the_whole(make_run, tmp_path):
    run = make_run(tmp_path)
    record = run.step()
    parts = {name: value for name, value in record.items() if name.startswith("gradient_norm/")}
    assert set(parts) == {
        f"gradient_norm/{name}" for name in ("matrices", "stacks", "others", "table_1", "table_3")
    }
    assert math.hypot(*parts.values()) == pytest.approx(record["gradient_norm"], rel=1e-6)
    run.close()


def test_rows_touched_and_the_size_of_their_update_are_those_of_the_table(make_run, tmp_path):
    run = make_run(tmp_path)
    table = run.model.model.tables["1"].weight
    first = table.detach().clone()
    for _ in range(3):
        before = table.detach().clone()
        record = run.step()
    touched = (table != first).any(dim=1)
    assert record["rows_touched/table_1"] == touched.double().mean().item()
    moved = (table != before).any(dim=1)
    size = (table - before)[moved].detach().double().square().mean().sqrt().item()
    assert record["row_update/table_1"] == pytest.approx(size, rel=1e-4)  # float32 sums
    assert record["skipped"] == 0
    run.close()


def test_tensorboard_holds_the_figures_of_the_log(make_run, tmp_path):
    run = make_run(tmp_path)
    while not run.done:
        run.step()
    run.close()
    lines = read_metrics(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in set().union(*lines) - {"step", "tokens"}:
        wanted = [(line["step"], line[name]) for line in lines if name in line]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        for (_, one), (_, other) in zip(found, wanted, strict=True):
            assert one == np.float32(other)  # events hold float32


def test_each_start_of_a_run_is_recorded(make_run, tmp_path, monkeypatch):
    first = make_run(tmp_path)
    for _ in range(3):
        first.step()
    first.close()
    resumed = make_run(tmp_path)
    resumed.close()
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["train"]["micro_batches"] == 1
    assert [start["step"] for start in record["starts"]] == [0, 2]
    for start in record["starts"]:
        assert "python" in start["command"] and start["machine"]["torch"] == torch.__version__
        assert start["commit"] == "unknown" or len(start["commit"]) >= 12
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert resumed.step_number == 2


def shown(terminal: bool) -> str:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=200)
    display = Display(["a", "b"], [3, 3], [0, 0], console)
    record = {"loss": 4.5, "bpb": 1.625, "tokens_per_second": 12_345.0}
    with display:
        for step in (1, 2, 3):
            for index in (0, 1):
                display.show(index, {**record, "step": step})
    return written.getvalue()


def test_without_a_terminal_each_run_tells_its_first_and_last_step_in_a_line():
    lines = shown(terminal=False).splitlines()
    told = "loss 4.500  bpb 1.625  12.3k tok/s"
    assert lines == [f"{name}  step {step}/3  {told}" for step in (1, 3) for name in "ab"]


def test_the_time_that_all_runs_take_is_said_once_after_their_first_steps(monkeypatch):
    written, clock = io.StringIO(), iter(range(0, 10_000, 30))
    monkeypatch.setattr("engram_lm.train.console.time.monotonic", lambda: next(clock))
    display = Display(["a", "b"], [100, 100], [10, 0], Console(file=written, width=200), 0)
    with display:
        for step in range(1, 12):
            for index, done in enumerate((10, 0)):
                record = {"loss": 4.5, "bpb": 1.6, "tokens_per_second": 9.0, "step": done + step}
                display.show(index, record)
    (said,) = [line for line in written.getvalue().splitlines() if "left" in line]
    # 5 steps of each are done and the first not counted: 30 s a step for 85 and 95 more.
    assert said == "about 90 min for the 180 steps that are left"


def test_a_terminal_shows_rate_and_time_left():
    last = shown(terminal=True).splitlines()[-2]  # what follows shows the cursor again
    assert "3/3" in last and "bpb 1.625" in last and "12.3k tok/s" in last and "0:00:00" in last
