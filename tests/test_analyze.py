"""The parts of an analysis: each number against a direct computation or a planted answer."""

import contextlib
import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import bare, memory, speak
from rich.console import Console
from test_analysis import HOSTILE, Balance, build, hooks

import engram_lm
from engram_lm import corpus
from engram_lm.analysis import ablation, alignment
from engram_lm.analysis.analyze import DEFAULT, PARTS, WITHOUT_MEMORY, Subject, analyze, assemble
from engram_lm.analysis.band_findings import band_findings, error, seeds_by_band
from engram_lm.analysis.bands import BANDS
from engram_lm.analysis.cka import alignment_index
from engram_lm.analysis.escape import escape
from engram_lm.analysis.findings import Analysis
from engram_lm.analysis.gate_scores import gate_scores, ranked
from engram_lm.analysis.gates import AT_ONCE, LONG, gate_trace, stream_gates
from engram_lm.analysis.logit_lens import logit_lens
from engram_lm.analysis.material import Material, encoded, stream
from engram_lm.analysis.measure import measure
from engram_lm.analysis.measured import Measured
from engram_lm.analysis.report import verdict, write_report
from engram_lm.analysis.suite_ablation import WHOLE, suite_ablation
from engram_lm.analysis.token_html import coloured
from engram_lm.cli.analysis_tables import show
from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluate.suite_scores import SuiteScore, suite_scores
from engram_lm.evaluate.suites.mqar import Induction
from engram_lm.evaluate.token_losses import token_losses
from engram_lm.model import EngramLMForCausalLM
from engram_lm.model.presets import configure

ALONE = tuple(part for part in PARTS if part != "alignment")
SENTENCES = ("New York is a city.", "世界 👩🏽‍🚀!", HOSTILE, "word " * 300)


@pytest.fixture(scope="module")
def material(tokenizer) -> Material:
    texts = [(text, True) for text in corpus.documents("validation")[:60]]
    return Material(
        text=HOSTILE,
        **encoded(texts, tokenizer, 1_500),
        corpus="some <b>documents",
        **stream(texts, tokenizer),
        sentences=SENTENCES,
        context=64,
        suites=(Induction(vocabulary=100, length=24, stretch=6),),
        questions=6,
    )


@pytest.fixture(scope="module")
def subject(canonical) -> Subject:
    second = build(canonical)
    with torch.no_grad():
        for weight in second.parameters():
            weight.mul_(1.1)
    return Subject(name="<i>Engram", models=[build(canonical), second])


@pytest.fixture(scope="module")
def other(canonical) -> Subject:
    plain = build(canonical, memory=False)
    second = build(canonical, memory=False)
    with torch.no_grad():
        for weight in second.parameters():
            weight.mul_(0.9)
    return Subject(name="MoE", models=[plain, second])


@pytest.fixture(scope="module")
def found(subject, other, tokenizer, material) -> Analysis:
    return analyze(subject, tokenizer, material, against=other, parts=PARTS)


def test_a_gate_that_follows_the_counts_has_an_auroc_of_one():
    drawn = np.random.default_rng(1)
    counts = drawn.integers(0, 20, (4, 30))
    gates = np.stack([counts / 20, 1 - counts / 20, np.full((4, 30), 0.5)], axis=-1)[None]
    names = np.zeros((4, 30), dtype=bool)
    names[:, 7] = True
    since = np.tile(np.arange(30), (4, 1))
    scores = gate_scores([3], gates.astype(np.float32), [counts, counts], names, since)
    assert [(score["stream"], score["order"]) for score in scores] == [
        (stream, order) for stream in range(3) for order in (2, 3)
    ]
    told = [score["auroc_frequent"]["mean"] for score in scores]
    assert told == [1, 1, 0, 0, 0.5, 0.5]
    assert scores[0]["frequent"] == (counts[:, 1:] >= 10).sum()
    assert scores[1]["frequent"] == (counts[:, 2:] >= 10).sum()
    assert scores[0]["gate_names"] == pytest.approx((counts[:, 7] / 20).mean())
    without = gate_scores([3], gates.astype(np.float32), [], names & False, since)
    assert without[0]["auroc_frequent"] is without[0]["auroc_names"] is None
    # Where a document starts, memory reads padding: such gates are neither frequent nor others.
    since[:, 10:] = np.arange(20)
    counts[:, 10:12], gates[0, :, 10:12] = 0, 1
    apart = gate_scores([3], gates.astype(np.float32), [counts, counts], names, since)
    assert apart[1]["auroc_frequent"]["mean"] == 1 > apart[0]["auroc_frequent"]["mean"]


