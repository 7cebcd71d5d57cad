"""Vectors -> residual update: project, gate by the hidden state, short convolution.

Shapes: B sequences, T tokens, S streams, D width, M memory width (all rows of a position), W
window. Equations 3 to 5 of arXiv 2601.07372; the module sees tensors only.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from engram_lm.config import FusionConfig
from engram_lm.memory.taps import Taps
from engram_lm.memory.window import Window


class Fused(NamedTuple):
    """update_BTSD: added to the hidden states. tail_BWSD: conv inputs of the window, if any."""

    update_BTSD: Tensor
    tail_BWSD: Tensor | None


class Gate(nn.Module):
    """How far each stream opens for its key, (B, T, S) in (0, 1).

    A module of its own, without parameters, so that an analysis can watch it or hold it.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.rule = config.gate
        self.eps = config.norm_eps

    def forward(self, hidden_BTSD: Tensor, key_BTSD: Tensor, weight_SD: Tensor) -> Tensor:
        """sigmoid of RMSNorm(hidden) . RMSNorm(key) / sqrt(D), both norms' weights in weight_SD.

        The weights only ever appear as a product (DeepSeek-V4.1 stores them so); float32
        throughout, float64 if the hidden states are.
        """
        dtype = torch.promote_types(hidden_BTSD.dtype, torch.float32)
        hidden_BTSD, key_BTSD = hidden_BTSD.to(dtype), key_BTSD.to(dtype)
        width = hidden_BTSD.shape[-1]
        scale_BTS = torch.rsqrt(mean_square(hidden_BTSD) + self.eps)
        scale_BTS = scale_BTS * torch.rsqrt(mean_square(key_BTSD) + self.eps)
        dot_BTS = (hidden_BTSD * weight_SD.to(dtype) * key_BTSD).sum(-1) * scale_BTS * width**-0.5
        if self.rule == "plain":
            return torch.sigmoid(dot_BTS)
        root_BTS = dot_BTS.abs().clamp_min(1e-6).sqrt()
        if self.rule == "signed_sqrt":  # a product of exactly zero gives 0.5
            return torch.sigmoid(root_BTS * dot_BTS.sign())
        return torch.sigmoid(torch.copysign(root_BTS, dot_BTS))  # and here sigmoid(0.001)


class _MeanSquare(torch.autograd.Function):
    """Autograd's own way back passes over the values several times; this one, to the same bits,
    once."""

    @staticmethod
    def forward(ctx: Any, values_BTSD: Tensor) -> Tensor:
        ctx.save_for_backward(values_BTSD)
        return values_BTSD.square().mean(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTS: Tensor) -> Tensor:
        (values_BTSD,) = ctx.saved_tensors
        grad_BTS = grad_BTS / values_BTSD.shape[-1] * 2
        return values_BTSD * grad_BTS[..., None]


def mean_square(values_BTSD: Tensor) -> Tensor:
    """(B, T, S)."""
    if torch.is_grad_enabled() and values_BTSD.requires_grad:
        mean_BTS: Tensor = _MeanSquare.apply(values_BTSD)
        return mean_BTS
    return values_BTSD.square().mean(-1)


def _norm_weight(streams: int, width: int, config: FusionConfig) -> nn.Parameter:
    return nn.Parameter(torch.full((streams, width), 0.0 if config.zero_centered_norms else 1.0))


