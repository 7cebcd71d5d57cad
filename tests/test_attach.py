"""A memory given to other families' models: the same logits at first, saved whole, taken off."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from families import FAMILIES, attached, bare, memory, speak
from tiny import VOCABULARY, canonical_map, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import engram_lm
from engram_lm import corpus
from engram_lm.cli import main
from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.model.contents import read


@pytest.fixture
def ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randint(2, VOCABULARY, (2, 19), generator=generator)


def logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_given_a_memory_says_the_same_until_it_is_trained_and_after_it_is_detached(
    family, ids
):
    model = bare(family)
    kind, config, weights = type(model), model.config.to_dict(), state(model)
    before = logits(model, ids)
    assert engram_lm.attach(model, canonical_map(), memory()) is model
    assert isinstance(model, kind) and isinstance(model, engram_lm.AttachedForCausalLM)
    assert torch.equal(logits(model, ids), before)
    speak(model)
    after = logits(model, ids)
    assert (after - before).abs().max() > 0.1
    with model.base_model.without_memory():
        assert torch.equal(logits(model, ids), before)
    assert engram_lm.detach(model) is model
    assert type(model) is kind and model.config.to_dict() == config
    assert torch.equal(logits(model, ids), before)
    assert state(model).keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    for part in model.modules():
        assert not part._forward_pre_hooks and not hasattr(part, "engram")
        assert getattr(part, "config", model.config) is model.config


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_opened_from_its_directory_alone_in_every_way(family, ids, tmp_path):
    model = attached(family)
    wanted = logits(model, ids)
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    assert (
        record["architectures"]
        == [type(model).__name__]
        == [f"Engram{type(model).family.__name__}"]
    )
    assert record["model_type"] == "engram_attached"
    assert read(tmp_path).problems == ()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(opened) is type(model)
    assert opened.config.to_diff_dict() == model.config.to_diff_dict()
    whole = engram_lm.AttachedForCausalLM.from_pretrained(tmp_path)
    disk = engram_lm.AttachedForCausalLM.from_pretrained(
        tmp_path, memory="disk", memory_budget="1MB"
    )
    for other in (opened, whole, disk, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, ids), wanted)
    decoder = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(decoder(ids).last_hidden_state, model.base_model(ids).last_hidden_state)


@pytest.mark.parametrize("make", [lambda: attached("llama"), lambda: tiny_model()])
def test_the_auto_classes_open_a_model_with_its_rows_on_disk(make, ids, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    places = {"memory": "disk", "memory_budget": "1MB"}
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, **places)
    assert opened.base_model.served is not None and opened.config.memory == model.config.memory
    assert torch.equal(logits(opened, ids), logits(model, ids))


def test_engram_generate_and_info_know_an_attached_model(ids, tmp_path, capsys):
    tokenizer = corpus.tokenizer()
    model = bare("llama", vocab_size=len(tokenizer))
    engram_lm.attach(model, tokenizer, memory())
    speak(model)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path)
    texts = []
    for options in ([], ["--memory", "disk", "--memory-budget", "1MB"], ["--memory", "off"]):
        line = ["generate", "--model", str(tmp_path), "--prompt", "A city", "--json", *options]
        assert main(line) == 0
        texts.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert texts[0] == texts[1] != texts[2]
    assert main(["info", str(tmp_path)]) == 0
    assert "EngramLlamaForCausalLM" in capsys.readouterr().out
    bare("llama").save_pretrained(tmp_path / "bare")
    assert main(["generate", "--model", str(tmp_path / "bare"), "--prompt", "A"]) == 2
    assert "a 'llama' without memory" in capsys.readouterr().err


def test_config_json_is_of_no_family_that_transformers_would_open_without_the_memory(tmp_path):
    attached("llama").save_pretrained(tmp_path)
    code = (
        "from transformers import AutoModelForCausalLM, LlamaForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode and "trust_remote_code" in ran.stderr
    code = (
        "from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
        "print(type(m).__name__, m.model.reads_memory, m.is_remote_code(), m.is_custom_code())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    # Once trusted, it is not taken for the hub's from then on: it keeps its buffers.
    wanted = ["EngramLlamaForCausalLM", "True", "False", "False"]
    assert ran.stdout.split() == wanted, ran.stderr
    assert AutoConfig.from_pretrained(tmp_path).model_type == "llama"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_memory_takes_the_models_dtype_and_its_tables_their_own(dtype, ids, tmp_path):
    bare("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    before = logits(model, ids)
    engram_lm.attach(model, canonical_map(), memory(), table_dtype="fp32")
    assert torch.equal(logits(model, ids), before)
    assert {table.weight.dtype for table in model.model.tables.values()} == {torch.float32}
    assert {p.dtype for p in model.model.layers[0].engram.parameters()} == {dtype}
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert opened.model.tables["0"].weight.dtype == torch.float32
    assert torch.equal(logits(opened, ids), before)


def test_gradient_checkpointing_gives_the_gradients_of_the_plain_pass(ids):
    gradients = []
    for checkpoint in (False, True):
        model = attached("qwen3").train()
        if checkpoint:
            model.activation_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        rows = {name: table.row_gradient for name, table in model.model.tables.items()}
        gradients.append((found, rows))
    (plain, plain_rows), (again, again_rows) = gradients
    assert plain.keys() == again.keys() and not any(".tables." in name for name in plain)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    for name, gradient in plain_rows.items():
        assert torch.equal(gradient.rows_U, again_rows[name].rows_U)
        assert torch.equal(gradient.values_UE, again_rows[name].values_UE)


def test_a_device_map_puts_layers_and_tables_where_it_says(ids, tmp_path):
    model = attached("llama")
    wanted = logits(model, ids)
    model.save_pretrained(tmp_path / "model")
    parts = ["embed_tokens", "rotary_emb", "norm", "tables", "seal", "layers.0", "layers.1"]
    places = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu"}
    places |= {"model.layers.2": "disk", "model.layers.3": "disk"}
    opened = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "aside"
    )
    assert opened.hf_device_map["model.layers.2"] == "disk"
    assert opened.model.layers[2].engram.kv.weight.is_meta
    assert torch.equal(logits(opened, ids), wanted)


def test_hidden_states_are_those_that_layers_hand_on(ids):
    model = attached("llama")
    with torch.no_grad():
        seen = model(ids, output_hidden_states=True).hidden_states
        embedded = model.get_input_embeddings()(ids)
        last = model.model(ids).last_hidden_state
    # The first layer's input is taken where its memory has been added already.
    assert len(seen) == 5 and not torch.equal(seen[0], embedded)
    assert torch.equal(seen[-1], last)


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4}


def other(name: str, **sizes):
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **sizes})
    return getattr(transformers, f"{name}ForCausalLM")(config)


def said(name: str, value):
    """A model whose configuration says this of it."""
    model = bare("llama")
    setattr(model.config, name, value)
    return model


OTHERS = {
    "GPT2LMHead": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4)
    ),
    "Gemma2": lambda: other(
        "Gemma2", head_dim=8, intermediate_size=48, num_key_value_heads=2, **HEADS
    ),
    "Phi3": lambda: other("Phi3", pad_token_id=1, intermediate_size=48, **HEADS),
}


@pytest.mark.parametrize("name", OTHERS)
def test_further_families_are_given_a_memory_and_saved_with_it(name, ids, tmp_path):
    model = OTHERS[name]().eval()
    before = logits(model, ids)
    engram_lm.attach(model, canonical_map(), memory())
    assert torch.equal(logits(model, ids), before)
    speak(model)
    after = logits(model, ids)
    assert not torch.equal(after, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), after)


REFUSED = {
    "bloom": (lambda: other("Bloom", n_head=4), "was not handed its memory"),
    "opt": (
        lambda: other("OPT", ffn_dim=32, word_embed_proj_dim=32, **HEADS),
        "0 lists of 4 decoder layers",
    ),
    "falcon": (lambda: other("Falcon", **HEADS), "was not handed its memory"),
    "shared": (lambda: said("num_kv_shared_layers", 1), "whose every layer has a cache of its own"),
    "encoder": (lambda: said("is_encoder_decoder", True), "a decoder is needed"),
    "mamba": (lambda: other("Mamba"), "no layer has attention"),
    "decoder": (lambda: bare("llama").model, "not the class that AutoModelForCausalLM opens"),
    "module": (lambda: torch.nn.Linear(2, 2), "attach before PEFT"),
    "twice": (lambda: attached("llama"), "has a memory already"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_architecture_that_cannot_work_is_refused_and_left_as_it_was(kind, ids):
    make, words = REFUSED[kind]
    model = make()
    before, classes = state(model), [type(part) for part in model.modules()]
    with pytest.raises(ConfigError, match=words):
        engram_lm.attach(model, canonical_map(), memory())
    assert [type(part) for part in model.modules()] == classes
    assert state(model).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_does_not_fit_the_model_is_refused_in_one_line(tmp_path):
    model = bare("llama", num_hidden_layers=2)
    with pytest.raises(ConfigError, match=r"memory layers \(0, 2\): the model has layers 0 to 1"):
        engram_lm.attach(model, canonical_map(), memory())
    with pytest.raises(MismatchError, match="97 ids, vocab_size is 40"):
        engram_lm.attach(bare("llama", vocab_size=40), canonical_map(), memory())
    with pytest.raises(ConfigError, match="table_dtype='int8'"):
        engram_lm.attach(bare("llama"), canonical_map(), memory(), table_dtype="int8")
    bare("llama").save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match="a 'llama' without memory"):
        engram_lm.AttachedForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no memory was attached"):
        engram_lm.detach(bare("llama"))
    assert type(model) is transformers.LlamaForCausalLM
    attached("llama").save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(record | {"backbone_model_type": "lama"}))
    with pytest.raises(DataError, match="backbone_model_type 'lama'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
