"""Serving simulated: counts against slow references, times against hand and limits."""

import json
import math
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import canonical_map, phrases, tiny_config

from engram_lm.cli import main
from engram_lm.config import deepseek_v41 as v41_memory
from engram_lm.errors import ConfigError, DataError
from engram_lm.memory.ngrams import Addresses
from engram_lm.model.blocks import blocks
from engram_lm.model.presets import engram_27b
from engram_lm.model.row_profile import ZipfProfile, zipf_distinct
from engram_lm.simulate.batching import Batcher, Request
from engram_lm.simulate.compute_time import Backbone, BlockWork, Node, deepseek_v41
from engram_lm.simulate.recent import Recent
from engram_lm.simulate.row_trace import Lengths, RowTrace, requests_of, zipf_ranks
from engram_lm.simulate.serving import Serving, Simulation
from engram_lm.simulate.step_time import step_times
from engram_lm.simulate.tier_stack import Tiers
from engram_lm.simulate.tiers import Queue, Tier

SPECIFICATION = tiny_config().memory_config.specification
LAYERS = SPECIFICATION.layers
FREE = Tier(name="free")
SIMPLE = Backbone(blocks=(BlockWork(0.0, 0.0),) * 3, head=BlockWork(0.0, 0.0), prompt_blocks=3)
NODE = Node(overhead=1.0)
"""Every block and the head take a second, whatever they do: before layers 0 and 2, and after the
last, 0 s, 2 s and 2 s."""
ROW = 264


def trace_of(tokens: int = 400, *, seed: int = 0) -> RowTrace:
    ids_T = phrases(1, tokens, seed)[0].numpy()
    return RowTrace.of_text(Addresses(SPECIFICATION, canonical_map()), ids_T, [0])


def simulation(*tiers: Tier, trace=None, node=NODE, backbone=SIMPLE, **serving) -> Simulation:
    return Simulation(
        trace=trace or trace_of(),
        layers=LAYERS,
        row_bytes=ROW,
        tiers=tiers,
        backbone=backbone,
        node=node,
        serving=Serving(**serving),
    )


def two_requests() -> list[Request]:
    return [
        Request(arrival=0.0, first=0, prompt=6, output=3),
        Request(arrival=1.0, first=9, prompt=4, output=2),
    ]


def some_requests(count: int = 8) -> list[Request]:
    lengths = Lengths(prompt=20, output=6).draw(count, seed=1)
    return requests_of(lengths, first=0, rate=0.2, seed=2)


@pytest.mark.parametrize("capacity", [0, 1, 7, 30, 5000, 20_000])
def test_what_is_kept_is_what_a_plain_lru_keeps(capacity):
    generator = np.random.default_rng(capacity)
    recent, plain = Recent(20_000, capacity), OrderedDict()
    for size in [1, 3, 50, 2, 9000, 40, 40, 6000, 1, 0, 5] * 3:
        drawn = np.minimum(generator.zipf(1.2, size), 20_000) - 1
        rows_U = np.unique(drawn)
        generator.shuffle(rows_U)
        assert recent.holds(rows_U).tolist() == [row in plain for row in rows_U.tolist()]
        recent.use(rows_U)
        for row in rows_U.tolist():
            plain[row] = None
            plain.move_to_end(row)
        while len(plain) > capacity:
            plain.popitem(last=False)
        assert len(recent) == len(plain)


def test_reads_of_stacked_tiers_are_those_of_plain_lrus_over_each_other():
    trace = trace_of(2000)
    sizes = (40 * ROW, 90 * ROW)
    tiers = Tiers(
        [Tier(name="a", size=sizes[0]), Tier(name="b", size=sizes[1]), FREE], trace.rows, ROW
    )
    plain = [OrderedDict(), OrderedDict()]
    for first in range(0, 2000, 25):
        for layer, rows_U in enumerate(tiers.distinct(trace.rows_GTH[:, first : first + 25])):
            asked = trace.rows_GTH[layer, first : first + 25] + layer * trace.rows[0]
            assert sorted(rows_U.tolist()) == sorted(set(asked.flatten().tolist()))
            expected, left = [], rows_U.tolist()
            for kept, size in zip(plain, sizes, strict=True):
                found = {row for row in left if row in kept}
                for row in left:
                    kept[row] = None
                    kept.move_to_end(row)
                while len(kept) > size // ROW:
                    kept.popitem(last=False)
                expected.append(len(found))
                left = [row for row in left if row not in found]
            assert tiers.take(rows_U) == [*expected, len(left)]


