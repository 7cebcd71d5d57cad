"""Parts of a memory taken away or replaced, for as long as a `with` block runs; weights stay.

Shapes: L Engram layers, B sequences, T tokens, S streams, H heads (order-major), E values per row,
M = H * E.
Section 6.3 of arXiv 2601.07372 suppresses "the sparse embedding output": `memory_off` zeroes what a
layer adds. The others are controls: what is left when the gate, the address or the rows alone go.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from engram_lm.errors import ConfigError
from engram_lm.memory.fuse import Fuse, Fused
from engram_lm.memory.lookup import Pending
from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.specification import Specification
from engram_lm.memory.window import Window
from engram_lm.model.decoder import MemoryDecoder
from engram_lm.model.small_copy import decoder_layers


@contextmanager
def memory_off(model: Any) -> Iterator[None]:
    """No row is read, nothing is added: the backbone alone. ConfigError, here and below, for a
    model without memory."""
    with memory_decoder(model).without_memory():
        yield


@contextmanager
def layer_off(model: Any, layer: int) -> Iterator[None]:
    """This layer's memory adds zeros. ConfigError for a layer without memory."""

    def nothing(_module: Any, _inputs: Any, fused: Fused) -> Fused:
        return Fused(torch.zeros_like(fused.update_BTSD), fused.tail_BWSD)

    with _fuse(model, layer).register_forward_hook(nothing):
        yield


@contextmanager
def heads_off(model: Any, heads: list[int]) -> Iterator[None]:
    """Rows of these heads are zeros, in all layers. heads: order-major, 0 to orders * heads - 1.

    ConfigError for another number.
    """
    decoder = memory_decoder(model)
    specification, dim = _specification(decoder), model.config.memory_config.head_dim
    known = (specification.max_order - 1) * specification.heads
    for head in heads:
        if not 0 <= head < known:
            raise ConfigError(f"head {head}: this memory has heads 0 to {known - 1}")

    def without(_layer: int, vectors_BTM: Tensor, _rows_BTH: Tensor) -> Tensor:
        kept_BTHE = vectors_BTM.unflatten(-1, (known, dim)).clone()
        kept_BTHE[:, :, heads] = 0
        return kept_BTHE.flatten(2)

    with altered(decoder, without):
        yield


@contextmanager
def order_off(model: Any, order: int) -> Iterator[None]:
    """Rows of the n-grams of one order are zeros. ConfigError for an order that there is not."""
    specification = _specification(memory_decoder(model))
    if not 2 <= order <= specification.max_order:
        raise ConfigError(f"order {order}: this memory has orders 2 to {specification.max_order}")
    first = (order - 2) * specification.heads
    with heads_off(model, list(range(first, first + specification.heads))):
        yield


@contextmanager
def gates_held(model: Any, gates: Mapping[int, Tensor]) -> Iterator[None]:
    """Every token's gates are these: layer -> (S,), such as `mean_gates` gave. ConfigError for a
    layer without memory."""
    with ExitStack() as stack:
        for layer, gate_S in gates.items():

            def hold(_module: Any, _inputs: Any, gate_BTS: Tensor, held_S: Tensor = gate_S) -> Any:
                return held_S.to(gate_BTS).expand_as(gate_BTS)

            stack.enter_context(_fuse(model, layer).gate.register_forward_hook(hold))
        yield


@contextmanager
def updates_held(model: Any, updates: Mapping[int, Tensor]) -> Iterator[None]:
    """Every token is given this update: layer -> (S, D), such as `mean_updates` gave. Less foreign
    to the backbone than none. ConfigError for a layer without memory."""
    with ExitStack() as stack:
        for layer, update_SD in updates.items():

            def hold(_module: Any, _inputs: Any, fused: Fused, held_SD: Tensor = update_SD) -> Any:
                update_BTSD = fused.update_BTSD
                return Fused(held_SD.to(update_BTSD).expand_as(update_BTSD), fused.tail_BWSD)

            stack.enter_context(_fuse(model, layer).register_forward_hook(hold))
        yield


@contextmanager
def rows_permuted(model: Any, seed: int = 0) -> Iterator[None]:
    """Every n-gram reads another one's rows: row r of a head of p rows is read as (a r + b) mod p,
    with a and b drawn by `seed` for each head. Norms and how often each row is read stay."""
    decoder = memory_decoder(model)
    whole = decoder.memory.addresses
    decoder.addresses = _Permuted(whole, seed)
    try:
        yield
    finally:
        decoder.addresses = whole


@contextmanager
def rows_random(model: Any) -> Iterator[None]:
    """Every row keeps its norm and points elsewhere, where its layer and number say."""
    decoder = memory_decoder(model)
    dim = model.config.memory_config.head_dim

    def elsewhere(layer: int, vectors_BTM: Tensor, rows_BTH: Tensor) -> Tensor:
        rows_BTHE = vectors_BTM.unflatten(-1, (-1, dim))
        drawn_BTHE = directions(rows_BTH, dim, layer).to(rows_BTHE)
        return (drawn_BTHE * rows_BTHE.norm(dim=-1, keepdim=True)).flatten(2)

    with altered(decoder, elsewhere):
        yield


@contextmanager
def mean_gates(model: Any) -> Iterator[dict[int, Tensor]]:
    """Layer -> (S,), float64: at the end the mean gate over all tokens that ran inside."""
    means: dict[int, Tensor] = {}
    layers = _specification(memory_decoder(model)).layers
    with _averaged({layer: _fuse(model, layer).gate for layer in layers}, means):
        yield means