def test_ngrams_are_ranked_by_the_mean_of_their_gates(canonical, tokenizer):
    model = build(canonical)
    text = " red green blue one two three red green blue four red green blue five one two three"
    text += " one two three"
    ids = np.array([[0, *tokenizer(text)["input_ids"]]])
    tokens = [tokenizer.decode(i) for i in ids[0]]
    gates = np.zeros((2, 1, ids.shape[1], 1), dtype=np.float32)
    places = [at for at, token in enumerate(tokens) if token == " blue"]
    for at, value in zip(places, (0.2, 0.4, 0.9), strict=True):
        gates[:, 0, at] = value
    highest, lowest = ranked(model, tokenizer, ids, gates, 2 * gates, None)
    assert highest[0] == {
        "ngram": " red green blue",
        "times": 3,
        "in_corpus": None,
        "gate": pytest.approx(0.5),
        "added": pytest.approx(1.0),
    }
    assert [each["ngram"] for each in lowest] == [" one two three"]


def test_streamed_gates_are_those_of_single_traces(canonical, tokenizer):
    model = build(canonical, 4)
    texts = ["New York is", "A dog barks"]
    traces = [gate_trace(model, tokenizer, text) for text in texts]
    ids = np.array([trace.ids[:4] for trace in traces])
    gates, added = stream_gates(model, ids, batch=1)
    for window, trace in enumerate(traces):
        np.testing.assert_allclose(gates[:, window], trace.gates_LTS[:, :4], atol=1e-6)
        np.testing.assert_allclose(added[:, window], trace.contributions_LTS[:, :4], rtol=1e-5)


def test_a_trace_has_losses_with_memory_and_without(canonical, tokenizer):
    model = build(canonical).eval()
    trace = gate_trace(model, tokenizer, "New York is a city")
    ids = torch.tensor([trace.ids])
    for losses, off in ((trace.losses, False), (trace.losses_off, True)):
        with model.model.without_memory() if off else torch.no_grad():
            logs = model(ids).logits[0].detach().double().log_softmax(-1)
        wanted = [-float(logs[at, token]) for at, token in enumerate(trace.ids[1:])]
        assert losses[0] is None and losses[1:] == pytest.approx(wanted, abs=1e-5)
    assert trace.losses != trace.losses_off
    assert trace.rows == model.model.addresses.rows(ids)[:, 0].tolist()


def test_a_token_is_switched_off_alone(canonical, tokenizer):
    model = build(canonical).eval()
    trace = gate_trace(
        model, tokenizer, "New York is a city in the United States of America, he said to her"
    )
    assert len(trace.ids) > AT_ONCE  # more than one batch
    ids = torch.tensor([trace.ids])

    def loss(without: int | None) -> float:
        def off(_module, _inputs, fused):
            if without is not None:
                fused.update_BTSD[:, without] = 0
            return fused

        with contextlib.ExitStack() as stack, torch.no_grad():
            for layer in trace.layers:
                stack.enter_context(model.model.layers[layer].engram.register_forward_hook(off))
            logs = model(ids).logits[0].double().log_softmax(-1)
        return -float(logs[range(len(trace.ids) - 1), trace.ids[1:]].sum())

    wanted = [loss(token) - loss(None) for token in range(len(trace.ids) - 1)]
    assert trace.alone[:-1] == pytest.approx(wanted, abs=1e-4) and trace.alone[-1] is None
    assert max(map(abs, wanted)) > 0.01
    long = gate_trace(model, tokenizer, "word " * LONG)
    assert set(long.alone) == {None}


