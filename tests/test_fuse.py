"""Gate and short convolution against formulas written out in float64."""

import pytest
import torch
import torch.nn.functional as F

from engram_lm.config import FusionConfig, deepseek_v41
from engram_lm.errors import ConfigError
from engram_lm.memory.fuse import Fuse
from engram_lm.memory.window import Window

# Both sides are float64 sums of a few hundred terms: what is left is rounding.
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def window(tokens: int, batch: int, earlier: int = 0, padding=None, starts=None) -> Window:
    ids = torch.zeros(batch, earlier + tokens, dtype=torch.int64)
    return Window(ids, tokens, padding, starts)


def randomised(fuse: Fuse) -> Fuse:
    for parameter in fuse.parameters():
        torch.nn.init.normal_(parameter)
    return fuse.double()


def test_v41_module_equals_the_formula_of_the_released_model():
    streams, width, memory_dim, B, T = 4, 24, 36, 2, 7
    fuse = randomised(Fuse(streams, width, memory_dim, deepseek_v41().fusion, 4))
    hidden = torch.randn(B, T, streams, width, dtype=torch.float64)
    vectors = torch.randn(B, T, memory_dim, dtype=torch.float64)
    mask = torch.rand(B, T) > 0.3
    ours = fuse(hidden, vectors, window(T, B), mask_BT=mask).update_BTSD

    kv = vectors @ fuse.kv.weight.T
    key, value = kv[..., : streams * width].view(B, T, streams, width), kv[..., streams * width :]
    w = fuse.query_norm_weight * fuse.key_norm_weight
    rstd = torch.rsqrt((hidden**2).mean(-1) + 1e-20) * torch.rsqrt((key**2).mean(-1) + 1e-20)
    dot = (hidden * w * key).sum(-1) * rstd * width**-0.5
    gate = torch.sigmoid(torch.copysign(dot.abs().clamp(min=1e-6).sqrt(), dot))
    gate = torch.where(mask[..., None], gate, 0.0)
    torch.testing.assert_close(ours, gate[..., None] * value[:, :, None], **TOLERANCE)


@pytest.mark.parametrize("gate", ["plain", "signed_sqrt", "signed_sqrt_copysign"])
def test_gate_rules_differ_only_in_what_they_do_to_the_logit(gate):
    fuse = randomised(Fuse(1, 16, 8, FusionConfig(gate=gate, conv_kernel=None), 3))
    hidden, key = torch.randn(2, 3, 1, 16).double(), torch.randn(2, 3, 1, 16).double()
    weight = torch.rand(1, 16).double()
    eps = fuse.gate.eps
    query = F.rms_norm(hidden, (16,), eps=eps) * weight
    dot = (query * F.rms_norm(key, (16,), eps=eps)).sum(-1) / 4
    root = dot.abs().sqrt() * dot.sign()
    wanted = torch.sigmoid(dot if gate == "plain" else root)
    torch.testing.assert_close(fuse.gate(hidden, key, weight), wanted, **TOLERANCE)


@pytest.mark.parametrize(
    ("gate", "value"),
    [("plain", 0.5), ("signed_sqrt", 0.5), ("signed_sqrt_copysign", 0.50025)],
)
def test_a_zero_product_opens_the_gate_as_each_release_does(gate, value):
    fuse = Fuse(1, 4, 4, FusionConfig(gate=gate, conv_kernel=None), 3)
    opened = fuse.gate(torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4), torch.ones(1, 4))
    assert opened.item() == pytest.approx(value, abs=1e-7)  # float32 sigmoid


@pytest.mark.parametrize("tokens", [1, 2, 9, 10, 23])
@pytest.mark.parametrize("streams", [1, 3])
def test_short_conv_equals_torchs_dilated_conv1d(tokens, streams):
    width, dilation, kernel = 5, 3, 4
    config = FusionConfig(conv_kernel=kernel)
    conv = randomised(Fuse(streams, width, 8, config, dilation)).conv
    gated = torch.randn(2, tokens, streams, width, dtype=torch.float64)
    ours, _ = conv(gated, None, window(tokens, 2))
    normed = F.rms_norm(gated, (width,), eps=1e-5) * conv.norm_weight
    channels = normed.flatten(2).transpose(1, 2)
    weight = conv.weight.flatten(0, 1)[:, None]
    padded = F.pad(channels, ((kernel - 1) * dilation, 0))
    theirs = F.conv1d(padded, weight, dilation=dilation, groups=streams * width)
    torch.testing.assert_close(ours.flatten(2), F.silu(theirs.transpose(1, 2)), **TOLERANCE)


def test_short_conv_stops_at_document_starts():
    conv = randomised(Fuse(1, 4, 8, FusionConfig(), 3)).conv
    gated = torch.randn(1, 20, 1, 4, dtype=torch.float64)
    starts = torch.zeros(1, 20, dtype=torch.bool)
    starts[0, [7, 8]] = True
    packed, _ = conv(gated, None, window(20, 1, starts=starts))
    parts = [slice(0, 7), slice(7, 8), slice(8, 20)]
    alone = [conv(gated[:, part], None, window(part.stop - part.start, 1))[0] for part in parts]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), **TOLERANCE)


def test_short_conv_steps_over_padding():
    conv = randomised(Fuse(1, 4, 8, FusionConfig(), 3)).conv
    real = torch.randn(1, 12, 1, 4, dtype=torch.float64)
    where = torch.tensor([0, 1, 2, 5, 6, 7, 8, 9, 12, 13, 14, 15])
    gated = torch.zeros(1, 16, 1, 4, dtype=torch.float64)
    gated[:, where] = real
    padding = torch.ones(1, 16, dtype=torch.bool)
    padding[:, where] = False
    spread, _ = conv(gated, None, window(16, 1, padding=padding))
    torch.testing.assert_close(spread[:, where], conv(real, None, window(12, 1))[0], **TOLERANCE)


def test_conv_branch_is_silent_at_initialisation():
    fuse = Fuse(2, 8, 12, FusionConfig(), 3)
    plain = Fuse(2, 8, 12, FusionConfig(conv_kernel=None), 3)
    plain.load_state_dict(fuse.state_dict(), strict=False)
    hidden, vectors = torch.randn(1, 6, 2, 8), torch.randn(1, 6, 12)
    ours = fuse(hidden, vectors, window(6, 1)).update_BTSD
    assert torch.equal(ours, plain(hidden, vectors, window(6, 1)).update_BTSD)


def test_impossible_options_are_refused_by_name():
    with pytest.raises(ConfigError, match="gate='tanh': accepted are plain"):
        FusionConfig(gate="tanh")
    with pytest.raises(ConfigError, match="conv_kernel=1"):
        FusionConfig(conv_kernel=1)