def test_rows_of_a_trace_are_those_of_the_specification_renumbered():
    ids_T = phrases(1, 300, 3)[0].numpy()
    addresses = Addresses(SPECIFICATION, canonical_map())
    trace = RowTrace.of_text(addresses, ids_T, [0, 100])
    parts = [torch.from_numpy(ids_T[a:b])[None] for a, b in ((0, 100), (100, 300))]
    rows_LTH = torch.cat([addresses.rows(part)[:, 0] for part in parts], dim=1).numpy()
    for rows_TH, numbers_TH, count in zip(rows_LTH, trace.rows_GTH, trace.rows, strict=True):
        pairs = set(zip(rows_TH.flatten().tolist(), numbers_TH.flatten().tolist(), strict=True))
        assert len(pairs) == count == len(np.unique(rows_TH)) == len(np.unique(numbers_TH))
        assert numbers_TH.min() == 0 and numbers_TH.max() == count - 1


def test_rows_by_zipfs_law_repeat_as_the_profile_expects():
    tokens = 20_000
    trace = RowTrace.of_zipf(v41_memory().specification, tokens)
    expected_LH = ZipfProfile(v41_memory().specification).distinct(tokens)
    found_LH = [
        [len(np.unique(rows_TH[:, head])) for head in range(24)] for rows_TH in trace.rows_GTH
    ]
    # Distinct values of so many draws vary by less than the root of their number.
    assert np.abs(np.array(found_LH) - expected_LH).max() < 5 * math.sqrt(tokens)


@pytest.mark.parametrize("exponent", [1.02, 1.3, 2.5])
def test_ranks_are_drawn_as_often_as_zipfs_law_has_them(exponent):
    draws = 50_000
    ranks = zipf_ranks(exponent, draws, np.random.default_rng(0))
    assert len(np.unique(ranks)) == pytest.approx(
        zipf_distinct(exponent, draws), abs=5 * math.sqrt(draws)
    )
    first, second = (np.count_nonzero(ranks == rank) for rank in (1, 2))
    assert first / second == pytest.approx(2**exponent, abs=5 * 2**exponent * second**-0.5)


def test_a_tier_of_k_reads_a_second_brings_k_rows_a_second():
    queue = Queue(Tier(name="disk", iops=8, latency=0.5), ROW)
    assert queue.read(10.0, 1) == 10.5
    assert queue.read(10.0, 8) == 11.0 + 0.5
    assert queue.read(10.0, 800) == 111.0 + 0.5 + 0.125 - 0.125
    assert queue.busy == (1 + 8 + 800) / 8 and queue.free == 10.0 + queue.busy
    assert queue.read(5.0, 0) == 5.0


def test_bandwidth_counts_whole_blocks_and_binds_where_reads_do_not():
    disk = Tier(name="disk", iops=1e6, bandwidth=4096e3, block=4096)
    # 264 bytes anywhere in pages of 4,096 lie in two of them for 263 starts of 4,096.
    whole = sum(4096 * (1 + (start % 4096 + 264 > 4096)) for start in range(4096)) / 4096
    assert disk.moved(264) == whole
    assert disk.row_seconds(264) == whole / 4096e3


def test_rows_that_take_no_time_leave_compute_alone():
    free = [Queue(FREE, ROW)]
    times = step_times(3.0, [1.0, 2.0, 4.0], [[50], [70]], free)
    assert times == (10.0, (0.0, 0.0), 0.0)


def test_rows_asked_for_when_needed_take_the_sum_of_both():
    disk = [Queue(Tier(name="disk", iops=8, latency=0.25), ROW)]
    times = step_times(0.0, [1.0, 2.0, 4.0], [[8], [16]], disk, early=False)
    assert times.waits == (1.125, 2.125) and times.end == 7.0 + 1.125 + 2.125


def test_rows_asked_for_early_come_while_blocks_compute():
    disk = [Queue(Tier(name="disk", iops=8, latency=0.25), ROW)]
    times = step_times(0.0, [1.0, 2.0, 4.0], [[16], [16]], disk)
    # There at 2.125 and 4.125: layer 1 waits from 1 on, layer 2 is reached at 4.125.
    assert times.waits == (1.125, 0.0) and times.end == 8.125


