"""Plans against models, brute force, published sizes and real text."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny import phrases, tiny_config, tiny_model

from engram_lm import corpus
from engram_lm.cli import main, parser
from engram_lm.config import qwen4_exp
from engram_lm.errors import ConfigError, DataError
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.ngrams import Addresses
from engram_lm.model.blocks import blocks
from engram_lm.model.budget import ledger
from engram_lm.model.cluster import ROW_STATES, Cluster, Job, RowState
from engram_lm.model.plan import Plan, Sizes
from engram_lm.model.presets import configure, engram_27b, engram_40b, nano_engram
from engram_lm.model.row_profile import (
    EXPONENTS,
    MeasuredProfile,
    Point,
    ZipfProfile,
    measure,
    zipf_distinct,
)
from engram_lm.model.traffic import counted, exchanges, expected, owned
from engram_lm.train.encoder import Encoder
from engram_lm.train.optimizers import Optimizers
from engram_lm.train.prepare import Request, prepare
from engram_lm.train.row_samples import sampled_profile
from engram_lm.train.text import wordnet_stream

VARIANTS = [
    {},
    {"streams": 4},
    {"conv": False, "orders": 3},
    {"memory": None, "streams": 2},
    {"mlp_layer_types": ["dense"] * 3},
]


def plan(config=None, *, workers=4, tokens=1024, context=32, **changes) -> Plan:
    sizes = Sizes.of(config or tiny_config(), context)
    cluster = {key: changes.pop(key) for key in list(changes) if key in Cluster.__annotations__}
    return Plan(
        sizes=sizes,
        profile=ZipfProfile(sizes.memory.specification),
        cluster=Cluster(workers=workers, **cluster),
        job=Job(tokens=tokens, context=context, **changes),
    )


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_blocks_are_those_of_the_model_and_leave_only_its_ends(variant):
    model = tiny_model(**variant)
    found, whole = blocks(model.config, context=32), ledger(model.config, context=32)
    real = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    assert [block.parameters for block in found] == real
    S, D = model.config.streams, model.config.hidden_size
    ends = whole["LM head"].flops + (2 * S * S * D if S > 1 else 0)
    assert sum(block.flops for block in found) + ends == whole.flops


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 97, 1000])
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7])
def test_workers_own_the_rows_that_torch_chunk_gives_them(rows, workers):
    chunks = torch.arange(rows).chunk(workers)
    for worker, (first, last) in enumerate(owned(rows, workers)):
        chunk = chunks[worker].tolist() if worker < len(chunks) else []
        assert list(range(first, last)) == chunk


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_where_every_row_is_asked_for_the_expected_load_is_the_counted_one(workers):
    primes = [11, 13, 17]
    sizes = [last - first for first, last in owned(sum(primes), workers)]
    certain = counted(np.array([sizes] * workers))
    guessed = expected(primes, primes, sum(primes), workers)
    assert guessed == pytest.approx(certain)


def test_the_expected_load_is_that_of_rows_drawn_within_their_heads():
    primes, asked, workers = [101, 103, 107, 109], [80, 80, 20, 20], 3
    generator, total = np.random.default_rng(0), 0
    ranges = owned(sum(primes), workers)
    offsets = np.cumsum([0, *primes[:-1]])
    for _ in range(200):
        heads = zip(primes, asked, offsets, strict=True)
        rows = [generator.choice(p, a, replace=False) + o for p, a, o in heads]
        rows = np.concatenate(rows)
        total = total + np.array([np.sum((rows >= a) & (rows < b)) for a, b in ranges])
    found = counted(np.array([total] * workers))
    guessed = expected(asked, primes, sum(primes), workers)
    assert guessed.asked * 200 == found.asked == workers * 200 * 200
    assert guessed.local * 200 == found.local
    # A count of at most 80 is a binomial's or narrower; two workers ask the busiest.
    assert guessed.busiest == pytest.approx(found.busiest / 200, abs=5 * 2 * np.sqrt(80 / 4 / 200))


def test_an_exchange_sends_8_byte_counts_and_ids_and_whole_rows():
    requests = np.array([[3, 5], [7, 11]])
    counts, ids, rows, gradients = exchanges(
        counted(requests), 2, row_bytes=160, gradient_bytes=320
    )
    assert (counts.bytes, counts.link_bytes, counts.busiest_bytes) == (32, 16, 8)
    assert (ids.bytes, ids.link_bytes, ids.busiest_bytes) == (8 * 26, 8 * 12, 8 * 7)
    assert (rows.link_bytes, gradients.link_bytes) == (160 * 12, 320 * 12)
    assert [each.messages for each in (counts, ids, rows, gradients)] == [2] * 4


@pytest.mark.parametrize("exponent", [1.1, 1.25, 2.0])
def test_distinct_draws_of_zipfs_law_are_the_expected_ones(exponent):
    tokens = 20_000
    generator = np.random.default_rng(0)
    found = [len(np.unique(generator.zipf(exponent, tokens))) for _ in range(4)]
    # Occupancy varies less than independent counts, whose variance is at most the mean.
    error = 5 * np.sqrt(zipf_distinct(exponent, tokens) / 4)
    assert np.mean(found) == pytest.approx(zipf_distinct(exponent, tokens), abs=error)


def test_one_token_asks_for_one_row_of_each_head_under_every_profile():
    specification = tiny_config().memory_config.specification
    measured = MeasuredProfile(specification, {8: Point(1, np.full((2, 4), 5))})
    for profile in (ZipfProfile(specification), measured):
        assert profile.distinct(1) == pytest.approx(np.ones((2, 4)))


@pytest.fixture(scope="module")
def addresses() -> Addresses:
    specification = nano_engram().memory_config.specification
    return Addresses(specification, CanonicalMap.from_tokenizer(corpus.tokenizer()))


def test_a_measured_profile_is_exact_where_it_was_measured(addresses):
    ids = torch.from_numpy(corpus.tokens("train", 4096).ids.astype(np.int64)).view(4, 8, 128)
    profile = MeasuredProfile(
        addresses.specification, {1024: measure(addresses, ((part, None) for part in ids))}
    )
    for index, layer in enumerate(addresses.layers):
        found = np.zeros(16)
        for part in ids:
            rows = addresses.rows(part)[index]
            found += [len(set(rows[..., head].flatten().tolist())) for head in range(16)]
        assert (profile.distinct(1024)[index] == found / 4).all(), layer


def test_beyond_its_sizes_a_profile_counts_too_many_rows_but_not_many(addresses):
    stream = wordnet_stream("train", 200_000)
    sizes = {"context": 128, "batches": 4}
    small = sampled_profile(stream, addresses, sequences=(8, 16, 32), **sizes)
    large = sampled_profile(stream, addresses, sequences=(128,), **sizes)
    ratio = small.distinct(128 * 128).sum() / large.distinct(128 * 128).sum()
    # Four times as far as it was measured; the power of growth falls by about 0.1 on the way.
    assert 1 < ratio < 4**0.1


def test_a_stream_that_is_too_short_for_a_batch_is_refused(addresses):
    with pytest.raises(DataError, match="fewer than the 9 sequences of 128"):
        sampled_profile(
            wordnet_stream("train", 1100), addresses, context=128, sequences=[9], batches=1
        )


def test_the_sizes_of_the_field_come_out():
    memory = qwen4_exp()
    tokens, heads = 1_000_000, memory.specification.heads_per_layer
    (layer,) = memory.specification.layers
    primes = [prime for order in memory.specification.primes[layer] for prime in order]
    rows = memory.specification.table_rows(layer)
    load = expected([tokens] * heads, primes, rows, 1)
    _, ids, vectors, _ = exchanges(load, 1, row_bytes=2 * 160, gradient_bytes=4 * 160)
    assert heads == 16 and load.asked == 16e6
    assert ids.bytes == 128e6 and vectors.bytes == pytest.approx(5.12e9)
    mixed = RowState(weight=2 + 4, moments=8, row=0)
    assert mixed.bytes(10**11 // 160, 160) == 14 * 10**11
    assert ROW_STATES["rowwise", "bf16"].bytes(10**11 // 160, 160) == 202.5e9
    for preset, values in ((engram_27b, 5.79e9), (engram_40b, 18.53e9)):
        memory = preset().memory_config
        rows = sum(memory.specification.table_rows(layer) for layer in (1, 14))
        assert rows * memory.head_dim == pytest.approx(values, rel=1e-3)


def test_on_one_worker_memory_and_checkpoint_are_those_of_a_real_model():
    model = tiny_model(streams=2).train()
    optimizers = Optimizers(model, lr=0.01, table_lr_multiplier=5, weight_decay=0.0)
    ids = phrases(4, 32, seed=0)
    model(ids, labels=ids, use_cache=False).loss.backward()
    tables = {table.weight for table in model.model.tables.values()}
    dense = [p for p in model.parameters() if p not in tables]
    optimizers.step()

    def moments(parameters) -> int:
        states = [o.state[p] for o in optimizers.each.values() for p in parameters if p in o.state]
        tensors = [t for state in states for t in state.values() if torch.is_tensor(t)]
        return sum(tensor.nbytes for tensor in tensors if tensor.ndim)

    one = plan(model.config, workers=1, tokens=128, context=32)
    assert one.memory["table rows"] == sum(table.nbytes for table in tables)
    assert one.memory["row moments"] == moments(tables)
    assert one.memory["backbone weights"] == sum(p.nbytes for p in dense)
    assert one.memory["backbone gradients"] == sum(p.grad.nbytes for p in dense)
    assert one.memory["backbone moments"] == moments(dense)
    state = sum(p.nbytes for p in model.parameters()) + moments(dense) + moments(tables)
    assert one.checkpoint_bytes == state


def test_alone_nothing_crosses_a_link_and_nothing_waits():
    alone = plan(workers=1)
    for found in alone.exchanges().values():
        assert all(each.link_bytes == each.messages == each.busiest_bytes == 0 for each in found)
    assert alone.waits.rows == alone.waits.gradients == alone.backbone_bytes == 0


def test_rows_are_waited_for_where_they_come_later_than_the_layer():
    config = tiny_config()
    slow = plan(config, link=1e3, latency=0.0, utilisation=1.0, flops=1e9)
    layers = {
        layer: [each.busiest_bytes / 1e3 for each in found]
        for layer, found in slow.exchanges().items()
    }
    there = np.cumsum([sum(each[:3]) for each in layers.values()])
    assert list(slow.waits.arrive.values()) == pytest.approx(there)
    flops = sum(block.flops for block in blocks(config, 32)[:2])
    assert slow.waits.before == pytest.approx({0: 0.0, 2: slow.pass_tokens * flops / 1e9})
    first, last = there
    assert slow.waits.rows == pytest.approx(first + max(0, last - slow.waits.before[2] - first))


def test_gradients_are_sent_while_what_is_below_them_is_still_computed():
    fast = plan(link=1e12, latency=0.0, flops=1e9)
    # Below layer 0 there is nothing to compute, so its own gradients are waited for.
    assert fast.waits.gradients == pytest.approx(fast.exchanges()[0][-1].busiest_bytes / 1e12)


def test_the_fewest_workers_are_where_memory_begins_to_suffice():
    # The root and the gathered blocks are whole on every worker, so some memory never suffices.
    some = plan(workers=1, tokens=64 * 32, memory=6e5)
    assert 1 < some.fewest < 64
    assert some.on(some.fewest).strain["memory"] <= 1 < some.on(some.fewest - 1).strain["memory"]
    assert plan(memory=1e3).fewest is None


def test_rows_come_too_late_from_the_workers_named_on():
    some = plan(workers=1, tokens=64 * 32, link=1e12, latency=3e-5, flops=1e9, sequences=1)
    assert 1 < some.late <= 64
    assert some.on(some.late).strain["rows"] > 1 >= some.on(some.late - 1).strain["rows"]
    assert plan(link=1e18, latency=0.0).late is None


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"memory": 1e5, "link": 1e18, "latency": 0.0}, "memory:"),
        ({"latency": 1.0, "flops": 1e12, "link": 1e18}, "the links, by table rows"),
        ({"link": 1e6, "latency": 0.0, "backbone": "ddp", "flops": 1e9}, "by the backbone's"),
        ({"disk": 1.0, "link": 1e18, "latency": 0.0}, "the checkpoint"),
    ],
)
def test_the_verdict_names_what_breaks_first(changes, first):
    assert first in plan(**changes).verdict


def test_passes_hold_at_most_the_sequences_asked_for_and_share_all_tokens():
    for workers in (1, 3, 5, 8):
        some = plan(workers=workers, tokens=1024, context=32, sequences=3)
        assert some.most_tokens <= 3 * 32
        assert some.pass_tokens * workers * some.passes == pytest.approx(1024)


def run(capsys, *arguments: str) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_command_prints_what_the_plan_says(capsys):
    found = run(
        capsys, "--preset=nano-engram", "--workers=2,4", "--tokens=4096", "--set=job.context=128"
    )
    assert [each["workers"] for each in found["plans"]] == [2, 4]
    config = nano_engram()
    same = plan(config, workers=4, tokens=4096, context=128)
    assert found["plans"][1] == json.loads(json.dumps(same.to_dict()))


def test_tables_on_the_terminal_fit_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "--workers=64,512"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and json.loads(last)["command"] == "plan"
    text = " ".join(lines)
    assert "Assumed: 80 GB a worker" in text and "breaks first" in text and "…" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers=0"], "--workers 0: whole numbers, 1 or more"),
        (["--workers=two"], "--workers two: whole numbers"),
        (["--preset=engram_30b"], "preset='engram_30b': accepted are"),
        (["--preset=moe_27b"], "memory=None: a model without memory"),
        (["--preset=nano-engram", "--model=x"], "give one of --preset and --model"),
        (["--workers=2000"], "workers=2000: a step has 1280 sequences"),
        (["--tokens=4097"], "job.tokens=4097: whole sequences"),
        (["--memory=0"], "cluster.memory=0.0: above 0"),
        (["--link=-1"], "cluster.link=-1000000000.0: above 0"),
        (["--set=cluster.link=5"], "it has an option of its own, --link"),
        (["--set=cluster.speed=5"], "cluster.speed: unknown; accepted are"),
        (["--set=job.table_optimizer=sgd"], "accepted are adam, rowwise"),
        (["--set=cluster.utilisation=2"], "cluster.utilisation=2.0"),
        (["--set=job.free=1"], "job.free=1.0"),
        (["--data=nowhere"], "nowhere: no index.json"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(capsys, arguments, message):
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert not captured.out and captured.err.count("\n") == 1 and message in captured.err


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """40,000 tokens of the corpus, as `engram data` writes them."""
    text = tmp_path_factory.mktemp("text") / "some.jsonl"
    lines = (json.dumps({"text": document}) for document in corpus.documents("train")[:1500])
    text.write_text("\n".join(lines))
    encoder = Encoder.open(corpus.tokenizer_file(), corpus.SEPARATOR)
    out = text.with_name("shards")
    prepare(Request(sources=(str(text),)), encoder, out, Console(stderr=True))
    return out


def saved(directory: Path, canonical: CanonicalMap) -> Path:
    """The configuration of a model that was bound to this map."""
    config = nano_engram()
    memory = config.memory_config
    memory = replace(memory, specification=memory.specification.bind(canonical))
    configure(config, {"memory": memory.to_dict()}).save_pretrained(directory)
    return directory


JOB = ("--workers=4", "--tokens=4096", "--set=job.context=128")


def test_a_profile_is_counted_on_token_shards(capsys, shards, tmp_path):
    own = saved(tmp_path, CanonicalMap.from_tokenizer(corpus.tokenizer()))
    (found,) = run(capsys, f"--model={own}", f"--data={shards}", *JOB)["plans"]
    # Two passes of four sequences, a size that is measured: rows of 32 bytes, ids of 8, in
    # eight batches and so in eighths of a row for each of the workers.
    for layer in found["merged"].values():
        assert layer["rows"]["bytes"] == 4 * layer["ids"]["bytes"]
        assert layer["ids"]["bytes"] % 4 == 0
        assert 0.3 < layer["ids"]["bytes"] / (8 * 16 * 4 * 512) < 0.9
    assert found["pass_tokens"] == 512


def test_a_preset_takes_the_vocabulary_of_its_data(capsys, shards):
    found = run(capsys, "--preset=nano-engram", f"--data={shards}", *JOB)
    assert "counted in" in found["profile"] and found["plans"][0]["workers"] == 4


def test_a_profile_of_another_tokenizer_is_refused(capsys, shards, tmp_path):
    other = saved(tmp_path, CanonicalMap.identity(8192))
    assert main(["plan", f"--model={other}", f"--data={shards}", *JOB]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "canonical map is not the specification's" in error


def test_a_profile_with_more_token_ids_than_the_model_is_refused(capsys, shards, tmp_path):
    small = nano_engram()
    configure(small, {"vocab_size": 4096}).save_pretrained(tmp_path)
    assert main(["plan", f"--model={tmp_path}", f"--data={shards}", *JOB]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "8192 token ids, the model 4096" in error


PAGE = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
RESULT = Path(__file__).parents[1] / "results" / "scaling.json"


def test_commands_of_the_page_parse():
    lines = [line.strip() for line in PAGE.splitlines() if line.startswith("    engram ")]
    assert len(lines) >= 3
    for line in lines:
        parser().parse_args(shlex.split(line)[1:])


def test_numbers_of_the_page_are_those_of_its_result():
    summary = json.loads(RESULT.read_text())["summary"]
    for name in ("27b", "40b"):
        for workers in (64, 128, 256, 512):
            own = {
                key.removesuffix(f"_{name}_{workers}"): value
                for key, value in summary.items()
                if key.endswith(f"_{name}_{workers}")
            }
            assert paper_row(name, workers, own) in PAGE
    for order in (2, 3):
        cells = " | ".join(
            f"{summary[f'share_{order}grams_{tokens}']:.0%}" for tokens in SHOWN_TOKENS
        )
        assert f"| {order}-grams | {cells} | {summary[f'zipf_exponent_{order}']:.2f} |" in PAGE


SHOWN_TOKENS = (16_384, 65_536, 1_048_576)


def paper_row(name: str, workers: int, own: dict[str, float]) -> str:
    cells = [
        f"Engram-{name.upper()}",
        str(workers),
        f"{own['passes']:.0f} x {own['pass_tokens']:,.0f}",
        f"{own['table_gb']:.2f}",
        f"{own['memory_gb']:.1f}",
        f"{own['rows_mb']:.0f} of {own['unmerged_mb']:.0f}",
        f"{own['arrive_ms']:.1f} of {own['before_ms']:.1f}",
        f"{own['pass_s']:.2f}",
        f"{own['backbone_wait_s']:.2f}",
        f"{own['checkpoint_gb']:.0f} / {own['checkpoint_s']:.0f}",
        f"{own['strain_memory']:.2f}",
        f"{own['strain_rows']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def test_assumed_exponents_are_those_fitted_to_text():
    summary = json.loads(RESULT.read_text())["summary"]
    fitted = tuple(round(summary[f"zipf_exponent_{order}"], 2) for order in (2, 3, 4))
    assert fitted == EXPONENTS


def test_exponents_of_1_or_less_are_refused():
    with pytest.raises(ConfigError, match="above 1"):
        ZipfProfile(tiny_config().memory_config.specification, (1.0,))
