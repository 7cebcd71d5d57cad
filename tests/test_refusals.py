"""What decoding cannot do with a memory is refused by name; nothing goes on silently wrong."""

import pytest
import torch
from tiny import phrases, tiny_model, trained_model
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from engram_lm.errors import AddressError, ConfigError, MismatchError

T = 23


@pytest.fixture(scope="module")
def model():
    return trained_model(4, True, 3)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return phrases(2, T, seed=99)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def filled(model, ids, **options) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, **options)
    return cache


def generate(model, ids, **options):
    return model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=1, **options)


def test_continuous_batching_is_refused_by_name(model, ids):
    with pytest.raises(ConfigError, match="generate_batch.*continuous batching"):
        model.generate_batch(ids.tolist(), max_new_tokens=4)
    with pytest.raises(ConfigError, match="cache_implementation='paged'"):
        generate(model, ids, cache_implementation="paged")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "Contrastive Search requires `trust_remote_code"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, "Group Beam Search"),
        ({"num_beams": 4, "force_words_ids": [[5]]}, "Constrained Beam Search"),
        ({"dola_layers": "low"}, "Dola Generation"),
        ({"use_mtp": True}, "MTP"),
        ({"speculation_type": "dflash", "assistant_model": "itself"}, "'dflash'"),
        (
            {"prompt_lookup_num_tokens": 3, "cache_implementation": "static"},
            "assisted generate is not supported with Static cache",
        ),
        ({"prompt_lookup_num_tokens": 3, "use_cache": False}, "requires `use_cache=True`"),
        ({"prompt_lookup_num_tokens": 3, "batch": 2}, "only supported for batch_size = 1"),
        ({"past_key_values": ((), ())}, "a tuple of `past_key_values`"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_modes_of_generate_that_do_not_fit_are_refused_by_name(model, ids, options, message):
    options = dict(options)
    batch = options.pop("batch", 1)
    if "assistant_model" in options:
        options["assistant_model"] = model
    with pytest.raises((ConfigError, ValueError), match=message):
        generate(model, ids[:batch], **options)


@pytest.mark.parametrize("kind", [tuple, EncoderDecoderCache], ids=lambda kind: kind.__name__)
def test_what_is_no_decoders_cache_is_refused(model, ids, kind):
    cache = kind((DynamicCache(), DynamicCache())) if kind is tuple else kind([])
    with pytest.raises(MismatchError, match=f"a {kind.__name__} cannot carry.*DynamicCache"):
        model(ids, past_key_values=cache)


def test_a_cache_of_a_model_without_memory_is_refused(model, ids):
    cache = filled(tiny_model(memory=None), ids)
    with pytest.raises(MismatchError, match="without memory"):
        model(ids, past_key_values=cache)


def test_a_cache_of_a_model_that_looks_back_another_distance_is_refused(model, ids):
    cache = filled(trained_model(4, False, 3), ids)
    with pytest.raises(MismatchError, match="another model's"):
        model(ids, past_key_values=cache)


def test_a_cache_rebuilt_from_its_keys_and_values_is_refused(model, ids):
    cache = DynamicCache(list(filled(model, ids)))
    with pytest.raises(MismatchError, match="a copy without its memory's state.*deepcopy"):
        model(ids, past_key_values=cache)


def test_a_cache_of_another_number_of_sequences_is_refused(model, ids):
    cache = filled(model, ids)
    with pytest.raises(MismatchError, match="1 sequences after 2: the cache holds others"):
        model(ids[:1], past_key_values=cache)


def test_a_cache_that_went_on_without_memory_is_refused_by_memory(model, ids):
    cache = filled(model, ids[:, :9])
    with model.model.without_memory():
        model(ids[:, 9:14], past_key_values=cache)
    with pytest.raises(MismatchError, match="without memory"):
        model(ids[:, 14:], past_key_values=cache)
    with model.model.without_memory():
        bare = model(ids, use_cache=False).logits
        got = generate(model, ids)
        longer = torch.cat([got, ids[:, :3]], dim=1)
        assert torch.equal(
            generate(model, longer, past_key_values=filled(model, got)),
            generate(model, longer, use_cache=False),
        )
        cache = filled(model, ids[:, :9])
        logits = model(ids[:, 9:], past_key_values=cache).logits
        assert torch.equal(got, generate(model, ids, use_cache=False))
    assert (logits - bare[:, 9:]).abs().max() < 1e-4  # float32, another order of sums


def test_a_cache_without_a_record_refuses_to_be_rolled_back_and_to_go_on(model, ids):
    cache = filled(model, ids[:, :9])
    with pytest.raises(RuntimeError, match="crop of 2 tokens.*activate_past_recording"):
        cache.crop(-2)
    with pytest.raises(RuntimeError, match="cropped without a record"):
        model(ids[:, 7:], past_key_values=cache)
    cache.reset()
    again = model(ids, past_key_values=cache).logits
    assert torch.equal(again, model(ids, use_cache=False).logits)


def test_a_static_cache_cannot_be_rolled_back(model, ids):
    cache = StaticCache(config=model.config, max_cache_len=T)
    cache.activate_past_recording()
    model(ids, past_key_values=cache)
    with pytest.raises(AttributeError, match="'StaticLayer' object has no attribute 'crop'"):
        cache.crop(-2)


POSITIONS = torch.cat([torch.arange(9), torch.arange(14)])[None]


@pytest.mark.parametrize(
    "options",
    [{"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones(2, T)}],
    ids=["cache", "mask"],
)
def test_packed_documents_are_refused_where_attention_would_read_across(model, ids, options):
    with pytest.raises(AddressError, match="starts at position 9 of sequence 0.*use_cache=False"):
        model(ids, position_ids=POSITIONS, **options)


def test_a_document_that_starts_with_a_later_call_is_refused_too(model, ids):
    cache = filled(model, ids[:, :9], position_ids=POSITIONS[:, :9])
    with pytest.raises(AddressError, match="starts at position 0 of sequence 0"):
        model(ids[:, 9:], position_ids=POSITIONS[:, 9:], past_key_values=cache)