class ShortConv(nn.Module):
    """SiLU of a depthwise causal convolution over normalised values; zero weights at first."""

    def __init__(self, streams: int, width: int, config: FusionConfig, dilation: int) -> None:
        super().__init__()
        assert config.conv_kernel is not None
        self.eps = config.conv_norm_eps
        self.norm_offset = 1.0 if config.zero_centered_norms else 0.0
        self.dilation = dilation
        self.norm_weight = _norm_weight(streams, width, config)
        self.weight = nn.Parameter(torch.zeros(streams, width, config.conv_kernel))

    @property
    def reach(self) -> int:
        """Positions before a token that its output depends on: (kernel - 1) * dilation."""
        return (self.weight.shape[-1] - 1) * self.dilation

    def forward(
        self, gated_BTSD: Tensor, tail_BWSD: Tensor | None, window: Window
    ) -> tuple[Tensor, Tensor]:
        """Output at the T tokens, and the inputs of all window positions for the next call.

        tail_BWSD: inputs of the window's earlier positions; None means the window starts a text.
        """
        dtype = torch.promote_types(gated_BTSD.dtype, torch.float32)
        weight_SD = self.norm_weight.to(dtype) + self.norm_offset
        gated_BTSD = gated_BTSD.to(dtype)
        scale_BTS = torch.rsqrt(mean_square(gated_BTSD) + self.eps)
        inputs_BTSD = gated_BTSD * scale_BTS[..., None] * weight_SD
        if tail_BWSD is None:
            B, _, S, D = inputs_BTSD.shape
            tail_BWSD = inputs_BTSD.new_zeros(B, window.earlier, S, D)
        inputs_BWSD = torch.cat([tail_BWSD.to(dtype), inputs_BTSD], dim=1)
        packed_BWSD = window.pack(inputs_BWSD)
        # Padding moves tokens about inside the window, so then all positions get an output.
        tokens = window.tokens if window.order_BW is None else packed_BWSD.shape[1]
        taps = Taps(self.weight.shape[-1], self.dilation, tokens, window.document_BW)
        output_BTSD = taps(packed_BWSD, self.weight.to(dtype).movedim(-1, 0).contiguous())
        if window.order_BW is not None:
            output_BTSD = window.unpack(output_BTSD)
        return F.silu(output_BTSD), inputs_BWSD


class Fuse(nn.Module):
    """One Engram module but for its table. Parameters: kv (keys first, value last), norms, conv.

    The table and the value are shared by all streams; each stream has a key of its own. One matrix
    product makes all of them.
    """

    def __init__(
        self, streams: int, width: int, memory_dim: int, config: FusionConfig, max_order: int
    ):
        super().__init__()
        self.streams, self.width = streams, width
        self.kv = nn.Linear(memory_dim, (streams + 1) * width, bias=config.bias)
        self.norm_offset = 1.0 if config.zero_centered_norms else 0.0
        self.query_norm_weight = _norm_weight(streams, width, config)
        self.key_norm_weight = _norm_weight(streams, width, config)
        self.gate = Gate(config)
        self.conv = (
            None if config.conv_kernel is None else ShortConv(streams, width, config, max_order)
        )

    @property
    def norm_weight_SD(self) -> Tensor:
        """Both norms' weights, which only ever appear as a product; float32 or wider."""
        dtype = torch.promote_types(self.query_norm_weight.dtype, torch.float32)
        query_SD, key_SD = self.query_norm_weight.to(dtype), self.key_norm_weight.to(dtype)
        return (query_SD + self.norm_offset) * (key_SD + self.norm_offset)

    def forward(
        self,
        hidden_BTSD: Tensor,
        vectors_BTM: Tensor,
        window: Window,
        tail_BWSD: Tensor | None = None,
        mask_BT: Tensor | None = None,
    ) -> Fused:
        """Update of the hidden states. mask_BT: bool, False where the gate is held at 0.

        Cost: 2 * M * (S + 1) * D multiply-adds a token, and O(S * D) around them.
        """
        kv_BTC = self.kv(vectors_BTM.to(self.key_norm_weight.dtype))
        keys_BTC, value_BTD = kv_BTC.split([self.streams * self.width, self.width], dim=-1)
        key_BTSD = keys_BTC.unflatten(-1, (self.streams, self.width))
        gate_BTS = self.gate(hidden_BTSD, key_BTSD, self.norm_weight_SD)
        if mask_BT is not None:
            gate_BTS = gate_BTS * mask_BT[..., None]
        gated_BTSD = gate_BTS[..., None] * value_BTD[..., None, :].to(gate_BTS.dtype)
        if self.conv is None:
            return Fused(gated_BTSD.to(hidden_BTSD.dtype), None)
        smoothed_BTSD, tail_BWSD = self.conv(gated_BTSD, tail_BWSD, window)
        return Fused((gated_BTSD + smoothed_BTSD).to(hidden_BTSD.dtype), tail_BWSD)
