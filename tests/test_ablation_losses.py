"""The cost of each part of a memory, against judging it by hand; retention as it is defined."""

import numpy as np
import pytest
from families import attached, bare
from tiny import phrases, trained_model

from engram_lm.analysis import ablation
from engram_lm.analysis.ablation_losses import ablation_losses, retention
from engram_lm.analysis.bands import bands, count_ngrams
from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluate.token_losses import token_losses


@pytest.fixture(scope="module")
def stream() -> np.ndarray:
    return phrases(1, 16 * 8 + 5, seed=12)[0].numpy()


@pytest.fixture(scope="module", params=["ours", "attached"])
def model(request):
    return trained_model(1, True, 2) if request.param == "ours" else attached("llama")


def test_every_part_is_judged_on_the_same_tokens_as_the_whole(model, stream):
    told = []
    found = ablation_losses(model, stream, context=16, batch=4, heads=True, progress=told.append)
    names = [each.name for each in found]
    assert told == ["as it is", *names] and len(set(names)) == 1 + 2 + 2 + 4 + 4
    ids = stream[: 16 * 8 + 1]
    plain = token_losses(model, ids, context=16, batch=4).astype(np.float64)
    for name, made in (
        ("memory off", ablation.memory_off(model)),
        ("layer 2 off", ablation.layer_off(model, 2)),
        ("order 3, head 1 off", ablation.heads_off(model, [3])),
    ):
        with made:
            losses = token_losses(model, ids, context=16, batch=4).astype(np.float64)
        each = found[names.index(name)]
        assert each.loss == losses.mean() and each.change == (losses - plain).mean()
        assert each.low <= each.change <= each.high and each.bands == []
    after = token_losses(model, ids, context=16, batch=4)
    assert np.array_equal(after.astype(np.float64), plain)


def test_bands_are_of_the_ngram_that_was_read_before(stream):
    model = trained_model(1, True, 2)
    canonical_V = model.model.addresses.canonical.ids_V.numpy()
    training = phrases(1, 900, seed=3)[0].numpy()
    counts = [count_ngrams(canonical_V[training], order, base=60) for order in (2, 3)]
    found = ablation_losses(model, stream, context=16, batch=8, counts=counts)
    off = found[0]
    ids = stream[: 16 * 8 + 1]
    plain = token_losses(model, ids, context=16, batch=8).astype(np.float64)
    with ablation.memory_off(model):
        change = token_losses(model, ids, context=16, batch=8) - plain
    for order, (count, rows) in enumerate(zip(counts, off.bands, strict=True), start=2):
        own = bands(count.of(canonical_V[ids]))[:-1]
        for place, row in enumerate(rows):
            inside = [
                change[at] for at in range(len(change)) if own[at] == place and at % 16 >= order - 1
            ]
            assert row["tokens"] == len(inside)
            assert row["mean"] == (pytest.approx(np.mean(inside)) if inside else None)
        assert sum(row["tokens"] for row in rows) == 8 * (16 - order + 1)


def test_retention_is_raw_without_chance_and_corrected_with_it():
    assert retention(0.93, 1.0) == pytest.approx(0.93)
    assert retention(0.5, 0.75, chance=0.25) == pytest.approx(0.5)
    assert retention(0.25, 0.75, chance=0.25) == 0
    with pytest.raises(DataError, match=r"full=0.25: not above chance=0.25"):
        retention(0.3, 0.25, chance=0.25)


def test_what_cannot_be_judged_is_refused(stream):
    with pytest.raises(ConfigError, match="no memory of its own"):
        ablation_losses(bare("llama"), stream, context=16, batch=4)
    with pytest.raises(DataError, match="30 ids: two windows of context=16"):
        ablation_losses(trained_model(1, True, 2), stream[:30], context=16, batch=4)