def test_a_token_says_its_rows_and_who_else_reads_them(found):
    trace = found.gates.traces[0]
    html = coloured(trace)
    place, layer = trace.tokens.index(" York"), trace.layers[0]
    rows, sharers = trace.rows[0][place][:2], trace.sharers[0][place][:2]
    seen = trace.counts[0][place] > 0
    said = (
        f"layer {layer}, 2-gram reads rows {rows[0]:,}, {rows[1]:,} (other n-grams on them: "
        f"{sharers[0] - seen}, {sharers[1] - seen}); "
        f"value of length {trace.values[0][place][0]:.2f} of the whole of 1"
    )
    assert said in html
    shown = trace._repr_html_()  # in a notebook
    assert escape(said) in shown and shown.count("<span") == len(trace.tokens)
    balance = Balance()
    balance.feed(found.gates.traces[2]._repr_html_())  # a hostile text
    assert balance.open == [] and "script" not in balance.tags
    change = trace.losses_off[place] - trace.losses[place]
    assert f"{change:+.3f}".replace("-", "\u2212") in html
    assert re.search(rf"--{'up' if change > 0 else 'down'}:{min(1, abs(change) / 3):.3f}", html)


def test_values_are_those_of_each_order_alone(canonical, tokenizer):
    model = build(canonical)
    trace = gate_trace(model, tokenizer, "New York is a city.")
    fuse = model.model.layers[2].engram
    vectors = []
    hook = fuse.register_forward_hook(lambda _m, inputs, _f: vectors.append(inputs[1]))
    with hook, torch.no_grad():
        model(torch.tensor([trace.ids]))
    weight, half = fuse.kv.weight[-fuse.width :].detach().double(), vectors[0].shape[-1] // 2
    for token, (second, third) in enumerate(trace.values[1]):
        vector = vectors[0][0, token].double()
        whole = (weight @ vector).norm()
        assert second == pytest.approx(float((weight[:, :half] @ vector[:half]).norm() / whole))
        assert third == pytest.approx(float((weight[:, half:] @ vector[half:]).norm() / whole))
    with torch.no_grad():
        fuse.kv.weight[-fuse.width :] = 0
    nothing = gate_trace(model, tokenizer, "New York")
    assert set(itertools.chain(*nothing.values[1])) == {0.0}


def test_bands_of_several_checkpoints_have_errors_over_them():
    losses = np.array([[1.0, 2.0, 6.0, 8.0], [2.0, 4.0, 7.0, 9.0]])
    bands = np.array([0, 0, 1, -1], dtype=np.int8)
    rows = seeds_by_band(losses, np.stack([bands, bands]))
    assert [row["mean"] for row in rows] == [2.25, 6.5, None, None]
    assert rows[0]["standard_error"] == pytest.approx(0.75)  # of 1.5 and 3
    assert seeds_by_band(losses[:1], bands[None])[0]["standard_error"] == pytest.approx(0.5)
    # Each checkpoint's tokens are in the bands of what it was trained on.
    apart = np.stack([bands, np.array([1, 0, 1, 1], dtype=np.int8)])
    assert [row["mean"] for row in seeds_by_band(losses, apart)][:2] == [2.75, 6.0]
    assert error(losses, 2) == pytest.approx(abs(5.5 - 4.25) / 2)
    assert error(losses[:1], 2) == pytest.approx((7 - 1.5) / 2)
    made = band_findings(
        {"a": losses, "b": losses - [[1.0], [3.0]]}, [2], apart[:, None], text_bytes=10, context=2
    )
    assert made.difference == "a \N{MINUS SIGN} b"
    assert made.difference_mean == pytest.approx(2)
    assert made.difference_error == pytest.approx(1)
    assert made.losses["a"].bpb == pytest.approx(losses.mean(0).sum() / np.log(2) / 10)


