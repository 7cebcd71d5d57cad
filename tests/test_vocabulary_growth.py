"""Token ids beyond the tokenizer's: padded embeddings, and tokens that were added later."""

from dataclasses import replace

import pytest
import torch
from families import attached, bare, memory, speak
from tiny import VOCABULARY, tiny_model
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import engram_lm
from engram_lm.cli import main
from engram_lm.errors import AddressError, ConfigError, MismatchError
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.model.contents import read

V, ADDED = 97, ["<think>", "</think>"]


def tokenizer(words: int = V) -> PreTrainedTokenizerFast:
    """Words that fall into pairs: W7 and w7 share a canonical id."""
    vocabulary = {f"{'wW'[i % 2]}{i // 2}": i for i in range(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="W0")


def grown_tokenizer() -> PreTrainedTokenizerFast:
    grown = tokenizer()
    grown.add_tokens([*ADDED, "W48"])  # folding alone would give W48 the class of w48, an old one
    return grown


def engram(vocab_size: int = V):
    model = tiny_model(memory=None, vocab_size=vocab_size)
    given = engram_lm.give_memory(model, memory(), tokenizer())
    speak(given)
    return given


def family(name: str):
    def make(vocab_size: int = V, rule: str = "folded"):
        model, rules = bare(name, vocab_size=vocab_size), memory()
        rules = replace(rules, specification=replace(rules.specification, canonical_rule=rule))
        engram_lm.attach(model, tokenizer(), rules)
        speak(model)
        return model

    return make


MODELS = {
    "engram_lm": engram,  # ours, with tied embeddings
    "llama": family("llama"),
    "gemma3": family("gemma3"),  # tied
    "gpt_neox": family("gpt_neox"),
    "raw": lambda size=V: family("llama")(size, rule="raw"),
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(2, V, (2, 19), generator=torch.Generator().manual_seed(3))


def with_added(ids: torch.Tensor) -> torch.Tensor:
    ids = ids.clone()
    ids[0, 3], ids[1, [0, 7]], ids[:, -1] = V, V + 1, V + 2
    return ids


def rows(model, ids) -> torch.Tensor:
    return model.base_model.memory.addresses.rows(ids)


def test_a_vocabulary_that_was_changed_in_part_is_not_saved(tmp_path):
    inner, exchanged = attached("llama"), attached("llama")
    inner.base_model.resize_token_embeddings(VOCABULARY + 5)
    exchanged.set_input_embeddings(torch.nn.Embedding(VOCABULARY + 5, 32))
    for model in (inner, exchanged):
        with pytest.raises(ConfigError, match="rows, and vocab_size is"):
            model.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", MODELS)
def test_ids_of_a_padded_embedding_are_read_and_sampled_and_rows_of_the_others_stay(name, ids):
    plain, padded = MODELS[name](), MODELS[name](V + 31)
    digests = {model.config.memory_config.specification.digest for model in (plain, padded)}
    assert len(digests) == 1
    assert torch.equal(rows(padded, ids), rows(plain, ids))
    beyond = torch.arange(V, V + 31).expand(2, -1)
    assert padded(beyond).logits.isfinite().all()
    canonical = padded.base_model.memory.addresses.canonical
    assert canonical.ids_V[V:].tolist() == [canonical.own.canonical_ids + i for i in range(31)]
    torch.manual_seed(0)
    padded.get_output_embeddings().weight[V:] *= 3
    new = padded.generate(ids, do_sample=True, top_k=0, max_new_tokens=40, pad_token_id=1)
    assert new.shape == (2, 59) and bool((new >= V).any())
    with pytest.raises(AddressError, match=f"token id {V + 31} at position 0"):
        padded(torch.tensor([[V + 31]]))


@pytest.mark.parametrize("name", MODELS)
def test_tokens_added_later_are_taken_and_what_is_saved_opens_alike(name, ids, tmp_path):
    model, grown = MODELS[name](), grown_tokenizer()
    before, old_rows = model(ids).logits, rows(model, ids)
    specification = model.config.memory_config.specification
    model.resize_token_embeddings(len(grown), mean_resizing=False)
    model.get_input_embeddings().weight[V:].normal_(std=0.3)
    assert torch.equal(rows(model, ids), old_rows)
    # Wider heads may be multiplied in other blocks.
    assert (model(ids).logits[..., :V] - before).abs().max() < 1e-5
    ids = with_added(ids)
    wanted = model(ids).logits
    model.set_canonical_map(specification.canonical_map(grown, len(grown)))
    assert torch.equal(model(ids).logits, wanted)
    assert model.config.memory_config.specification == specification
    model.save_pretrained(tmp_path)
    grown.save_pretrained(tmp_path)
    assert read(tmp_path).problems == () and read(tmp_path).tokenizer == "beside it"
    for options in ({}, {"tokenizer": grown}, {"memory": "disk", "memory_budget": "1MB"}):
        opened = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        assert torch.equal(opened(ids).logits, wanted)
    with pytest.raises(MismatchError, match="the tokenizer's canonical map is not"):
        opened.set_canonical_map(CanonicalMap.identity(V + 2).first(V - 1))


@pytest.mark.parametrize("name", ["engram_lm", "llama", "raw"])
def test_a_vocabulary_shrinks_to_the_memorys_and_no_further(name, ids):
    model = MODELS[name](V + 31)
    specification, wanted = model.config.memory_config.specification, rows(model, ids)
    for size, multiple in ((V - 1, None), (1, None), (V - 1, 8)):
        with pytest.raises(ConfigError, match=rf"\({size}\): the memory is addressed by {V} token"):
            model.resize_token_embeddings(size, pad_to_multiple_of=multiple)
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == V + 31
    model.base_model.memory.addresses.rows(torch.tensor([[V + 30]]))
    for size, multiple in ((V, None), (V, 8)):
        model.resize_token_embeddings(size, pad_to_multiple_of=multiple, mean_resizing=False)
        size = model.config.vocab_size
        assert size == (V if multiple is None else 104)
        assert torch.equal(rows(model, ids), wanted)
        model(torch.tensor([[size - 1]]))
        with pytest.raises(AddressError, match=f"ids run from 0 to {size - 1}"):
            model(torch.tensor([[size]]))
    assert model.config.memory_config.specification == specification


def test_models_without_memory_are_resized_as_before(ids):
    attached = engram_lm.attach(bare("llama"), None, None)
    for model in (attached, tiny_model(memory=None)):
        model.resize_token_embeddings(40, mean_resizing=False)
        assert model(ids % 40).logits.shape[-1] == 40


def test_a_tokenizer_that_grew_before_its_model_is_said_and_opens(ids, tmp_path, capsys):
    model, grown = engram(), grown_tokenizer()
    with pytest.raises(MismatchError, match=r"has 100 ids, .* 97; resize_token_embeddings\(100\)"):
        model.set_canonical_map(CanonicalMap.from_tokenizer(grown))
    model.save_pretrained(tmp_path)
    grown.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"tokenizer has 100 ids, .*; resize_token_embeddings\("):
        opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(opened(ids).logits, model(ids).logits)
    assert main(["info", str(tmp_path)]) == 1
    assert "mismatch: tokenizer.json has 100 ids, vocab_size is 97" in capsys.readouterr().out
    other = grown_tokenizer()
    other.add_tokens(["one more"])
    opened.resize_token_embeddings(len(other), mean_resizing=False)
    opened.set_canonical_map(CanonicalMap.from_tokenizer(other))
    opened(torch.tensor([[V + 3]]))


def test_a_tokenizer_that_is_another_one_is_refused_whatever_its_size(tmp_path):
    model = family("llama")(V + 31)
    for changed in ({"w1": 3, "W1": 2}, {"w1": 3, "W1": 2, "new": V}):
        words = {f"{'wW'[i % 2]}{i // 2}": i for i in range(V)} | {"W0": 5, "W2": 1} | changed
        backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
        backend.decoder = decoders.Fuse()
        with pytest.raises(MismatchError, match="the tokenizer's canonical map is not"):
            model.set_canonical_map(CanonicalMap.from_tokenizer(backend))
    model.save_pretrained(tmp_path)
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(MismatchError, match="the tokenizer's canonical map is not"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read(tmp_path).tokenizer == "another's"


def test_packs_are_read_by_models_whose_vocabulary_has_grown_or_has_not_yet(ids, tmp_path):
    trained = family("llama")()
    engram_lm.save_pack(trained, tmp_path / "old")
    model = engram_lm.attach(bare("llama"), None, None)
    model.load_pack("law", tmp_path / "old")
    wanted = model(ids, packs="law").logits
    with pytest.raises(ConfigError, match=f"the pack 'law' is addressed by {V} token ids"):
        model.resize_token_embeddings(V - 1)
    model.resize_token_embeddings(V + 3, mean_resizing=False)
    assert (model(ids, packs="law").logits[..., :V] - wanted).abs().max() < 1e-5
    wanted = model(with_added(ids), packs="law").logits
    with pytest.warns(UserWarning, match=f"vocab_size={V}, this one has {V + 3}"):
        model.load_pack("again", tmp_path / "old")
    assert torch.equal(model(with_added(ids), packs="again").logits, wanted)

    trained.resize_token_embeddings(V + 3, mean_resizing=False)
    engram_lm.save_pack(trained, tmp_path / "new")
    for name in ("model.safetensors", "canonical_map.safetensors", "specification.json"):
        old, new = (tmp_path / kind / name for kind in ("old", "new"))
        assert old.read_bytes() == new.read_bytes()
    fresh = engram_lm.attach(bare("llama"), None, None)
    with pytest.warns(UserWarning, match=f"vocab_size={V + 3}, this one has {V}"):
        fresh.load_pack("law", tmp_path / "new")
    small = engram_lm.attach(bare("llama", vocab_size=40), None, None)
    with pytest.raises(MismatchError, match=f"by {V} token ids, this model has vocab_size=40"):
        small.load_pack("law", tmp_path / "old")


def test_surgery_keeps_ids_beyond_the_tokenizer(ids, tmp_path):
    model = engram(V + 3)
    ids = with_added(ids)
    rules = model.config.memory_config.specification
    for change in ({"rows_per_head": (400_000, 400_000)}, {"seed": 5}):
        reads = [(each[None], None) for each in ids]
        changed, kept = engram_lm.readdress(model, replace(rules, **change), reads)
        assert changed.config.memory_config.specification.vocabulary == rules.vocabulary
        assert changed(ids).logits.isfinite().all()
        if kept == {0: 1.0, 2: 1.0}:
            assert torch.equal(changed(ids).logits, model(ids).logits)
    plain = tiny_model(memory=None)
    given = engram_lm.give_memory(plain, memory(), tokenizer())
    given.resize_token_embeddings(V + 3, mean_resizing=False)
    with pytest.raises(
        ConfigError, match=rf"has {V + 3} rows, .* resize_token_embeddings\({V + 3}\)"
    ):
        plain.save_pretrained(tmp_path)
    plain.resize_token_embeddings(V + 3)
    plain.save_pretrained(tmp_path)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, plain(ids).logits
    )
    assert torch.equal(plain(ids).logits, given.eval()(ids).logits)
    plain = tiny_model(memory=None, vocab_size=V + 3)
    given = engram_lm.give_memory(plain, memory(), grown_tokenizer())
    assert given.config.memory_config.specification.vocabulary.token_ids == V + 3
    assert torch.equal(given(ids).logits, plain(ids).logits)
