"""A model whose rows stay on disk answers as the one that holds them, bit for bit."""

import pytest
import torch
from tiny import VOCABULARY, trained_model

from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.model import EngramLMConfig, EngramLMForCausalLM, EngramLMModel
from engram_lm.model.units import bytes_of

IDS = torch.randint(2, VOCABULARY, (3, 29), generator=torch.Generator().manual_seed(3))
SMALL = 32 * (32 + 12) * 8
"""Bytes: a handful of rows, so that most are read again and again."""


@pytest.fixture(scope="module", params=[1, 4], ids=["stream", "streams"])
def saved(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    trained_model(request.param).save_pretrained(directory)
    return directory


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


def test_every_wait_is_measured_and_a_second_pass_hits_the_rows_kept(saved):
    served = EngramLMForCausalLM.from_pretrained(saved, memory="disk", memory_budget="1MB")
    for _ in range(2):
        logits(served)
    for layer in served.model.served.values():
        assert len(layer.waits) == 2 and all(wait >= 0 for wait in layer.waits)
        cache = layer.store
        # A cache that has every row after the first pass answers all of the second.
        assert cache.asked == 2 * IDS.numel() * 4 and cache.hits == cache.asked // 2


def test_what_cannot_be_served_is_refused_in_one_line(saved, tmp_path):
    served = EngramLMForCausalLM.from_pretrained(saved, memory="disk", memory_budget="1MB")
    with pytest.raises(ConfigError, match="the rows are in files; open it without"):
        served.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "model.safetensors").exists()
    load = EngramLMForCausalLM.from_pretrained
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
