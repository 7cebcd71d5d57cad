"""Gates, token losses, n-gram bands and the report: each against a direct computation."""

import json
import math
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from engram_lm import corpus
from engram_lm.analysis.bands import BANDS, bands, count_ngrams, half, loss_by_band
from engram_lm.analysis.compare import PROMPTS, Arm, compare
from engram_lm.analysis.demo_report import verdict, write_demo_report
from engram_lm.analysis.from_disk import from_disk
from engram_lm.analysis.gates import cut, gate_trace
from engram_lm.analysis.material import SENTENCES, Material, encoded
from engram_lm.analysis.results import DemoResults, TrainingLog
from engram_lm.analysis.samples import samples
from engram_lm.analysis.token_html import coloured, visible
from engram_lm.config import MemoryConfig
from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluate.token_losses import token_losses
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.specification import Specification
from engram_lm.model import EngramLMConfig, EngramLMForCausalLM
from engram_lm.model.budget import ledger

HOSTILE = '<script>alert("1")</script> & </p>\n\t\x00'
TEXTS = ["New York is a city.", "Zürich, 世界 e\u0301 👩🏽‍🚀!", "  two  spaces \r\n ", HOSTILE]


def build(canonical: CanonicalMap, streams: int = 1, *, memory: bool = True):
    """A random model with weights large enough for every part to matter."""
    torch.manual_seed(streams)
    specification = Specification(layers=(0, 2), rows_per_head=(50, 50), heads=2, pad_id=1)
    engram = MemoryConfig(specification=specification.bind(canonical), head_dim=8).to_dict()
    config = EngramLMConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=4,
        moe_intermediate_size=16,
        shared_intermediate_size=16,
        streams=streams,
        memory=engram if memory else None,
    )
    model = EngramLMForCausalLM(config)
    if memory:
        model.set_canonical_map(canonical)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return model


def hooks(model) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("text", TEXTS, ids=["plain", "scripts", "spaces", "html"])
def test_a_trace_has_a_gate_for_each_layer_token_and_stream(canonical, tokenizer, text, streams):
    trace = gate_trace(build(canonical, streams), tokenizer, text)
    tokens = len(tokenizer(text)["input_ids"]) + 1
    assert trace.gates_LTS.shape == trace.contributions_LTS.shape == (2, tokens, streams)
    assert ((trace.gates_LTS >= 0) & (trace.gates_LTS <= 1)).all()
    assert (trace.contributions_LTS >= 0).all() and np.isfinite(trace.contributions_LTS).all()
    assert trace.tokens[0] == "<|endoftext|>" and "".join(trace.tokens[1:]) == text
    assert len(trace.tokens) == len(trace.ids) == tokens
    assert [len(texts) for texts in trace.ngrams] == [tokens, tokens]


@pytest.mark.parametrize("streams", [1, 4])
def test_gates_and_contributions_are_those_of_equation_4(canonical, tokenizer, streams):
    model = build(canonical, streams)
    trace = gate_trace(model, tokenizer, TEXTS[0])
    ids = torch.tensor([trace.ids])
    fuse = model.model.layers[0].engram
    hidden = model.model.embed_tokens(ids).double()[0, :, None].expand(-1, streams, -1)
    vectors = model.model.memory.start(ids).wait(0)[0].double()
    kv = (vectors @ fuse.kv.weight.double().T).view(len(trace.ids), streams + 1, -1)
    keys, value = kv[:, :streams], kv[:, streams:]
    weight = (fuse.query_norm_weight * fuse.key_norm_weight).double()
    normed = torch.nn.functional.normalize(hidden, dim=-1) * weight
    dots = (normed * torch.nn.functional.normalize(keys, dim=-1)).sum(-1) * math.sqrt(32)
    gates = torch.sigmoid(dots.sign() * dots.abs().sqrt())
    np.testing.assert_allclose(trace.gates_LTS[0], gates.detach(), atol=1e-5)  # float32 and eps
    fuse.conv = None
    plain = gate_trace(model, tokenizer, TEXTS[0]).contributions_LTS[0]
    ratio = gates * value.norm(dim=-1) / hidden.norm(dim=-1)
    np.testing.assert_allclose(plain, ratio.detach(), rtol=1e-4)