def test_rotated_copies_align_with_themselves_and_the_null_is_of_two_seeds():
    drawn = torch.Generator().manual_seed(0)
    one = torch.randn(3, 128, 16, generator=drawn)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=drawn)).Q
    other = torch.randn(3, 128, 16, generator=drawn)
    made = alignment.align("A", [one, other], "B", [2 * one @ turn], "here")
    assert made.inputs == 128 and made.neighbours == 3
    assert len(made.index) == len(made.null_index) == 2
    own = alignment.compared(one, one @ turn)
    assert torch.allclose(own.diagonal(), torch.ones(3, dtype=torch.float64), atol=1e-6)
    far = alignment.compared(one, other)
    assert far.abs().max() < 0.2  # independent, 128 of them in 16 dimensions
    across = (own + alignment.compared(other, one)) / 2
    assert np.array(made.across) == pytest.approx(across.numpy(), abs=1e-6)
    both = (far + far.T) / 2  # each is once the one whose blocks are rows
    assert np.array(made.null) == pytest.approx(both.numpy(), abs=1e-6)
    assert alignment.align("A", [one], "B", [one @ turn], "here").null is None


def test_states_are_those_of_the_blocks_at_the_places(canonical, material):
    model = build(canonical).eval()
    places, where = alignment.places(material)
    assert where == "every 8th token" and len(places) % alignment.BATCH == 0
    picked = places[[0, 20, 40, 60]]
    states = alignment.states(model, material.windows_NT, picked, batch=2)
    for at, (window, position) in enumerate(picked):
        ids = torch.from_numpy(material.windows_NT[window, : position + 1])[None]
        hidden = model(ids, output_hidden_states=True).hidden_states
        for layer in range(2):  # the last one's is normalised there
            assert torch.allclose(states[layer, at], hidden[layer + 1][0, -1], atol=1e-4)


def test_an_index_is_read_against_the_null_in_the_same_checkpoint():
    drawn = torch.Generator().manual_seed(0)
    first, second = (
        [torch.randn(6, 128, 16, generator=drawn) for _ in range(many)] for many in (3, 2)
    )
    found = alignment.align("a", first, "b", second, "everywhere")

    def index(reference: int, other: torch.Tensor) -> torch.Tensor:
        return alignment_index(alignment.compared(first[reference], other))

    for seed, above in enumerate(found.above):
        null = torch.stack([index(seed, first[rest]) for rest in range(3) if rest != seed])
        own = torch.stack([index(seed, each) for each in second])
        assert above == pytest.approx((own.mean(0) - null.mean(0)).tolist(), abs=1e-12)
    assert len(found.above) == 3 and len(found.index) == len(found.null_index) == 6
    # The second is the first's own other checkpoints: nothing is above.
    same = alignment.align("a", first[:2], "b", [first[1], first[0]], "everywhere")
    assert same.null_index == [same.index[0], same.index[3]]
    assert alignment.align("a", first[:1], "b", second[:1], "everywhere").above == []


def test_the_lens_is_read_with_memory_off_as_well(found, subject, material):
    lens = found.lens["<i>Engram, memory off"]
    assert set(lens.at) == {"block"} and "MoE, memory off" not in found.lens
    wanted = []
    for model in subject.models:
        with model.model.without_memory():
            wanted.append(logit_lens(model, material.windows_NT).normed["final_to_layer"])
    means = [each["mean"] for each in lens.normed["final_to_layer"]]
    assert means == pytest.approx(np.mean(wanted, axis=(0, 2)).tolist())


def test_suites_are_asked_with_each_part_off(canonical, tokenizer):
    model = build(canonical)
    suite = Induction(vocabulary=100, length=24, stretch=6)
    told: list[str] = []
    rows = suite_ablation(model, tokenizer, [suite], questions=8, progress=told.append)
    assert [row["part"] for row in rows][:4] == [WHOLE, "memory off", "layer 0 off", "layer 2 off"]
    assert told[0] == "induction, as it is" and len(told) == len(rows)
    off = rows[1]
    with model.model.without_memory():
        (direct,) = suite_scores(model, tokenizer, suite, questions=8)
    assert off["value"] == direct.mean and off["questions"] == 8
    assert not any("head" in row["part"] for row in rows)
    every = suite_ablation(model, tokenizer, [suite], questions=8, heads=True)
    assert len(every) == len(rows) + 4 and every[6]["part"] == "order 2, head 0 off"
    with ablation.heads_off(model, [0]):
        (direct,) = suite_scores(model, tokenizer, suite, questions=8)
    assert every[6]["value"] == direct.mean


