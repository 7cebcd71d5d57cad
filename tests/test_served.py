"""A model whose rows stay on disk answers as the one that holds them, bit for bit."""

import gc
import io
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from tiny import VOCABULARY, tiny_model, trained_model

from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.memory.metrics import prometheus
from engram_lm.memory.rows import RowFormat
from engram_lm.model import EngramLMConfig, EngramLMForCausalLM, EngramLMModel
from engram_lm.model.metrics_table import watch
from engram_lm.model.units import bytes_of
from engram_lm.store.pack import pack
from engram_lm.store.source import open_sources

IDS = torch.randint(2, VOCABULARY, (3, 29), generator=torch.Generator().manual_seed(3))
SMALL = 32 * (32 + 12) * 8
"""Bytes: a handful of rows, so that most are read again and again."""


@pytest.fixture(scope="module", params=[1, 4], ids=["stream", "streams"])
def saved(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    trained_model(request.param).save_pretrained(directory)
    return directory


load = EngramLMForCausalLM.from_pretrained


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [SMALL, "1MB"])
def test_logits_are_the_same_bits(saved, dtype, budget):
    whole = EngramLMForCausalLM.from_pretrained(saved, dtype=dtype)
    served = EngramLMForCausalLM.from_pretrained(
        saved, dtype=dtype, memory="disk", memory_budget=budget
    )
    assert not served.model.tables and served.model.reads_memory
    for _ in range(2):  # from the file, and what the budget has kept of it
        assert torch.equal(logits(served), logits(whole))
    with served.model.without_memory(), whole.model.without_memory():
        alone = logits(whole)
        assert torch.equal(logits(served), alone)
    assert not torch.equal(logits(served), alone)


@pytest.mark.parametrize("training", [False, True])
def test_a_backward_pass_to_rows_on_disk_is_refused_and_one_around_them_is_not(saved, training):
    served, whole = load(saved, memory="disk", memory_budget="1MB"), load(saved)
    for model in (served, whole):
        model.train(training)
    result = served(IDS, labels=IDS, use_cache=False)  # gradients are on, and nobody asks for one
    assert torch.equal(result.logits, whole(IDS, use_cache=False).logits)
    with pytest.raises(ConfigError, match="memory='disk': rows in files are not trained"):
        result.loss.backward()
    for model in (served, whole):
        for block in model.model.layers:
            if getattr(block, "engram", None) is not None:
                block.engram.requires_grad_(False)
        model.model.tables.requires_grad_(False)
        model.zero_grad()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    pairs = zip(served.model.layers.parameters(), whole.model.layers.parameters(), strict=True)
    for one, other in pairs:
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_decoding_gives_the_same_tokens_and_scores(saved, options):
    texts = []
    for memory in ({}, {"memory": "disk", "memory_budget": SMALL}):
        model = EngramLMForCausalLM.from_pretrained(saved, **memory)
        texts.append(
            model.generate(
                IDS[:, :7],
                attention_mask=torch.ones(3, 7, dtype=torch.long),
                max_new_tokens=12,
                return_dict_in_generate=True,
                output_scores=True,
                do_sample=False,
                **options,
            )
        )
    assert torch.equal(texts[0].sequences, texts[1].sequences)
    assert all(map(torch.equal, texts[0].scores, texts[1].scores))


def test_rows_are_found_in_sharded_weights_and_in_those_of_the_decoder_alone(saved, tmp_path):
    whole = EngramLMForCausalLM.from_pretrained(saved)
    whole.save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    disk = {"memory": "disk", "memory_budget": "1MB"}
    served = EngramLMForCausalLM.from_pretrained(tmp_path / "shards", **disk)
    assert torch.equal(logits(served), logits(whole))
    whole.model.save_pretrained(tmp_path / "decoder")
    decoder = EngramLMModel.from_pretrained(tmp_path / "decoder", **disk)
    with torch.no_grad():
        states = [model(IDS, use_cache=False)[0] for model in (whole.model, decoder)]
    assert torch.equal(*states)