def test_characters_shared_by_tokens_stand_at_the_last_one(tokenizer):
    text = "A🜁B"
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert cut(text, offsets) == ["A", "", "", "", "🜁", "B"]
    assert cut(" a  bc ", [(1, 2), (4, 5), (5, 6)]) == [" a", "  b", "c "]
    assert cut("xyz", [(0, 1), (0, 2), (1, 3)]) == ["", "x", "yz"]


def test_hooks_and_modes_are_put_back_even_after_an_error(canonical, tokenizer, monkeypatch):
    model = build(canonical).train()
    model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    before = hooks(model)
    gate_trace(model, tokenizer, "a text")
    monkeypatch.setattr(model.model.norm, "forward", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gate_trace(model, tokenizer, "a text")
    assert hooks(model) == before
    assert [module.training for module in model.modules()] == modes


def test_a_trace_without_memory_or_text_is_refused(canonical, tokenizer):
    with pytest.raises(ConfigError, match="memory=None"):
        gate_trace(build(canonical, memory=False), tokenizer, "text")
    with pytest.raises(DataError, match="text=''"):
        gate_trace(build(canonical), tokenizer, "")


@pytest.mark.parametrize(("tokens", "context", "batch"), [(101, 16, 3), (97, 16, 2), (9, 32, 4)])
def test_token_losses_are_the_cross_entropy_of_each_window(canonical, tokens, context, batch):
    model = build(canonical)
    ids = np.random.default_rng(0).integers(2, 8192, tokens).astype(np.uint16)
    seen: list[int] = []
    losses = token_losses(model, ids, context=context, batch=batch, progress=seen.append)
    assert losses.dtype == np.float32 and losses.shape == (tokens - 1,)
    assert seen == sorted(seen) and seen[-1] == tokens - 1
    reference = []
    for first in range(0, tokens - 1, context):
        window = torch.from_numpy(ids[first : first + context + 1].astype(np.int64))
        logits = model.eval()(window[None, :-1]).logits[0].double()
        reference.append(-logits.log_softmax(-1)[range(len(window) - 1), window[1:]])
    np.testing.assert_allclose(losses, torch.cat(reference).detach(), rtol=1e-5)


def test_token_losses_change_with_memory_off_and_little_under_autocast(canonical):
    model = build(canonical)
    ids = np.arange(2, 60)
    losses = token_losses(model, ids, context=16, batch=2)
    half = token_losses(model, ids, context=16, batch=2, autocast=torch.bfloat16)
    with model.model.without_memory():
        off = token_losses(model, ids, context=16, batch=2)
    assert abs(off - losses).max() > 0.1
    # bfloat16 keeps 8 bits; a router that flips is rare and stays below this mean.
    assert 0 < abs(half - losses).mean() < 0.1
    with pytest.raises(DataError, match="1 ids"):
        token_losses(model, ids[:1], context=16, batch=2)


@pytest.mark.parametrize(("order", "base"), [(2, 9), (3, 9), (4, 99_092), (5, 99_092)])
def test_counts_are_those_of_a_dictionary(order, base):
    generator = np.random.default_rng(0)
    # The highest ids there are: of 99,092, DeepSeek-V4.1's, four are more than an int64 holds.
    training, other = (base - 9 + generator.integers(0, n, m) for n, m in ((7, 500), (9, 80)))
    counts = count_ngrams(training, order, base=base)
    grams = [tuple(training[i : i + order]) for i in range(500 - order + 1)]
    ends = [grams.count(tuple(other[t - order + 1 : t + 1])) for t in range(order - 1, 80)]
    assert counts.of(other).tolist() == [0] * (order - 1) + ends
    assert len(counts.keys_K) == len(set(grams)) and counts.counts_K.sum() == len(grams)
    assert (np.sort(counts.keys_K) == counts.keys_K).all()


def test_planted_ngrams_fall_into_their_bands():
    planted = {(1, 2): 9, (3, 4): 10, (5, 6): 100, (7, 8): 1}
    training = np.array([i for pair, n in planted.items() for i in [*pair, 0] * n])
    validation = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9])
    counts = count_ngrams(training, 2, base=10).of(validation)
    assert counts[[1, 3, 5, 7, 8]].tolist() == [9, 10, 100, 1, 0]
    names = [BANDS[band] for band in bands(counts)[[1, 3, 5, 7, 8]]]
    assert names == ["1-9", "10-99", "100 and more", "1-9", "never"]