def test_gathering_on_the_same_cores_takes_from_compute_what_it_is_told_to():
    ram = [Queue(Tier(name="ram", cpu=0.5), ROW)]
    times = step_times(0.0, [4.0, 4.0], [[4]], ram, taken=0.5)
    # Two seconds of gathering at half the speed of compute, then alone.
    assert times.waits == (0.0,) and times.slowed == 1.0 and times.end == 9.0
    waiting = step_times(0.0, [1.0, 4.0], [[12]], [Queue(ram[0].tier, ROW)], taken=0.5)
    # A second of compute takes two, then layer 1 waits until six; nobody gathers after that.
    assert waiting.waits == (4.0,) and waiting.slowed == 1.0 and waiting.end == 10.0
    assert step_times(0.0, [4.0, 4.0], [[4]], [Queue(ram[0].tier, ROW)]).end == 8.0
    each = [Queue(replace(ram[0].tier, cpu=0.0, request_cpu=2.0), ROW)]
    assert step_times(0.0, [4.0, 4.0], [[4]], each, taken=0.5) == times
    assert step_times(0.0, [4.0, 4.0], [[0]], each, taken=0.5).end == 8.0


def test_two_requests_share_steps_as_worked_out_by_hand():
    outcome = simulation(FREE, step_tokens=5).run(two_requests())
    # Steps of 4 s (3 blocks and a head; the first samples nothing: 3 s), by tokens of (a, b):
    # (5, 0) to 3, (1, 4) to 7, (1, 1) to 11 where b is done, (1, 0) to 15.
    assert outcome.steps == 4 and outcome.seconds == 15.0
    assert outcome.prompt_tokens == 10 and outcome.output_tokens == 3
    assert outcome.first_token == [7.0, 6.0] and outcome.next_token == [4.0, 4.0]


def test_two_requests_wait_for_a_disk_as_worked_out_by_hand():
    trace = trace_of()
    trace.rows_GTH[0] = np.arange(400 * 4).reshape(400, 4)  # no row of layer 0 is read twice
    trace.rows_GTH[1] = 0  # and one of layer 2
    trace.rows = (1600, 1)
    disk = Tier(name="disk", iops=2.0)
    outcome = simulation(disk, trace=trace, step_tokens=5).run(two_requests())
    # Layer 0 reads 20, 20, 8, 4 rows in 10, 10, 4, 2 s and is reached at once; layer 2's one row
    # comes half a second later, within the 2 s of blocks 0 and 1.
    assert outcome.waits == {0: [10.0, 10.0, 4.0, 2.0], 2: [0.0] * 4}
    assert outcome.seconds == 15.0 + 26.0 and outcome.reads == {"disk": 52 + 4}
    assert outcome.busy == {"disk": (52 + 4) / 2 / 41.0}


@pytest.mark.parametrize("loop", [None, 1, 3])
def test_every_token_is_computed_once_and_in_order(loop):
    requests = some_requests()
    batcher = Batcher(requests, step_tokens=16, sequences=3, loop=loop)
    computed, now = {request: [] for request in requests}, 0.0
    while not batcher.finished:
        shares = batcher.shares(now)
        if not shares:
            now = batcher.next_arrival()
            continue
        assert sum(share.tokens for share in shares) <= 16 and len(shares) <= 3
        assert all(share.request.arrival <= now for share in shares)
        for request, first, tokens, _ in shares:
            computed[request] += range(first, first + tokens)
        now += 1.0
        batcher.computed(shares, now)
        assert loop is None or len(batcher.running) + len(batcher.waiting) <= loop
    for request, positions in computed.items():
        last = request.first + request.prompt + request.output - 1
        assert positions == list(range(request.first, last))
        assert len(request.tokens) == request.output


def test_tiers_without_limits_leave_compute_only():
    outcome = simulation(Tier(name="a", size=50 * ROW), FREE).run(some_requests(), loop=4)
    assert outcome.waited == outcome.slowed == 0
    assert outcome.compute == outcome.seconds


def test_every_row_is_read_somewhere_or_was_read_ahead():
    slow = Tier(name="disk", iops=50.0, latency=0.01)
    tiers = Tier(name="ram", size=30 * ROW), slow
    outcome = simulation(*tiers, ahead_bytes=40 * ROW, sequences=2).run(some_requests(), loop=6)
    assert sum(outcome.reads.values()) + outcome.ahead_hits == outcome.distinct
    assert outcome.ahead_hits > 0
    assert outcome.bytes["disk"] == ROW * (outcome.reads["disk"] + outcome.ahead_hits)
    assert outcome.seconds == pytest.approx(outcome.compute + outcome.waited, rel=1e-12)


