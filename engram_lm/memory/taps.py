"""The taps of a short convolution: a sum over a few earlier positions, each value with a weight.

Shapes: B sequences, P packed positions, of which the last T get an output, S streams, D width, K
taps. Tap j multiplies the value (K - 1 - j) * dilation positions back, as in torch's Conv1d, which
is slow on a CPU where it is depthwise and dilated, and knows no document starts.

Autograd would keep a zero-padded copy of the values for each tap and make as many more on the way
back. So the backward is written out; its bits are autograd's.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Taps:
    """Where the taps of T outputs reach. document_BP: what they may not leave, or None."""

    def __init__(self, taps: int, dilation: int, tokens: int, document_BP: Tensor | None) -> None:
        self.taps, self.dilation, self.tokens = taps, dilation, tokens
        self.document_BP = document_BP

    def __call__(self, packed_BPSD: Tensor, weight_KSD: Tensor) -> Tensor:
        """(B, T, S, D). A tap that reaches before the first position, or out of its document, is 0.

        weight_KSD: of the values' dtype.
        """
        if torch.is_grad_enabled() and (packed_BPSD.requires_grad or weight_KSD.requires_grad):
            output_BTSD: Tensor = _Differentiable.apply(packed_BPSD, weight_KSD, self)
            return output_BTSD
        return self.sum(packed_BPSD, weight_KSD)

    def sum(self, packed_BPSD: Tensor, weight_KSD: Tensor) -> Tensor:
        """The same, through which autograd finds its own way."""
        first = packed_BPSD.shape[1] - self.tokens
        output_BTSD = packed_BPSD[:, first:] * weight_KSD[-1]
        for tap, source, target in self._earlier(first):
            values = packed_BPSD[:, source] * weight_KSD[tap]
            output_BTSD[:, target] += self._kept(values, source)
        return output_BTSD

    def backward(
        self, grad_BTSD: Tensor, packed_BPSD: Tensor, weight_KSD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of values and weights. Their order of summation is autograd's."""
        first = packed_BPSD.shape[1] - self.tokens
        grad_BPSD = torch.zeros_like(packed_BPSD)
        grad_KSD = torch.zeros_like(weight_KSD)
        for tap, source, target in reversed(list(self._earlier(first))):
            grad = self._kept(grad_BTSD[:, target] * weight_KSD[tap], source)
            grad_BPSD[:, source] += grad
            values = self._kept(packed_BPSD[:, source], source)
            grad_KSD[tap] = (grad_BTSD[:, target] * values).sum((0, 1))
        grad_BPSD[:, first:] += grad_BTSD * weight_KSD[-1]
        grad_KSD[-1] = (grad_BTSD * packed_BPSD[:, first:]).sum((0, 1))
        return grad_BPSD, grad_KSD

    def _earlier(self, first: int) -> Iterator[tuple[int, slice, slice]]:
        """Every tap but the last: its number, the positions it reads, the outputs that get them."""
        for tap in range(self.taps - 1):
            back = (self.taps - 1 - tap) * self.dilation
            begin = min(max(0, back - first), self.tokens)
            source = slice(first - back + begin, first - back + self.tokens)
            if begin < self.tokens:
                yield tap, source, slice(begin, self.tokens)

    def _kept(self, values: Tensor, source: slice) -> Tensor:
        """Values of a tap, 0 where it reads another document than its output's."""
        if self.document_BP is None:
            return values
        read, written = self.document_BP[:, source], self.document_BP[:, -values.shape[1] :]
        return values * (read == written)[..., None, None]


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed_BPSD: Tensor, weight_KSD: Tensor, taps: Taps) -> Tensor:
        ctx.save_for_backward(packed_BPSD, weight_KSD)
        ctx.taps = taps
        return taps.sum(packed_BPSD, weight_KSD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTSD: Tensor) -> tuple[Tensor, Tensor, None]:
        return *ctx.taps.backward(grad_BTSD, *ctx.saved_tensors), None