def test_a_planted_score_is_retained_as_far_as_it_was(monkeypatch, canonical, tokenizer):
    model = build(canonical)

    def planted(*_arguments, **_options):
        right = 0.4 if next(calls) else 0.8
        return [
            SuiteScore(
                suite="induction", kind="k", metric="right", chance=0.3, values_N=np.full(4, right)
            )
        ]

    calls = itertools.count()  # the first is the model as it is
    monkeypatch.setattr("engram_lm.analysis.suite_ablation.suite_scores", planted)
    monkeypatch.setattr(
        "engram_lm.analysis.ablation.mean_gates", lambda _model: contextlib.nullcontext({})
    )
    rows = suite_ablation(model, tokenizer, [Induction()], questions=4)
    assert rows[0]["retained"] == rows[0]["above_chance"] == 1
    assert rows[1]["retained"] == pytest.approx(0.5)
    assert rows[1]["above_chance"] == pytest.approx(0.2)


# The whole


def test_an_analysis_has_every_part_and_survives_its_file(found, tmp_path):
    assert found.checkpoints == 2
    assert list(found.seconds) == list(PARTS)
    assert [len(scores) for scores in found.gates.scores] == [4, 4]
    lens = found.lens["MoE"]
    assert lens.normed["final_to_layer"][-1]["mean"] == 0
    assert all(row["low"] <= row["mean"] <= row["high"] for row in lens.normed["loss"])
    assert found.bands.difference == "<i>Engram \N{MINUS SIGN} MoE"
    assert len(found.addresses) == 4 and len(found.ablation) == len(found.suites) == 2
    assert found.alignment.null is not None
    off = found.bands.losses["<i>Engram, memory off"]
    for checkpoint, parts in enumerate(found.ablation):
        assert parts[0].name == "memory off"
        whole = found.bands.losses["<i>Engram"].by_checkpoint[checkpoint]
        assert parts[0].change == pytest.approx(off.by_checkpoint[checkpoint] - whole, abs=1e-6)
    found.save(tmp_path / "a.json")
    assert Analysis.load(tmp_path / "a.json") == found
    (tmp_path / "half.json").write_text("{}")
    with pytest.raises(DataError, match=r"half\.json"):
        Analysis.load(tmp_path / "half.json")


def test_what_was_measured_survives_its_file_and_makes_the_same_analysis(
    found, subject, other, tokenizer, material, canonical, tmp_path
):
    counts = material.counts(canonical, 3)
    measured = {
        each.name: [
            measure(
                model,
                tokenizer,
                material,
                canonical.ids_V.numpy(),
                counts,
                parts,
                traced=number == 0,
            )
            for number, model in enumerate(each.models)
        ]
        for each, parts in ((subject, PARTS), (other, WITHOUT_MEMORY))
    }
    again: dict[str, list[Measured]] = {}
    for name, checkpoints in measured.items():
        for number, checkpoint in enumerate(checkpoints):
            path = tmp_path / f"{len(again)}-{number}.safetensors"
            checkpoint.save(path)
            again.setdefault(name, []).append(Measured.load(path))
            assert torch.equal(again[name][-1].states_AID, checkpoint.states_AID.half().float())
            again[name][-1].states_AID = checkpoint.states_AID
    made = assemble(again, material, [2, 3])
    assert {**vars(made), "seconds": 0} == {**vars(found), "seconds": 0}
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match=r"bad\.safetensors: nothing measured"):
        Measured.load(tmp_path / "bad.safetensors")


def test_what_stands_behind_plus_or_minus_is_students_interval(found, capsys):
    bands = found.bands
    half = 12.7062 * bands.difference_error  # of two seeds
    assert found.difference_half == pytest.approx(half, rel=1e-5)
    assert f"± {half:.3f}, 95 % over seeds" in " ".join(verdict(found))
    for errors, apart in ((5, False), (20, True)):  # both more than two standard errors
        gap = replace(bands, difference_mean=errors * bands.difference_error)
        said = verdict(replace(found, bands=gap))[0]
        assert ("is not told apart" not in said) is apart
    show(found, Console(width=200))
    out = capsys.readouterr().out
    assert f"± {half:.4f}" in out
    assert "±: 95 % of the mean over 2 seeds (Student's t)" in out
    # One checkpoint: over windows, and said.
    one = replace(found, checkpoints=1)
    assert one.difference_half == pytest.approx(1.96 * bands.difference_error, rel=0.15)
    assert "95 % over windows of the text" in verdict(one)[0]