def test_looking_ahead_never_makes_a_step_later_and_helps_who_queues():
    slow = Tier(name="disk", iops=40.0, latency=0.01)
    plain, ahead = (
        simulation(slow, sequences=1, ahead_bytes=size).run(some_requests(), loop=4)
        for size in (0, 10**6)
    )
    assert ahead.seconds < plain.seconds and ahead.waited < plain.waited


def test_waits_are_never_negative_and_more_reads_a_second_never_slow_down():
    seconds = []
    for iops in (5.0, 20.0, 100.0, 1e3, 1e5, math.inf):
        disk = Tier(name="disk", iops=iops, latency=0.001)
        outcome = simulation(Tier(name="ram", size=20 * ROW), disk).run(some_requests(), loop=4)
        assert all(wait >= 0 for waits in outcome.waits.values() for wait in waits)
        seconds.append(outcome.seconds)
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > 2 * seconds[-1]


def test_a_larger_cache_reads_no_more_from_what_is_behind_it():
    reads = []
    for rows in (1, 10, 50, 100, 400):
        tiers = Tier(name="ram", size=rows * ROW), Tier(name="disk", iops=100.0)
        # A loop of one: what a step asks for does not hang on when it runs.
        reads.append(simulation(*tiers).run(some_requests(), loop=1).reads["disk"])
    assert reads == sorted(reads, reverse=True) and reads[0] > reads[-1]


def test_a_warm_tier_reads_less_and_counts_nothing_of_the_warming():
    tiers = Tier(name="ram", size=10**6), Tier(name="disk", iops=100.0)
    cold, warm = simulation(*tiers), simulation(*tiers)
    warm.warm(200)
    moved = [replace(request, first=request.first + 200) for request in some_requests(6)]
    found = [each.run([replace(r, tokens=[]) for r in moved]) for each in (cold, warm)]
    assert found[0].asked == found[1].asked and found[1].reads["disk"] < found[0].reads["disk"]


def test_a_block_is_bound_by_what_is_slower():
    node = Node(flops=100.0, utilisation=0.5, bandwidth=10.0, streaming=0.5, overhead=0.0)
    work = BlockWork(flops=2.0, weights=20.0)
    assert node.seconds(work, 1) == 4.0 and node.seconds(work, 1000) == 40.0
    assert node.seconds(work, 0) == 0.0


def test_experts_read_are_those_chosen_and_in_the_end_all():
    work = BlockWork(flops=0.0, weights=5.0, expert=2.0, experts=10, chosen=3)
    assert work.read(1) == pytest.approx(5 + 3 * 2.0)
    assert work.read(2) == pytest.approx(5 + (3 + 7 * 0.3) * 2.0)
    assert work.read(10_000) == 5 + 10 * 2.0


def test_a_models_backbone_has_the_flops_and_bytes_of_its_blocks():
    config = engram_27b()
    found, counted = Backbone.of(config, 1024), blocks(config, 1024)
    assert [work.flops for work in found.blocks] == [block.flops for block in counted]
    whole = [work.weights + work.experts * work.expert for work in found.blocks]
    assert whole == [2 * block.parameters for block in counted]
    node = Node()
    parts = node.compute(found, (1, 14), prompt=100, decode=3, sampled=4)
    assert len(parts) == 3 and min(parts) > 0
    assert parts[0] == node.seconds(found.blocks[0], 103)