def test_what_is_asked_found_read_and_waited_for_is_counted(saved):
    served = load(saved, memory="disk", memory_budget="1MB")
    addresses = served.model.addresses
    for _ in range(2):
        logits(served)
    metrics = served.model.served.metrics()
    for layer, rows_BTH in zip(addresses.layers, addresses.rows(IDS), strict=True):
        each, unique = metrics[layer], len(rows_BTH.unique())
        assert (each.asked, each.unique, each.requests) == (2 * rows_BTH.numel(), 2 * unique, 2)
        cache, disk = each.tiers
        # A cache that has every row after the first pass answers all of the second.
        assert (cache.name, cache.asked, cache.hits) == ("cache", 2 * unique, unique)
        assert (disk.name, disk.asked, disk.hits) == ("disk", unique, unique)
        assert disk.bytes_read >= unique * served.model.served.layers[layer].format.row_bytes
        waits = torch.tensor(list(served.model.served.layers[layer].waits), dtype=torch.float64)
        assert len(waits) == 2 and each.wait_seconds == pytest.approx(float(waits.sum()))
        assert each.wait_p50 == float(waits.quantile(0.5)) <= each.wait_p99


def test_metrics_are_read_by_prometheus(saved):
    served = load(saved, memory="disk", memory_budget="1MB")
    logits(served)
    metrics = served.model.served.metrics()
    text = prometheus(metrics)
    samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation and family.type in ("counter", "summary")
        for sample in family.samples:
            samples[sample.name, *sorted(sample.labels.items())] = sample.value
    for layer, each in metrics.items():
        where = ("layer", str(layer))
        assert samples["engram_rows_asked_total", where] == each.asked
        assert samples["engram_rows_unique_total", where] == each.unique
        disk = samples["engram_tier_read_bytes_total", where, ("tier", "disk")]
        assert disk == each.tiers[1].bytes_read
        assert samples["engram_row_wait_seconds_count", where] == 1
        assert samples["engram_row_wait_seconds_sum", where] == each.wait_seconds
        wait = samples["engram_row_wait_seconds", where, ("quantile", "0.99")]
        assert wait == each.wait_p99


def test_metrics_are_drawn_live(saved):
    served = load(saved, memory="disk", memory_budget="1MB")
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with watch(served.model.served, console):
        logits(served)
    lines = [line for line in console.file.getvalue().splitlines() if "│" in line]
    for layer, each in served.model.served.metrics().items():
        line = [line for line in lines if f" {layer} " in line.split("│")[1]][-1]
        assert f"{each.asked:,}" in line and "disk 100.0%" in line


def test_the_next_tokens_rows_are_asked_for_when_it_is_sampled(saved, monkeypatch):
    served = load(saved, memory="disk", memory_budget="1MB")
    gathered, asked = [], []
    for each in served.model.served.layers.values():

        def gather(rows_U, store=each.store, gather=each.store.gather):
            gathered.append(store)
            return gather(rows_U)

        def start(rows_M, start=each.start):
            asked.append(rows_M)
            return start(rows_M)

        monkeypatch.setattr(each.store, "gather", gather)
        monkeypatch.setattr(each, "start", start)
    served.generate(
        IDS[:1, :7], attention_mask=torch.ones(1, 7, dtype=torch.long), max_new_tokens=5
    )
    served.model.served.close()
    # The prompt and four tokens are asked for; each once, and the fifth token's in vain.
    assert len(asked) == 2 * 5 and len(gathered) == 2 * 6


def test_rows_of_waiting_prompts_are_read_before_their_turn(saved):
    served = load(saved, memory="disk", memory_budget="64MB")
    served.model.look_ahead([IDS[0].tolist(), IDS[1].tolist()])
    for index, (layer, each) in enumerate(served.model.served.layers.items()):
        ahead = each.store.slower._ahead
        rows = torch.cat([served.model.addresses.rows(IDS[i : i + 1])[index] for i in (0, 1)])
        assert sorted(ahead._rows_A.tolist()) == rows.unique().tolist(), layer
    whole = load(saved)
    assert torch.equal(logits(served), logits(whole))
    whole.model.look_ahead([IDS[0].tolist()])  # nothing to read