def test_one_checkpoint_is_called_one_seed(subject, other, tokenizer, material, tmp_path):
    alone = Subject(name="one", models=subject.models[:1])
    rival = Subject(name="rival", models=other.models[:1])
    made = analyze(alone, tokenizer, material, against=rival, parts=("bands", "alignment"))
    assert made.alignment.null is None and made.gates is None
    html = write_report(tmp_path, made, command="x", about={}).read_text()
    assert "one seed" in html and "nothing can be concluded" in html
    assert "One seed" in verdict(made)[-1]


def test_analysing_changes_nothing_and_leaves_no_hook(subject, tokenizer, material, monkeypatch):
    model = subject.models[0].train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    count = hooks(model)
    analyze(Subject(name="m", models=[model]), tokenizer, material, parts=ALONE)
    assert model.training and hooks(model) == count
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    for part in (*DEFAULT, "ablation", "suites"):
        with monkeypatch.context() as patch:
            patch.setattr(model.model.norm, "forward", lambda _: 1 / 0)
            if part == "addresses":
                continue  # runs no model
            with pytest.raises(ZeroDivisionError):
                analyze(Subject(name="m", models=[model]), tokenizer, material, parts=[part])
        assert hooks(model) == count and model.training
        assert "read" not in model.model.__dict__


def test_disk_tables_and_attached_models_are_analysed_alike(
    canonical, tokenizer, tmp_path, material
):
    build(canonical).save_pretrained(tmp_path)
    # Both from the files: weights that lie elsewhere in memory may give another last bit.
    opened = EngramLMForCausalLM.from_pretrained(tmp_path)
    disk = EngramLMForCausalLM.from_pretrained(tmp_path, memory="disk", memory_budget="200kB")
    parts = (*DEFAULT, "ablation")
    results = [
        analyze(Subject(name="m", models=[each]), tokenizer, material, parts=parts)
        for each in (opened, disk)
    ]
    disk.model.served.close()
    first, second = ({**vars(each), "seconds": None} for each in results)
    assert first == second
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": None}
    attached = engram_lm.attach(bare("llama", **sizes), canonical, memory())
    speak(attached)
    made = analyze(Subject(name="a", models=[attached]), tokenizer, material)
    assert made.gates is not None and made.addresses and made.lens is not None


def test_documents_are_kept_apart_for_a_model_trained_so(canonical, tokenizer, material):
    model = build(canonical).eval()
    crossing = analyze(Subject(name="m", models=[model]), tokenizer, material, parts=["bands"])
    assert not crossing.apart
    rule = {"memory.specification.boundary_rule": "document"}
    apart = type(model)(configure(model.config, rule))
    apart.set_canonical_map(canonical)
    with torch.no_grad():
        for weight, same in zip(apart.parameters(), model.parameters(), strict=True):
            weight.copy_(same)
    made = analyze(
        Subject(name="m", models=[apart]), tokenizer, material, parts=(*DEFAULT, "ablation")
    )
    assert made.apart
    ids_T = material.stream_T
    starts_T = ids_T == 0
    losses = token_losses(apart, ids_T, context=64, batch=4, starts_T=starts_T)
    assert made.bands.losses["m"].loss == pytest.approx(losses.mean(dtype=float), rel=1e-6)
    assert made.bands.losses["m"].loss != crossing.bands.losses["m"].loss
    # In a band is what has a whole bigram of its own document before it.
    begins = [at for at in range(len(ids_T) - 1) if at % 64 == 0 or starts_T[at]]
    tokens = sum(row["tokens"] for row in made.bands.losses["m"].bands[0])
    assert tokens == len(ids_T) - 1 - len(begins)
    lens = made.lens["m"]
    windows = replace(material, apart=True)
    # Nor does a gate count as of a frequent n-gram, or of another, whose n-gram is padding.
    (bigrams,) = material.counts(canonical, 2)
    canonical_NT = canonical.ids_V.numpy()[material.windows_NT[:, :-1]]
    often = np.stack([bigrams.of(canonical_T) for canonical_T in canonical_NT]) >= 10
    whole = windows.positions_NT >= 1
    assert made.gates.scores[0][0]["frequent"] == (often & whole).sum() < often.sum()
    direct = logit_lens(apart, windows.windows_NT, positions_NT=windows.positions_NT)
    assert [each["mean"] for each in lens.normed["loss"]] == pytest.approx(
        direct.normed["loss"].mean(axis=1).tolist()
    )


