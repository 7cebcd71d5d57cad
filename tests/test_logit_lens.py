"""The lens against a slow float64 reference, and where its answer is known."""

import numpy as np
import pytest
import torch
from families import FAMILIES, attached, bare
from test_analysis import hooks
from tiny import phrases, tiny_model, trained_model

import engram_lm
from engram_lm import EngramLMForCausalLM
from engram_lm.analysis.logit_lens import MEASURES, logit_lens
from engram_lm.analysis.residual import watched
from engram_lm.errors import ConfigError, DataError

# Sums of 97 float32 terms around 1, against float64.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return phrases(3, 14, seed=3).numpy()


def by_hand(state, norm, head, logits, targets) -> list[float]:
    """One text's four measures in float64, token by token."""
    values = []
    for hidden, final, target in zip(state, logits, targets, strict=True):
        hidden = hidden.double()
        if norm is not None:
            scale = (hidden.square().mean() + norm.variance_epsilon) ** -0.5
            hidden = hidden * scale * norm.weight.double()
        own = (head.weight.double() @ hidden).softmax(0)
        final = final.double().softmax(0)
        values.append(
            [
                sum(p * (p / q).log() for p, q in zip(final, own, strict=True)),
                sum(q * (q / p).log() for p, q in zip(final, own, strict=True)),
                -own[target].log(),
                float(own.argmax() == final.argmax()),
            ]
        )
    return torch.tensor(values).mean(0).tolist()


@pytest.mark.parametrize("norm", [True, False])
def test_measures_are_those_computed_by_hand(ids, norm):
    model = trained_model(1, True, 2)
    found = logit_lens(model, ids, batch=2)
    states = {}
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out, at=at: states.update({at: out}))
        for at, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        logits = model(torch.from_numpy(ids[:, :-1]), use_cache=False).logits
        for hook in hooks:
            hook.remove()
        for layer in range(3):
            for text in range(3):
                wanted = by_hand(
                    states[layer][text],
                    model.model.norm if norm else None,
                    model.lm_head,
                    logits[text],
                    torch.from_numpy(ids[text, 1:]),
                )
                got = [found.of_blocks(name, norm=norm)[layer, text] for name in MEASURES]
                assert got == pytest.approx(wanted, abs=TOLERANCE)


@pytest.mark.parametrize("streams", [1, 4])
def test_the_last_block_is_the_final_distribution_and_earlier_ones_are_not(ids, streams):
    found = logit_lens(trained_model(streams, True, 2), ids)
    for name in MEASURES[:2]:
        layers = found.of_blocks(name)
        assert np.abs(layers[-1]).max() < 1e-6 and (layers[:-1] > 1e-3).all()
    assert (found.of_blocks("agreement")[-1] == 1).all()


def test_a_memory_layer_is_read_before_and_after_its_update(ids):
    model = tiny_model(4, True, 2)
    found = logit_lens(model, ids)
    assert [(place.layer, place.at) for place in found.places] == [
        *[(0, "before memory"), (0, "after memory"), (0, "block"), (1, "block")],
        *[(2, "before memory"), (2, "after memory"), (2, "block")],
    ]
    kl = found.normed["final_to_layer"]
    assert np.allclose(kl[3], kl[4]) and not np.allclose(kl[4], kl[5])
    with model.model.without_memory():
        off = logit_lens(model, ids)
    assert [place.at for place in off.places] == ["block"] * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_attached_and_bare(ids, family):
    for model in (attached(family), bare(family)):
        found = logit_lens(model, ids, batch=2)
        assert found.of_blocks("final_to_layer").shape == (4, 3)
        assert np.abs(found.of_blocks("final_to_layer")[-1]).max() < 1e-6


def test_a_model_with_its_rows_on_disk_is_read_to_the_same_numbers(ids, tmp_path):
    trained_model(4, True, 2).save_pretrained(tmp_path)
    models = [
        EngramLMForCausalLM.from_pretrained(tmp_path, **places).eval()
        for places in ({}, {"memory": "disk", "memory_budget": "1MB"})
    ]
    plain, disk = (logit_lens(model, ids) for model in models)
    for name in MEASURES:
        assert np.array_equal(plain.normed[name], disk.normed[name])
        assert np.array_equal(plain.plain[name], disk.plain[name])


def test_the_model_and_its_hooks_are_as_before(ids):
    model = trained_model(1, True, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooked = hooks(model)  # transformers leaves its own where hidden states were asked for
    model.train()
    logit_lens(model, ids)
    assert model.training and all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items()
    )
    with pytest.raises(ZeroDivisionError), watched(model):
        raise ZeroDivisionError
    assert hooks(model) == hooked
    model.eval()


def test_what_cannot_be_read_is_refused(ids, monkeypatch):
    with pytest.raises(DataError, match=r"ids of shape \(3, 1\)"):
        logit_lens(trained_model(1, True, 2), ids[:, :1])
    model = engram_lm.attach(bare("llama"), None, None)
    forward = type(model).forward

    def scaled(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        outputs.logits = outputs.logits / 2
        return outputs

    monkeypatch.setattr(type(model), "forward", scaled)
    with pytest.raises(ConfigError, match="its logits are not its head's"):
        logit_lens(model, ids)