def test_ngrams_that_do_not_fit_are_refused():
    assert count_ngrams(np.array([6999] * 4), 3, base=7000).keys_K.tolist() == [7000**3 - 1]
    with pytest.raises(DataError, match="order=7"):
        count_ngrams(np.array([1, 2]), 7, base=99_092)
    with pytest.raises(DataError, match="below base=7"):
        count_ngrams(np.array([7, 2]), 2, base=7)
    assert count_ngrams(np.array([1]), 2, base=7).of(np.array([1, 2, 3])).tolist() == [0, 0, 0]


def test_bands_have_means_and_standard_errors():
    losses, where = np.array([1.0, 3.0, 5.0, 9.0, 100.0]), np.array([0, 0, 1, 3, -1], np.int8)
    rows = loss_by_band(losses, where)
    assert [row["band"] for row in rows] == list(BANDS)
    assert [row["tokens"] for row in rows] == [2, 1, 0, 1]
    assert [row["mean"] for row in rows] == [2.0, 5.0, None, 9.0]
    assert rows[0]["standard_error"] == pytest.approx(1.0)
    assert [row["standard_error"] for row in rows[1:]] == [None, None, None]
    # With one checkpoint over these two tokens, with three over checkpoints.
    assert half(rows[0], 1) == pytest.approx(12.706, rel=1e-4)
    assert half(rows[0], 3) == pytest.approx(4.303, rel=1e-4)
    assert half(rows[1], 3) is None


@pytest.mark.parametrize("streams", [1, 4])
def test_samples_are_greedy_and_do_not_depend_on_their_batch(canonical, tokenizer, streams):
    model = build(canonical, streams)
    together = samples(model, tokenizer, ["New York is", "The"], tokens=6)
    alone = [samples(model, tokenizer, [prompt], tokens=6)[0] for prompt in ("New York is", "The")]
    assert together == alone
    ids = [0, *tokenizer("The")["input_ids"]]
    for _ in range(6):
        ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
    assert "The" + together[1]["text"] == tokenizer.decode(ids[1:]) and not together[1]["ended"]


def log(model) -> TrainingLog:
    record = ledger(model.config, 64).to_dict()
    record["components"][0]["name"] = "embedding <b>"
    return TrainingLog(
        ledger=record | {"p_tot": 1_310_720, "p_act": 65_536, "flops_per_token": 131_072},
        curve=[{"step": i, "tokens": i * 64, "loss": 9 - i / 99} for i in range(1, 200)],
        validation=[{"step": i, "tokens": i * 64, "loss": 9 - i / 99, "bpb": 3} for i in (99, 199)],
        tokens_per_second=12_345.6,
        seconds=66.0,
    )