def test_numbers_that_are_not_finite_are_refused(canonical, tokenizer, material):
    model = build(canonical)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    for part in ("gates", "lens", "bands", "ablation", "suites"):
        with pytest.raises(DataError, match="not finite numbers"):
            analyze(Subject(name="m", models=[model]), tokenizer, material, parts=[part])


@pytest.mark.parametrize("name", ["a$b_{$c", "_hidden", "模型", "m[red]x", "\\frac"])
def test_any_name_can_be_drawn(found, tmp_path, name, capsys):
    lens = {name: found.lens["<i>Engram"], "MoE": found.lens["MoE"]}
    bands = found.bands
    losses = {**bands.losses, name: bands.losses["<i>Engram"]}
    bands = replace(bands, losses=losses, difference=f"{name} - MoE")
    changed = replace(found, name=name, lens=lens, bands=bands)
    assert write_report(tmp_path, changed, command="x", about={}).exists()
    show(changed, Console())
    assert name in capsys.readouterr().out


def test_what_cannot_be_done_is_refused_in_one_line(subject, other, tokenizer, material):
    with pytest.raises(ConfigError, match="there are gates, lens"):
        analyze(subject, tokenizer, material, parts=["gate"])
    for name, many, said in (("x", 1, "as many checkpoints"), ("<i>Engram", 2, "both models")):
        rival = Subject(name=name, models=other.models[:many])
        with pytest.raises(ConfigError, match=said):
            analyze(subject, tokenizer, material, against=rival)
    with pytest.raises(ConfigError, match="context=9999: "):
        analyze(subject, tokenizer, replace(material, context=9_999))
    with pytest.raises(ConfigError, match="gates: a memory is needed"):
        analyze(other, tokenizer, material, parts=["gates"])
    with pytest.raises(ConfigError, match="alignment: a model to compare with"):
        analyze(subject, tokenizer, material, parts=["alignment"])


@pytest.fixture(scope="module")
def page(found, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    return write_report(out, found, command="$ engram <x>", about={"cpu": "<two>"})


def test_the_page_says_what_its_intervals_are(page):
    html = page.read_text()
    assert "half the 95 % interval over 2 seeds (Student's t)" in html.replace("\n", " ")
    assert html.count("95 % of the mean over 2 seeds") >= 3  # gates, alignment, ablation
    assert "standard error" not in html and "lowest and highest" not in html


def test_the_report_is_well_formed_loads_nothing_and_shows_each_part(page, found):
    html = page.read_text(encoding="utf-8")
    balance = Balance()
    balance.feed(html)
    balance.close()
    assert balance.open == [] and balance.tags.count("script") == 1
    assert not re.search(r"https?:|url\((?!#)|@import|<link|<iframe|\x00", html)
    assert html.count("&lt;script&gt;alert(") >= 2  # the text's name and a sentence
    for part in PARTS:
        assert f'<section id="{part}">' in html
    drawn = sorted(path.name for path in (page.parent / "figures").iterdir())
    assert len(drawn) == 2 * balance.tags.count("svg") > 0
    assert "世" in html and "2 seeds" in html
    for band in BANDS:
        assert band in html
    mean = np.mean([parts[0].change for parts in found.ablation])
    assert f'<td class="n">{mean:+.4f} ('.replace("-", "\N{MINUS SIGN}") in html
