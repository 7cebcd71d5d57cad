"""The model as a transformers model: save, load, register, checkpointing, refusals."""

import json

import pytest
import torch
from tiny import VOCABULARY, canonical_map, tiny_config, tiny_model
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.model import EngramLMConfig, EngramLMForCausalLM, EngramLMModel


@pytest.fixture(params=[1, 4], ids=lambda s: f"streams{s}")
def model(request):
    return tiny_model(request.param)


def ids(tokens: int = 19) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (2, tokens))


def test_auto_classes_load_what_was_saved_bit_for_bit(model, tmp_path):
    model.save_pretrained(tmp_path)
    tokens = ids()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), EngramLMConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), EngramLMModel)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_config_json_holds_the_specification_exactly(model, tmp_path):
    model.save_pretrained(tmp_path)
    memory = json.loads((tmp_path / "config.json").read_text())["memory"]
    specification = model.model.addresses.specification
    assert memory["specification"] == specification.to_dict()
    assert memory["specification_sha256"] == specification.digest
    assert memory["specification"]["vocabulary"]["sha256"] == canonical_map().sha256


def test_an_edited_specification_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    record["memory"]["specification"]["boundary_rule"] = "cross"
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(MismatchError, match="one of them was edited"):
        EngramLMForCausalLM.from_pretrained(tmp_path)


def word_level(order: list[int]) -> Tokenizer:
    """A tokenizer in which pairs of ids differ in case only, as `order` says."""
    tokens = [chr(0x4E00 + i) for i in range(VOCABULARY)]
    tokens[order[0]], tokens[order[1]] = "a", "A"
    return Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="?"))


def test_another_tokenizer_of_the_same_size_is_refused_with_both_checksums(tmp_path):
    mine, other = word_level([5, 6]), word_level([7, 8])
    model = EngramLMForCausalLM(tiny_config())
    model.set_canonical_map(CanonicalMap.from_tokenizer(mine))
    model.save_pretrained(tmp_path)
    EngramLMForCausalLM.from_pretrained(tmp_path, tokenizer=mine)
    sums = [CanonicalMap.from_tokenizer(t).sha256 for t in (mine, other)]
    with pytest.raises(MismatchError, match="canonical map") as given:
        EngramLMForCausalLM.from_pretrained(tmp_path, tokenizer=other)
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(MismatchError, match="canonical map") as beside:
        EngramLMForCausalLM.from_pretrained(tmp_path)
    assert all(s in str(given.value) and s in str(beside.value) for s in sums)


def test_a_canonical_map_of_another_model_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    canonical_map(seed=5).save(tmp_path)
    with pytest.raises(MismatchError, match="sha256"):
        EngramLMForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "canonical_map.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match="canonical_map"):
        EngramLMForCausalLM.from_pretrained(tmp_path)


def test_eager_and_sdpa_attention_agree(model):
    tokens, logits = ids(), {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits[implementation] = model(tokens).logits
    # float32 softmax and sums in another order
    assert (logits["eager"] - logits["sdpa"]).abs().max() < 1e-4


def test_hidden_states_and_router_logits_can_be_asked_for(model):
    out = model(ids(), output_hidden_states=True, output_router_logits=True)
    assert len(out.hidden_states) == 4 and len(out.router_logits) == 2
    assert out.router_logits[0].shape == (2 * 19, 4)


def test_bf16_models_run(model):
    half = model.to(torch.bfloat16)
    out = half(ids(), labels=ids())
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16 and torch.isfinite(out.loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"streams": 0}, "streams=0"),
        ({"mlp_layer_types": ["dense"]}, "one entry for each of 3 layers"),
        ({"mlp_layer_types": ["dense", "sparse", "moe"]}, "'moe'; accepted are dense and sparse"),
        ({"num_hidden_layers": 2, "mlp_layer_types": None}, r"memory layers \(0, 2\)"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**change)


def test_a_model_without_its_canonical_map_says_so():
    model = EngramLMForCausalLM(tiny_config())
    with pytest.raises(ConfigError, match="set_canonical_map"):
        model(ids())
    with pytest.raises(ConfigError, match="without memory"):
        tiny_model(memory=None).set_canonical_map(canonical_map())


def test_a_map_with_more_ids_than_the_model_is_refused():
    model = EngramLMForCausalLM(tiny_config(vocab_size=50))
    with pytest.raises(MismatchError, match="97 ids, vocab_size is 50"):
        model.set_canonical_map(canonical_map())