@pytest.fixture(scope="module")
def results(canonical, tokenizer) -> DemoResults:
    moe, engram = build(canonical, 4, memory=False), build(canonical, 4)
    texts = corpus.documents("validation")[:60]
    found = Material(
        text=HOSTILE,
        **encoded(((text, True) for text in texts), tokenizer, 2_001),
        corpus="20,000 <b>tokens",
        corpus_C=corpus.tokens("validation", 20_000).ids.astype(np.int64),
        context=64,
    )
    return compare(
        Arm(name="MoE", model=moe, log=log(moe)),
        Arm(name="Engram", model=engram, log=log(engram)),
        tokenizer,
        found,
        seed=7,
        command="engram demo --out 'runs/<b>'",
        settings={"data": HOSTILE, "training tokens": 12_736, "learning rate": 3e-3},
        machine={"cpu": "two <cores>", "torch": "2.13"},
        sample_tokens=4,
    )


def test_a_comparison_agrees_with_its_parts(results, canonical, tokenizer):
    texts = corpus.documents("validation")[:60]
    ids = encoded(((text, True) for text in texts), tokenizer, 2_001)["ids_T"][: 31 * 64 + 1]
    losses = {
        "Engram": token_losses(build(canonical, 4), ids, context=64, batch=5),
        "MoE": token_losses(build(canonical, 4, memory=False), ids, context=64, batch=5),
    }
    size = corpus.token_bytes()[ids[1:]].sum()
    for name, losses_T in losses.items():
        found = results.losses[name]
        assert found.loss == pytest.approx(losses_T.mean(dtype=float), rel=1e-6)
        assert found.bpb == pytest.approx(losses_T.sum(dtype=float) / math.log(2) / size, rel=1e-6)
    gap = losses["Engram"].astype(float) - losses["MoE"]
    assert results.bands.difference_mean == pytest.approx(gap.mean(), abs=1e-6)
    error = gap.reshape(31, 64).mean(1).std(ddof=1) / math.sqrt(31)
    assert results.bands.difference_error == pytest.approx(error, rel=1e-4)
    for order, rows in zip(results.bands.orders, results.bands.difference_bands, strict=True):
        assert sum(row["tokens"] for row in rows) == 31 * (64 - (order - 1))
    gates = results.analysis.gates
    assert [trace.text for trace in gates.traces] == list(SENTENCES)
    assert [sample["prompt"] for sample in results.samples["MoE"]] == list(PROMPTS)
    place = gates.traces[2].tokens.index(" a")
    assert gates.traces[2].counts[0][place] > 100  # " is a" stands in many a definition


def test_a_model_from_disk_gives_the_same_logits_and_says_what_it_took(results):
    disk = results.disk
    assert disk.equal_logits and disk.tokens == 3 * 8 * 64
    # 2 layers of 2 x 2 heads over 50 rows or some more, 8 float32 values each.
    assert disk.table_bytes > 2 * 4 * 50 * 8 * 4 and disk.budget_bytes == disk.table_bytes // 4
    assert 0 < disk.hits < disk.rows_asked < disk.tokens * 2 * 4
    assert disk.bytes_read >= 4096 and disk.wait_ms > 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_from_disk_computes_with_the_same_kernels(canonical, attention):
    model = build(canonical, 1)
    model.set_attn_implementation(attention)
    model.set_experts_implementation("eager" if attention == "eager" else "grouped_mm")
    ids = corpus.tokens("validation", 2_000, seed=1).ids
    assert from_disk(model, ids, context=64, batch=8, autocast=torch.bfloat16).equal_logits


def test_logits_that_differ_are_told(results, tmp_path):
    bad = replace(results, disk=replace(results.disk, equal_logits=False))
    assert "the logits were NOT the same" in write_demo_report(tmp_path, bad).read_text("utf-8")


