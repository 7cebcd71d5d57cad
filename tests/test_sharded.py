"""Tables that several workers own, against one process: 2 and 4 processes over gloo.

One launch runs many cases, and one process gives what they are measured against.
"""

import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import sharded_worker
import torch
from sharded_worker import CASES, STEPS, batch_of, settings
from tiny import tiny_model

from engram_lm.errors import ConfigError
from engram_lm.train.workers import Workers

WORKER = Path(sharded_worker.__file__)
TWO = ("ddp", "fsdp", "fsdp-muon:1", "uneven:5", "fsdp-accumulated:3", "one-sided:5")
TWO += ("replicated:5",)
FOUR = ("ddp", "fsdp", "fsdp-muon:1", "pairs:5", "no-tokens:5")


def launch(processes: int, out: Path, *names: str) -> list[tuple[int, str]]:
    """Exit status and stderr of each worker. Not torchrun, which stops those that remain."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(WORKER), str(out), *names]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    said = [process.communicate(timeout=900)[1] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


class Launch:
    """What a launch of `processes` workers left, by case."""

    def __init__(self, processes: int, names: tuple[str, ...], out: Path, *faults: str) -> None:
        self.processes, self.names = processes, names
        self.ends = launch(processes, out, *names, *faults)
        assert faults or [end[0] for end in self.ends] == [0] * processes, self.ends
        self.left = {name: torch.load(out / f"{name}.pt", weights_only=False) for name in names}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Launch:
    return Launch(2, TWO, tmp_path_factory.mktemp("two"), "corrupted", "death")


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Launch:
    return Launch(4, FOUR, tmp_path_factory.mktemp("four"))


def reference(name: str) -> dict:
    """One process on the same batches, in whole ones: how they are cut must not matter."""
    left_out = ("backbone", "shards", "checkpointing", "parts")
    return _alone(tuple((k, v) for k, v in settings(name).items() if k not in left_out))


@cache
@torch.enable_grad()
def _alone(case: tuple) -> dict:
    return sharded_worker.train(Workers(), **dict(case))


def furthest(ours: list, theirs: list) -> float:
    """The largest difference, as a share of the largest value of its tensor."""
    pairs = [(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(ours, theirs, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)


def check_equal(launched: Launch, name: str) -> None:
    ours, theirs = launched.left[name], reference(name)
    for step, (mine, wanted) in enumerate(zip(ours["rows"], theirs["rows"], strict=True)):
        assert all(map(torch.equal, mine, wanted)), f"rows of step {step}"
    # float32 sums in another order: 2^-24 a term, of some hundred terms, which in the smallest
    # gradients cancel to a fraction of themselves.
    assert furthest(ours["gradients"], theirs["gradients"]) < 1e-4
    if settings(name).get("muon") and settings(name)["steps"] > 1:
        # Its rounds are in bfloat16, and a token whose expert turns over changes all that follows:
        # one process whose first weights are off by 1e-7 has losses off by 1e-3 after twenty
        # steps, and parameters by 6e-3.
        assert furthest(ours["losses"], theirs["losses"]) < 5e-3
        assert furthest(ours["validation"], theirs["validation"]) < 5e-3
        assert furthest(ours["parameters"], theirs["parameters"]) < 2e-2
        return
    assert all(map(torch.equal, ours["biases"], theirs["biases"]))
    # Twenty steps of that, each with weights a little off; moments are sums over all of them.
    # One step of Muon: a last bit of bfloat16, 2^-8 of a step of about 1e-2 of a weight.
    for what in ("losses", "norms", "validation", "tables", "parameters"):
        assert furthest(ours[what], theirs[what]) < 1e-4, what
    assert furthest(ours["moments"], theirs["moments"]) < 1e-3


@pytest.mark.parametrize("name", TWO)
def test_two_workers_train_what_one_trains(two, name):
    check_equal(two, name)


@pytest.mark.parametrize("name", FOUR)
def test_four_workers_train_what_one_trains(four, name):
    check_equal(four, name)


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_case_on_1_2_and_4_workers(processes, tmp_path):
    names = tuple(name for name in CASES if "fault" not in CASES[name])
    names = tuple(name for name in names if processes % CASES[name].get("shards", 1) == 0)
    launched = Launch(processes, names, tmp_path)
    for name in names:
        check_equal(launched, name)


def test_replicas_of_a_shard_are_equal_bit_for_bit(two, four):
    for launched, name, shards in ((two, "replicated:5", 1), (four, "pairs:5", 2)):
        workers = launched.left[name]["workers"]
        for rank, worker in enumerate(workers):
            assert all(map(torch.equal, worker["replicas"], workers[rank % shards]["replicas"]))
        assert workers[0]["traffic"][0]["replica_bytes"] > 0


def test_a_worker_whose_rows_nobody_asks_for_keeps_them_and_takes_part(two):
    left = two.left["one-sided:5"]
    for index, layer in enumerate(("0", "2")):
        first, last = left["workers"][1]["owned"][index]
        assert first > CASES["one-sided"]["below"]
        before = tiny_model(4).model.tables[layer].weight
        assert torch.equal(left["tables"][index][first:last], before[first:last])
        assert not torch.equal(left["tables"][index][:first], before[:first])
        assert left["workers"][1]["traffic"][index]["served"] == 0
        assert left["workers"][1]["traffic"][index]["fetched"] > 0


def test_nothing_is_sent_again_for_activation_checkpointing(two):
    for name, steps in (("ddp", STEPS), ("fsdp-accumulated:3", 3 * 2)):
        for worker in two.left[name]["workers"]:
            for traffic in worker["traffic"]:
                assert traffic["requests"] == steps + 1  # and a validation
                assert traffic["returns"] == steps


def test_what_is_sent_is_what_the_row_numbers_say(two):
    left = two.left["ddp"]
    addresses = tiny_model(4).model.memory.addresses
    wanted = {"asked": [0, 0], "fetched": [0, 0], "served": [0, 0]}
    for step in [*range(STEPS), 99]:
        ids_BT = batch_of(step, 8, False).inputs_BT
        for rank, part_BT in enumerate(ids_BT.chunk(2)):
            first, last = left["workers"][rank]["owned"][0]
            rows_M = addresses.rows(part_BT)[0].flatten()
            away_M = rows_M[(rows_M < first) | (rows_M >= last)]
            wanted["asked"][rank] += len(away_M)
            wanted["fetched"][rank] += len(away_M.unique())
            wanted["served"][1 - rank] += len(away_M.unique())
    for rank, worker in enumerate(left["workers"]):
        traffic = worker["traffic"][0]
        for what, counts in wanted.items():
            assert traffic[what] == counts[rank]
        assert traffic["id_bytes"] == 8 * traffic["fetched"]
        assert traffic["row_bytes"] == 4 * 8 * traffic["served"]
        assert traffic["messages"] == 3 * traffic["requests"] + traffic["returns"]


def test_row_numbers_that_arrive_damaged_are_refused_with_sender_and_range(two):
    for rank, (_, said) in enumerate(two.ends):
        line = next(line for line in said.splitlines() if line.startswith("corrupted:"))
        assert line.startswith(f"corrupted: AddressError: worker {rank} was asked for row ")
        assert f"by worker {1 - rank}: it holds " in line or f"by worker {rank}: it holds" in line


def test_when_a_worker_dies_the_others_end_with_one_line(two):
    (status, said), (died, _) = two.ends
    assert (status, died) == (2, 9)
    lines = [line for line in said.splitlines() if "died" in line]
    assert len(lines) == 1 and "Traceback" not in said
    assert lines[0].startswith("death: WorkerError: worker 0 of 2: another worker died or does not")


def test_a_table_that_is_not_shared_is_refused_by_its_optimiser(monkeypatch):
    from engram_lm.train.optimizers import Optimizers

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(ConfigError, match="a table of one worker among 4: .* shard_tables"):
        Optimizers(tiny_model(), lr=1e-3, table_lr_multiplier=5, weight_decay=0.0)
