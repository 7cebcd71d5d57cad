"""An inspection's rows, norms, sharers and effects, each against a direct computation."""

import json

import numpy as np
import pytest
import torch
from families import bare, memory, speak
from test_analysis import HOSTILE, build

import engram_lm
from engram_lm import EngramLMForCausalLM, corpus
from engram_lm.analysis.ablation import altered
from engram_lm.analysis.gate_text import colour, gate_text
from engram_lm.analysis.gates import gate_trace
from engram_lm.analysis.inspect import RAISED, inspect
from engram_lm.analysis.row_sharing import RowSharing
from engram_lm.cli import main
from engram_lm.errors import ConfigError
from engram_lm.memory.canonical import CanonicalMap

TEXT = "Alexander the Great"


@pytest.fixture(scope="module", params=[1, 4])
def model(request):
    return build(CanonicalMap.from_tokenizer(corpus.tokenizer_file()), streams=request.param)


def test_rows_norms_and_canonical_ids_are_those_of_the_tables(model, tokenizer):
    found = inspect(model, tokenizer, TEXT)
    ids = torch.tensor([found.trace.ids])
    addresses = model.model.addresses
    assert found.canonical_ids == addresses.canonical.ids_V[ids[0]].tolist()
    rows = addresses.rows(ids)[:, 0]
    assert found.trace.rows == rows.tolist()
    for place, layer in enumerate(addresses.layers):
        wanted = model.model.tables[str(layer)].weight[rows[place]].detach().norm(dim=-1)
        assert torch.allclose(torch.tensor(found.norms[place]), wanted)
    last = [(effect.layer, effect.order, effect.head, effect.row) for effect in found.effects]
    assert last == [
        (layer, 2 + head // 2, head % 2, int(rows[place, -1, head]))
        for place, layer in enumerate(addresses.layers)
        for head in range(4)
    ]


def test_a_rows_effect_is_what_it_does_alone(model, tokenizer):
    found = inspect(model, tokenizer, TEXT)
    ids = torch.tensor([found.trace.ids])

    def probabilities(layer: int | None, head: int | None) -> torch.Tensor:
        def alone(at, vectors_BTM, _rows):
            vectors = vectors_BTM.clone()
            kept = vectors[:, -1].unflatten(-1, (4, 8)).clone()
            vectors[:, -1] = 0
            if at == layer:
                vectors[:, -1, head * 8 : head * 8 + 8] = kept[:, head]
            return vectors

        with torch.no_grad(), altered(model.model, alone):
            return model(ids, use_cache=False).logits[0, -1].double().softmax(-1)

    # float32 logits of another batch: a last bit of one is 5e-7, and so are several in a sum.
    unread = probabilities(None, None)
    assert [p for _, p in found.unread] == pytest.approx(
        unread.topk(RAISED).values.tolist(), rel=1e-5
    )
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits[0, -1].double().softmax(-1)
    assert [p for _, p in found.read] == pytest.approx(plain.topk(RAISED).values.tolist(), rel=1e-5)
    for effect in found.effects[::3]:
        alone = probabilities(effect.layer, (effect.order - 2) * 2 + effect.head)
        divergence = (alone * (alone / unread).log()).sum().item()
        # Divergences here are above 1e-5, and each is a mean of such probabilities' logarithms.
        assert effect.divergence == pytest.approx(divergence, abs=4e-6) and divergence > 1e-5
        raised = (alone - unread).topk(RAISED)
        assert [gain for _, gain in effect.raised] == pytest.approx(
            raised.values.tolist(), abs=1e-6
        )


def test_sharers_are_those_of_the_corpus(model, tokenizer):
    ids = corpus.tokens("validation", 3_000).ids
    addresses = model.model.addresses
    sharing = {
        (layer, order): RowSharing(addresses, ids, layer, order)
        for layer in addresses.layers
        for order in (2, 3)
    }
    found = inspect(model, tokenizer, TEXT, sharing)
    for effect in found.effects:
        readers = sharing[effect.layer, effect.order].readers[effect.head]
        first = addresses.specification.offsets(effect.layer)[(effect.order - 2) * 2 + effect.head]
        assert effect.sharers == readers[effect.row - first]
    assert np.mean([effect.sharers for effect in found.effects]) > 10  # 50 rows, many bigrams
    assert all(effect.sharers is None for effect in inspect(model, tokenizer, TEXT).effects)


def test_an_attached_model_is_inspected_and_one_without_memory_is_refused(tokenizer):
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": 0, "bos_token_id": 0}
    canonical = CanonicalMap.from_tokenizer(tokenizer)
    model = engram_lm.attach(bare("llama", **sizes), canonical, memory())
    speak(model)
    found = inspect(model, tokenizer, TEXT)
    assert len(found.effects) == 8 and max(effect.divergence for effect in found.effects) > 0
    with pytest.raises(ConfigError, match="memory=None"):
        inspect(engram_lm.detach(model), tokenizer, TEXT)


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("model")
    model = build(CanonicalMap.from_tokenizer(tokenizer))
    model.save_pretrained(root / "with")
    build(CanonicalMap.from_tokenizer(tokenizer), memory=False).save_pretrained(root / "without")
    for each in ("with", "without"):
        tokenizer.save_pretrained(root / each)
    (root / "corpus.txt").write_text("Alexander the Great was a king.\nThe Great War.\n")
    (root / "short.txt").write_text("a")
    return root


def test_the_command_prints_what_the_function_finds(directory, tokenizer, capsys):
    where = ["--model", str(directory / "with"), "--corpus", str(directory / "corpus.txt")]
    assert main(["inspect", TEXT, *where, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    model = EngramLMForCausalLM.from_pretrained(directory / "with")
    plain = inspect(model, tokenizer, TEXT)
    assert (
        printed["trace"]["rows"] == plain.trace.rows
        and printed["canonical_ids"] == plain.canonical_ids
    )
    for effect, wanted in zip(printed["effects"], plain.effects, strict=True):
        assert effect["row"] == wanted.row and effect["sharers"] >= 1  # the text is in the corpus
        assert effect["divergence"] == pytest.approx(wanted.divergence, abs=1e-9)
    disk = ["--memory", "disk", "--memory-budget", "1MB"]
    assert main(["inspect", TEXT, *where, *disk, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["effects"] == printed["effects"]


@pytest.mark.parametrize("text", [TEXT, HOSTILE, "世界 👩🏽‍🚀", "long " * 60])
def test_the_command_shows_any_text_to_people(directory, capsys, monkeypatch, text):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["inspect", text, "--model", str(directory / "with")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("<|endoftext|>") and "gate, layer 0" in printed
    assert "next, no row read:" in printed and "next, all rows read:" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([TEXT, "--model", "without"], "a model without memory"),
        ([TEXT, "--model", "nowhere"], "no config.json"),
        (["", "--model", "with"], "at least one token"),
        ([TEXT, "--model", "with", "--corpus", "nowhere.txt"], "nowhere.txt: No such file"),
        ([TEXT, "--model", "with", "--corpus", "short.txt"], "2 tokens, which make no n-gram"),
    ],
)
def test_what_cannot_be_inspected_is_one_line(directory, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(directory)
    assert main(["inspect", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_tokens_stand_on_the_colours_of_their_largest_gates(model, tokenizer):
    assert colour(0.0) == "black on rgb(255,255,255)" and colour(1.0) == "black on rgb(213,94,0)"
    trace = gate_trace(model, tokenizer, "Zürich, 世界!")
    text = gate_text(trace)
    assert text.plain == "<|endoftext|>Zürich, 世界!"
    largest = trace.gates_LTS.max(axis=(0, 2))
    shown = [gate for gate, token in zip(largest, trace.tokens, strict=True) if token]
    assert [span.style for span in text.spans] == [colour(gate) for gate in shown]
