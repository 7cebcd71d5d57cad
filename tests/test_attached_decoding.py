"""Every way of decoding, on every family: as its bare model does it, or refused by name.

Each way is first asked of the bare model. Where that is exact, the model with a trained memory
must be; where it is not, or raises, the model with a memory must refuse and say what.
"""

import pytest
import torch
from families import FAMILIES, bare, shared
from tiny import phrases
from ways import WAYS, T

from engram_lm.errors import ConfigError

# float32 through four layers: sums of a chunk are taken in another order than those of the whole.
TOLERANCE = 1e-4
REFUSED = {
    ("mistral", "after_right_padding"): "text after right padding",
    ("gemma3", "after_right_padding"): "text after right padding",
    ("qwen3_next", "after_right_padding"): "text after right padding",
    ("qwen3_next", "left_padded_in_chunks"): "padding in a later part",
    ("qwen3_next", "packed_documents"): "packed documents",
    ("qwen3_next", "rolled_back"): "cannot be taken back",
    ("qwen3_next", "assisted"): "assisted generation is not supported with stateful models",
}
"""What the bare models get wrong, and the words that refuse it."""


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return phrases(2, T, seed=99)


def bare_deviation(family: str, way: str, ids: torch.Tensor) -> float:
    try:
        return WAYS[way](bare(family), ids)
    except (ValueError, RuntimeError, ConfigError):
        return float("inf")


LONG = set(FAMILIES) - {"llama", "qwen3_next"}
"""Families whose tracing waits for `pytest -m long`; it takes ten seconds each."""
CELLS = [
    pytest.param(family, way, marks=pytest.mark.long)
    if family in LONG and way == "compiled_step"
    else (family, way)
    for family in FAMILIES
    for way in WAYS
]


@pytest.mark.parametrize(("family", "way"), CELLS)
def test_every_way_is_as_exact_as_without_memory_or_refused_by_name(family, way, ids):
    words = REFUSED.get((family, way))
    if way != "compiled_step":  # where it is the same as another way, for a bare model
        assert (bare_deviation(family, way, ids) < TOLERANCE) == (words is None)
    if words is None:
        assert WAYS[way](shared(family), ids) < TOLERANCE
    else:
        with pytest.raises((ConfigError, RuntimeError, ValueError), match=words):
            WAYS[way](shared(family), ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_convolution_and_every_order_matter_to_these_models(family, ids):
    model = shared(family)
    wanted = model(ids, use_cache=False).logits
    with model.base_model.without_memory():
        assert (model(ids, use_cache=False).logits - wanted).abs().max() > 1000 * TOLERANCE
    fuse = next(part for name, part in model.named_modules() if name.endswith(".engram"))
    for changed in (fuse.conv.weight, fuse.kv.weight[:, 16:]):
        kept = changed.clone()
        changed.zero_()
        assert (model(ids, use_cache=False).logits - wanted).abs().max() > 1000 * TOLERANCE
        changed.copy_(kept)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3_next"])
def test_without_convolution_and_across_documents_texts_are_those_without_a_cache(family, ids):
    for options in ({"conv": False}, {"boundary": "cross"}):
        model = shared(family, **options)
        for way in ("token_by_token", "chunked", "left_padded", "greedy", "mixed_lengths"):
            assert WAYS[way](model, ids) < TOLERANCE