@pytest.mark.parametrize("dtype", ["fp32", "fp8"])
def test_rows_come_from_packed_tables(saved, tmp_path, dtype):
    whole = load(saved)
    for source in open_sources(saved):
        format = RowFormat.named(dtype, source.format.dim)
        pack(source, format, "packed", tmp_path / f"table-{source.layer}.safetensors")
        if dtype == "fp8":
            stored = whole.model.tables[str(source.layer)].weight
            stored.data = format.decode(format.encode(stored.data)).float()
    served = load(saved, memory="disk", memory_budget="1MB", tables=tmp_path)
    assert torch.equal(logits(served), logits(whole))


def test_packed_tables_of_another_model_are_refused(saved, tmp_path):
    disk = {"memory": "disk", "memory_budget": "1MB"}
    with pytest.raises(ConfigError, match="packed files are read with memory='disk'"):
        load(saved, tables=tmp_path)
    with pytest.raises(DataError, match="no packed tables; `engram pack"):
        load(saved, **disk, tables=tmp_path)
    first, _ = open_sources(saved)
    pack(first, first.format, "packed", tmp_path / "a.safetensors")
    with pytest.raises(MismatchError, match="no packed table of layer"):
        load(saved, **disk, tables=tmp_path)
    pack(first, first.format, "packed", tmp_path / "b.safetensors")
    with pytest.raises(MismatchError, match="b.safetensors: a second table of layer"):
        load(saved, **disk, tables=tmp_path)
    other = tiny_model(1, orders=3)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "x").mkdir()
    for source in open_sources(tmp_path / "other"):
        pack(source, source.format, "packed", tmp_path / "x" / f"{source.layer}.safetensors")
    with pytest.raises(MismatchError, match="packed with the specification of sha256"):
        load(saved, **disk, tables=tmp_path / "x")


def test_closed_tables_answer_in_one_line_and_a_dropped_model_closes_its_files(saved):
    served = load(saved, memory="disk", memory_budget="1MB")
    logits(served)
    with served.model.served:
        pass
    with pytest.raises(DataError, match="the served tables are closed"):
        logits(served)
    files = len(os.listdir("/proc/self/fd"))
    served = load(saved, memory="disk", memory_budget="1MB")
    assert len(os.listdir("/proc/self/fd")) > files
    del served
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == files


def test_the_thread_that_gathers_takes_no_others_and_leaves_the_model_its_own(saved):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        served = load(saved, memory="disk", memory_budget="1MB")
        thread = served.model.served._thread
        assert thread.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as other:
            assert other.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(threads)


def test_what_cannot_be_served_is_refused_in_one_line(saved, tmp_path):
    served = EngramLMForCausalLM.from_pretrained(saved, memory="disk", memory_budget="1MB")
    with pytest.raises(ConfigError, match="the rows are in files; open it without"):
        served.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "model.safetensors").exists()
    with pytest.raises(ConfigError, match="memory='ssd': None .* or 'disk'"):
        load(saved, memory="ssd", memory_budget="1MB")
    for given in ({"memory": "disk"}, {"memory_budget": "1MB"}):
        with pytest.raises(ConfigError, match="and how much memory it may take"):
            load(saved, **given)
    with pytest.raises(ConfigError, match="memory_budget=100 B: .* at least"):
        load(saved, memory="disk", memory_budget=100)
    plain = EngramLMForCausalLM(
        EngramLMConfig(vocab_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match="memory='disk', and the model has no memory"):
        load(tmp_path / "plain", memory="disk", memory_budget="1MB")


def test_files_that_have_changed_are_told_where_the_model_waits(saved, tmp_path):
    trained_model(1).save_pretrained(tmp_path)
    served = EngramLMForCausalLM.from_pretrained(tmp_path, memory="disk", memory_budget=SMALL)
    logits(served)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises((DataError, MismatchError), match="model.safetensors"):
        logits(served)


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GB", 2 * 10**9), ("1.5 MB", 1_500_000), ("7", 7), (512, 512), ("3kB", 3000)],
)
def test_sizes_are_read_as_people_write_them(text, count):
    assert bytes_of("size", text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "2 parsecs", "nan", "inf", "1e30TB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="size=.*: a number above 0 with one of TB"):
        bytes_of("size", text)