@contextmanager
def mean_updates(model: Any) -> Iterator[dict[int, Tensor]]:
    """Layer -> (S, D), float64: at the end the mean of what each memory added to a token."""
    means: dict[int, Tensor] = {}
    layers = _specification(memory_decoder(model)).layers
    with _averaged({layer: _fuse(model, layer) for layer in layers}, means):
        yield means


@contextmanager
def _averaged(modules: Mapping[int, Module], means: dict[int, Tensor]) -> Iterator[None]:
    """Fills `means` at the end with the mean over sequences and tokens of what each module gave."""
    sums: dict[int, Tensor] = {}
    tokens: dict[int, int] = {}
    with ExitStack() as stack:
        for layer, module in modules.items():

            def add(_module: Any, _inputs: Any, given: Any, layer: int = layer) -> None:
                values = given.update_BTSD if isinstance(given, Fused) else given
                sums[layer] = sums.get(layer, 0) + values.double().sum((0, 1))
                tokens[layer] = tokens.get(layer, 0) + values.shape[0] * values.shape[1]

            stack.enter_context(module.register_forward_hook(add))
        yield
    means.update({layer: total / tokens[layer] for layer, total in sums.items()})


def directions(rows: Tensor, dim: int, seed: int) -> Tensor:
    """A unit vector for each row number, float32, (..., dim): the same whenever it is asked for."""
    numbers = rows.cpu().numpy().astype(np.uint64)[..., None] * np.uint64(2 * dim)
    begin = np.uint64(seed * int(_STEP) % 2**64)
    counters = numbers + np.arange(2 * dim, dtype=np.uint64) + begin
    uniform = (_mixed(counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2 * np.log1p(-uniform[..., :dim]))
    normal = torch.from_numpy(radius * np.cos(2 * np.pi * uniform[..., dim:]))
    return (normal / normal.norm(dim=-1, keepdim=True)).float()


_STEP = np.uint64(0x9E3779B97F4A7C15)


def _mixed(counters: Any) -> Any:
    """SplitMix64 (Steele, Lea and Flood 2014) at these counters."""
    mix = counters * _STEP
    mix = (mix ^ (mix >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mix = (mix ^ (mix >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mix ^ (mix >> np.uint64(31))


class _Permuted(Addresses):
    def __init__(self, addresses: Addresses, seed: int) -> None:
        super().__init__(addresses.specification, addresses.canonical)
        drawn = np.random.default_rng(seed)
        primes = addresses.specification.primes
        sizes = [[p for order in primes[layer] for p in order] for layer in addresses.layers]
        self.primes_LH = torch.tensor(sizes)
        self.factor_LH = torch.tensor([[int(drawn.integers(1, p)) for p in row] for row in sizes])
        self.shift_LH = torch.tensor([[int(drawn.integers(0, p)) for p in row] for row in sizes])
        self.first_LH = self.primes_LH.cumsum(1) - self.primes_LH

    def window_rows(self, window: Window) -> Tensor:
        rows_LBTH = super().window_rows(window)
        parts = (self.primes_LH, self.factor_LH, self.shift_LH, self.first_LH)
        primes, factor, shift, first = (part.to(rows_LBTH.device)[:, None, None] for part in parts)
        return (factor * (rows_LBTH - first) + shift) % primes + first


class _Altered(Pending):
    def __init__(self, pending: Pending, layers: tuple[int, ...], change: "Change") -> None:
        super().__init__(pending.window, pending.rows_LBTH, pending.requests)
        self.pending, self.layers, self.change = pending, layers, change

    def wait(self, layer: int) -> Tensor:
        rows_BTH = self.rows_LBTH[self.layers.index(layer)]
        return self.change(layer, self.pending.wait(layer), rows_BTH)


Change = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, vectors (B, T, M), rows (B, T, H)) -> vectors."""


@contextmanager
def altered(decoder: MemoryDecoder, change: Change) -> Iterator[None]:
    """Rows go through `change` between store and fusion, wherever they come from."""
    layers = _specification(decoder).layers
    read = decoder.read

    def replaced(*arguments: Any) -> Any:
        reading = read(*arguments)
        if reading is not None:
            reading.pending = _Altered(reading.pending, layers, change)
        return reading

    outer = decoder.__dict__.get("read")
    decoder.__dict__["read"] = replaced
    try:
        yield
    finally:
        if outer is None:
            del decoder.__dict__["read"]
        else:
            decoder.__dict__["read"] = outer


def memory_decoder(model: Any) -> MemoryDecoder:
    """A model's decoder. ConfigError for one without a memory of its own."""
    decoder = model.base_model
    if not isinstance(decoder, MemoryDecoder) or decoder.config.memory is None:
        raise ConfigError(f"{type(model).__name__}: no memory of its own")
    return decoder


def _specification(decoder: MemoryDecoder) -> Specification:
    specification: Specification = decoder.memory.addresses.specification
    return specification


def _fuse(model: Any, layer: int) -> Fuse:
    decoder = memory_decoder(model)
    layers = _specification(decoder).layers
    if layer not in layers:
        raise ConfigError(f"layer {layer}: memory is on {', '.join(map(str, layers))}")
    holder: Any = decoder_layers(decoder)[layer]
    fuse: Fuse = holder.engram
    return fuse
