"""Gradient checkpointing changes no gradient, of parameters or of rows."""

import pytest
import torch
from tiny import DECODERS, phrases, trained_model


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_gradient_checkpointing_changes_no_gradient(decoder, reentrant):
    model = trained_model(*DECODERS[decoder])
    ids = phrases(2, 23, seed=99)
    tables = list(model.model.tables.values())

    def gradients():
        model.zero_grad()
        for table in tables:
            table.row_gradient = None
        model(ids, labels=ids, use_cache=False).loss.backward()
        dense = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return dense, [table.row_gradient for table in tables]

    model.train()
    try:
        plain, plain_rows = gradients()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        calls = []
        hook = model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
        dense, rows = gradients()
        hook.remove()
    finally:
        model.activation_checkpointing_disable()
        model.zero_grad()
        for table in tables:
            table.row_gradient = None
        model.eval()
    assert len(calls) == 2  # it was really computed twice
    assert dense.keys() == plain.keys()
    assert all(torch.equal(dense[name], plain[name]) for name in plain)
    for (rows_U, values_UE), (plain_U, plain_UE) in zip(rows, plain_rows, strict=True):
        assert torch.equal(rows_U, plain_U) and values_UE.abs().max() > 0
        assert torch.equal(values_UE, plain_UE)