class Balance(HTMLParser):
    """Fails on a tag that is not closed in order, on an id used twice, and on anything loaded."""

    VOID = frozenset({"meta", "input", "wbr", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            assert name not in ("src", "srcset", "data") and not name.startswith("on")
            assert not (name.endswith("href") and not value.startswith("#"))
            if name == "id":
                assert value not in self.ids
                self.ids.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(results, tmp_path_factory):
    hostile = [{"prompt": HOSTILE, "text": "</div><script>", "ended": True}]
    bad = {**results.samples, "MoE": hostile * len(PROMPTS)}
    return write_demo_report(tmp_path_factory.mktemp("report"), replace(results, samples=bad))


def test_the_report_is_well_formed_and_loads_nothing(page):
    html = page.read_text(encoding="utf-8")
    balance = Balance()
    balance.feed(html)
    balance.close()
    assert balance.open == []
    assert balance.tags.count("script") == 1 and balance.tags.count("svg") == 21
    assert not re.search(r"https?:|url\((?!#)|@import|<link|<iframe|\x00", html)
    assert html.count("&lt;script&gt;alert(") >= len(PROMPTS)


def test_the_report_shows_every_arm_sentence_number_and_figure(page, results):
    html = page.read_text(encoding="utf-8")
    for losses in results.losses.values():
        assert f'<td class="n">{losses.loss:.4f}' in html
        assert f'<td class="n">{losses.bpb:.4f}' in html
    for text in ("Engram, memory off", "1,310,720", "two &lt;cores&gt;", "embedding &lt;b&gt;"):
        assert text in html
    assert "the logits were the same, bit for bit" in html
    assert f"{results.disk.rows_asked:,}</td>" in html
    assert html.count('class="tokens"') == html.count('class="tokens change"') == len(SENTENCES)
    assert html.count('type="radio"') == 2 + 2 * 4
    drawn = sorted(path.name for path in (page.parent / "figures").iterdir())
    assert len(drawn) == 42 and all(name.endswith((".png", ".svg")) for name in drawn)


def test_results_survive_their_json_file(page, results, tmp_path):
    results.save(tmp_path / "results.json")
    assert DemoResults.load(tmp_path / "results.json") == results
    record = json.loads((page.parent / "report.json").read_text(encoding="utf-8"))
    assert record["engram"] == asdict(results)["engram"]
    with pytest.raises(DataError, match=r"none\.json"):
        DemoResults.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"moe": {}}')
    with pytest.raises(DataError, match=r"half\.json"):
        DemoResults.load(tmp_path / "half.json")


@pytest.mark.parametrize(
    ("nats", "bpb", "words"),
    [
        (-0.1, -0.03, ["better", "0.100 nats", "0.030 bits per byte lower", "more seeds"]),
        (-0.01, -0.004, ["better", "not a claim", "tie"]),
        (0.1, 0.03, ["worse", "0.030 bits per byte higher", "more seeds"]),
    ],
)
def test_the_verdict_says_what_the_numbers_say(results, nats, bpb, words):
    moe = results.losses["MoE"]
    losses = {
        **results.losses,
        "Engram": replace(results.losses["Engram"], loss=moe.loss + nats, bpb=moe.bpb + bpb),
    }
    bands = replace(results.bands, losses=losses, difference_mean=nats)
    changed = replace(results, analysis=replace(results.analysis, bands=bands))
    text = " ".join(verdict(changed))
    assert all(word in text for word in words)
    assert "budgets are not equal" not in text


def test_the_verdict_warns_of_unequal_budgets(results):
    record = {**results.engram.log.ledger, "p_tot": 1_400_000}
    engram = replace(results.engram, log=replace(results.engram.log, ledger=record))
    assert "not equal" in verdict(replace(results, engram=engram))[-1]
    assert "+6.81%" in verdict(replace(results, engram=engram))[-1]


def test_tokens_show_what_cannot_be_seen(canonical, tokenizer):
    assert visible(" <") == "<i>·</i>&lt;"
    assert visible("\x00\u200d") == "<i>U+0000</i><i>U+200D</i>" and visible("\u0301")[0] == "◌"
    html = coloured(gate_trace(build(canonical, 4), tokenizer, "A🜁B " + HOSTILE))
    assert html.count('class="part"') == 2 * 3 and "🜁" in html
    assert "<script" not in html and "\x00" not in html
    balance = Balance()
    balance.feed(html)
    assert balance.open == []