def test_prompts_of_v41_pass_half_of_its_blocks():
    node, backbone = Node(), deepseek_v41()
    prompt = node.compute(backbone, (1, 14), prompt=64, decode=0, sampled=0)
    decode = node.compute(backbone, (1, 14), prompt=0, decode=64, sampled=0)
    assert decode[:2] == prompt[:2]
    assert sum(decode) == pytest.approx(2 * sum(prompt))
    whole = sum(work.weights + 384 * work.expert for work in backbone.blocks)
    assert whole + 2 * backbone.head.weights == pytest.approx(289e9 + 18e9, rel=0.005)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tier(name="x", iops=0), "x.iops=0: above 0"),
        (lambda: Tier(name="x", latency=-1), "x.latency=-1: 0 or more"),
        (lambda: Tier(name="x", size=0), "x.size=0"),
        (lambda: Tiers([], [1], 1), "the last holds all rows"),
        (lambda: Tiers([FREE, FREE], [1], 1), "every tier but the last needs a size"),
        (lambda: Serving(step_tokens=0), "serving.step_tokens=0"),
        (lambda: Node(taken=1.5), "node.taken=1.5"),
        (lambda: Lengths(prompt=0), "load.prompt=0"),
    ],
)
def test_what_no_machine_has_is_refused(make, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        make()


def test_requests_beyond_the_trace_are_refused():
    with pytest.raises(DataError, match="trace of 400"):
        simulation(FREE).run([Request(arrival=0.0, first=395, prompt=4, output=3)])


def run(capsys, *arguments: str) -> dict:
    assert main(["plan", "serve", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


SMALL = ["--requests=6", "--warm=500", "--set=load.prompt=100", "--set=load.output=10"]


def test_plan_serve_says_what_tiers_come_to(capsys):
    found = run(capsys, *SMALL, "--tiers=dram:100kB,nvme", "--loop=3")
    assert found["command"] == "plan serve" and found["ratio"] <= 1
    assert sum(found["hit_ratio"].values()) == pytest.approx(1)
    rows = sum(v41_memory().specification.table_rows(layer) for layer in (1, 14))
    memory = (100e3 * 10 + rows * 264 * 0.15) / 1e9
    assert found["memory_dollars"] == pytest.approx(memory, rel=1e-12)
    hours = 1e6 / found["tokens_per_second"] / 3600
    assert found["dollars_per_million"] == pytest.approx(hours * (24 + memory / 26_280))
    assert run(capsys, *SMALL, "--tiers=dram:100kB,nvme", "--loop=3") == found
    slow = run(capsys, *SMALL, "--tiers=dram:100kB,nvme", "--loop=3", "--set=nvme.iops=1e4")
    assert slow["ratio"] < found["ratio"] and slow["rows_asked"] == found["rows_asked"]
    assert "busiest is nvme" in slow["verdict"]
    gathered = run(capsys, *SMALL, "--tiers=dram", "--set=dram.cpu=1e-5", "--set=node.taken=0.5")
    assert "busiest is the CPU that gathers rows" in gathered["verdict"]


def test_plan_serve_serves_real_text_for_people_too(capsys, prepared):
    common = ["--preset=nano-engram", f"--data={prepared}", "--warm=300", "--requests=4"]
    common += ["--set=load.prompt=50", "--set=load.output=8", "--tiers=hbm"]
    found = run(capsys, *common, "--rate=2.5")
    assert found["prompt_tokens"] + found["output_tokens"] == found["rows_asked"] / 32
    assert main(["plan", "serve", *common]) == 0
    assert "tokens a second" in capsys.readouterr().out


def test_plan_without_serve_stays_the_plan_of_training(capsys):
    assert main(["plan", "--workers=4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["command"] == "plan"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiers=tape"], "'tape' is none of hbm, dram, nvme, remote"),
        (["--tiers=dram,nvme"], "every tier but the last needs a size"),
        (["--tiers=dram:1GB"], "the last holds all rows"),
        (["--tiers=dram:x,nvme"], "--tiers dram='x'"),
        (["--set=nvme.speed=1"], "nvme.speed: unknown"),
        (["--set=hbm.iops=1e6"], "no such tier in dram:32GB,nvme"),
        (["--loop=2", "--rate=1"], "one of --loop and --rate"),
        (["--rate=0"], "--rate 0.0: requests a second"),
        (["--requests=0"], "--requests 0: 1 or more"),
        (["--preset=giga"], "preset='giga': accepted are deepseek-v4.1"),
        (["--preset=nano-moe"], "without memory"),
    ],
    ids=str,
)
def test_plan_serve_refuses_in_one_line(capsys, arguments, message):
    assert main(["plan", "serve", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("engram plan serve: error: ") and message in captured.err
    assert not captured.out and captured.err.count("\n") == 1


def test_more_text_than_there_is_is_refused(capsys, prepared):
    arguments = ["plan", "serve", "--preset=nano-engram", f"--data={prepared}"]
    assert main(arguments) == 2
    assert "serve fewer or shorter ones" in capsys.readouterr().err
