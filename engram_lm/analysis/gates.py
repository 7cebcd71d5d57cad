"""Where a model opens its memory: one gate for each token, Engram layer and stream of a text.

Shapes: L Engram layers, T token ids, S streams, B and D as in the model.
Figure 7 of arXiv 2601.07372 shows hand-picked gates; here all of them are kept.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from engram_lm.analysis.ablation import memory_decoder, memory_off
from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluate.answers import NOT_FINITE, separator_of
from engram_lm.evaluate.inference import inference
from engram_lm.memory.fuse import Fuse, Fused
from engram_lm.model.small_copy import decoder_layers

Values = npt.NDArray[np.float32]
Nested = list[list[list[float]]]
LONG, AT_ONCE = 128, 16
"""Tokens of a text up to which each is switched off alone, and how many of them at once."""


@dataclass(frozen=True, kw_only=True)
class GateTrace:
    """One text's gates as plain values, so that a report can keep them.

    What stands at token t was read by the n-grams that end there, and helps to predict token t + 1.
    """

    text: str
    layers: list[int]
    """Zero-based numbers of the Engram layers."""
    streams: int
    ids: list[int]
    """The T token ids, the separator in front of the text first."""
    tokens: list[str]
    """What each id adds to the text. "" where it holds the first bytes of a character only: the
    whole character stands at its last id. From the second on they join to `text`."""
    orders: list[int]
    ngrams: list[list[str]]
    """Order -> token -> decoded text of the n-gram that ends there, with U+FFFD for cut bytes."""
    counts: list[list[int]] | None = None
    """Order -> token -> how often that n-gram stood in the corpus; None if nobody counted."""
    rows: list[list[list[int]]]
    """Layer -> token -> head (order-major): the row that is read, in the layer's whole table."""
    sharers: list[list[list[int]]] | None = None
    """The same: how many distinct n-grams of the corpus read that row."""
    losses: list[float | None]
    """Nats that the token itself cost to predict; None for the first, which nothing predicts."""
    losses_off: list[float | None]
    """The same without memory."""
    alone: list[float | None]
    """Nats that all later tokens together cost more when memory adds nothing at this token alone,
    in all layers; None for the last, and for texts of more than LONG tokens."""
    gates: Nested
    """Layer -> token -> stream: 0 (shut) to 1 (open)."""
    contributions: Nested
    """Layer -> token -> stream: length of what memory adds over length of the hidden state."""

    values: Nested
    """Layer -> token -> order: length of the value that this order's rows alone would give, over
    that of all rows together; before the gate, and of no stream. 0 where the whole is 0."""

    def _repr_html_(self) -> str:
        """What a notebook shows: the text on the colours of its largest gates."""
        from engram_lm.analysis.token_html import inline

        return inline(self)

    @property
    def gates_LTS(self) -> Values:
        return np.array(self.gates, dtype=np.float32)

    @property
    def contributions_LTS(self) -> Values:
        return np.array(self.contributions, dtype=np.float32)


def gate_trace(model: Any, tokenizer: Any, text: str) -> GateTrace:
    """Runs a model of ours, or one with a memory attached, on a separator and the text: as it is,
    without memory, and, up to LONG tokens, without memory at each token alone, AT_ONCE of them in a
    pass.

    tokenizer: a fast one of transformers. ConfigError for a model without memory, DataError where
    the text holds no token or logits are not finite numbers.
    """
    memory = getattr(model.config, "memory_config", None)
    if memory is None:
        raise ConfigError("memory=None: a model without memory has no gates")
    separator = separator_of(tokenizer)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if not encoding["input_ids"]:
        raise DataError(f"text={text!r}: at least one token is needed")
    ids = [separator, *encoding["input_ids"]]
    layers = list(memory.specification.layers)
    orders = list(range(2, memory.specification.max_order + 1))
    ids_BT = torch.tensor([ids], device=model.device)
    with inference(model):
        with (
            watched_gates(model, layers) as (gates, contributions),
            _watched_values(model, layers, len(orders)) as values,
        ):
            losses = _losses(model, ids_BT)
        with memory_off(model):
            losses_off = _losses(model, ids_BT)
        alone = _alone(model, ids_BT, layers)
        rows_LBTH = memory_decoder(model).memory.addresses.rows(ids_BT)
    return GateTrace(
        text=text,
        layers=layers,
        streams=getattr(model.config, "streams", 1),
        ids=ids,
        tokens=[tokenizer.convert_ids_to_tokens(separator), *cut(text, encoding["offset_mapping"])],
        orders=orders,
        ngrams=[_ngrams(tokenizer, ids, order) for order in orders],
        rows=rows_LBTH[:, 0].tolist(),
        losses=losses,
        losses_off=losses_off,
        alone=alone,
        gates=[gates[layer][0].tolist() for layer in layers],
        contributions=[contributions[layer][0].tolist() for layer in layers],
        values=[values[layer][0].tolist() for layer in layers],
    )


def stream_gates(
    model: Any,
    ids_NT: npt.NDArray[np.integer],
    *,
    positions_NT: npt.NDArray[np.integer] | None = None,
    batch: int = 8,
    autocast: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Values, Values]:
    """Gates and contributions of windows of a long text: (L, N, T, S) each, as in a trace.

    positions_NT: that begin again with each document, where documents are apart. progress: windows
    so far. ConfigError for a model without memory; DataError where a gate is not a number.
    """
    layers = list(memory_decoder(model).memory.addresses.layers)
    found: tuple[list[Values], list[Values]] = ([], [])
    with inference(model), watched_gates(model, layers) as kept:
        for first in range(0, len(ids_NT), batch):
            part = batched(ids_NT, positions_NT, slice(first, first + batch), model.device)
            with torch.autocast(model.device.type, autocast) if autocast else nullcontext():
                model(**part, use_cache=False, logits_to_keep=1)
            for values, by_layer in zip(found, kept, strict=True):
                values.append(torch.stack([by_layer[layer] for layer in layers]).numpy())
            if progress is not None:
                progress(min(first + batch, len(ids_NT)))
    gates, added = (np.concatenate(values, axis=1) for values in found)
    if not np.isfinite(gates).all() or not np.isfinite(added).all():
        raise DataError("gates: some are not finite numbers")
    return gates, added


def batched(
    ids_NT: npt.NDArray[np.integer],
    positions_NT: npt.NDArray[np.integer] | None,
    part: slice,
    device: torch.device,
) -> dict[str, Tensor]:
    """What a model is called with for these windows."""
    given = {"input_ids": ids_NT, "position_ids": positions_NT}
    return {
        name: torch.from_numpy(values[part].astype(np.int64)).to(device)
        for name, values in given.items()
        if values is not None
    }


def cut(text: str, offsets: list[tuple[int, int]]) -> list[str]:
    """What each token adds to the text, given the characters that it touches; they join to it.

    A character that several tokens share stands at the last one, and characters that no token
    touches at the token behind them, so that nothing is split, lost or said twice.
    """
    texts, done = [], 0
    for token, (_, end) in enumerate(offsets):
        last = token == len(offsets) - 1
        stop = len(text) if last else max(done, min(end, offsets[token + 1][0]))
        texts.append(text[done:stop])
        done = stop
    return texts


def _losses(model: Any, ids_BT: Tensor) -> list[float | None]:
    logits_TV = model(input_ids=ids_BT, use_cache=False).logits[0, :-1].float()
    if not torch.isfinite(logits_TV).all():
        raise DataError(NOT_FINITE)
    return [None, *F.cross_entropy(logits_TV, ids_BT[0, 1:], reduction="none").tolist()]


def _alone(model: Any, ids_BT: Tensor, layers: list[int]) -> list[float | None]:
    tokens = ids_BT.shape[1]
    if not 1 < tokens <= LONG:
        return [None] * tokens
    sums = []
    for first in range(0, tokens, AT_ONCE):
        # Sequence i has no memory at token `first + i`.
        places = torch.arange(first, min(first + AT_ONCE, tokens), device=ids_BT.device)
        sequences = torch.arange(len(places), device=ids_BT.device)

        def off(_module: Any, _inputs: Any, fused: Fused, at: Any = (sequences, places)) -> Fused:
            update_BTSD = fused.update_BTSD.clone()
            update_BTSD[at] = 0
            return Fused(update_BTSD, fused.tail_BWSD)

        with ExitStack() as stack:
            blocks: Any = decoder_layers(model.base_model)
            for layer in layers:
                stack.callback(blocks[layer].engram.register_forward_hook(off).remove)
            given = ids_BT.expand(len(places) + 1, -1)  # one more, whose memory is whole
            logits_BTV = model(input_ids=given, use_cache=False).logits[:, :-1].float()
        losses_BT = F.cross_entropy(
            logits_BTV.transpose(1, 2), given[:, 1:], reduction="none"
        ).double()
        sums.append((losses_BT[:-1] - losses_BT[-1]).sum(1))
    found = torch.cat(sums).tolist()
    return [*found[:-1], None]


@contextmanager
def watched_gates(
    model: Any, layers: list[int]
) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor]]]:
    """Inside, each forward pass leaves layer -> (B, T, S), float32: its gates, and lengths of what
    memory adds over those of the hidden states."""
    gates: dict[int, Tensor] = {}
    contributions: dict[int, Tensor] = {}

    blocks: Any = decoder_layers(model.base_model)

    def watch(stack: ExitStack, layer: int) -> None:
        fuse = blocks[layer].engram

        def keep_gate(_module: Any, _inputs: Any, gate_BTS: Tensor) -> None:
            gates[layer] = gate_BTS.float().cpu()

        def keep_contribution(_module: Any, inputs: tuple[Any, ...], fused: Fused) -> None:
            update_BTS = fused.update_BTSD.float().norm(dim=-1)
            hidden_BTS = inputs[0].float().norm(dim=-1)
            tiny = torch.finfo(torch.float32).tiny  # a hidden state of zeros must not give inf
            contributions[layer] = (update_BTS / hidden_BTS.clamp_min(tiny)).cpu()

        stack.callback(fuse.gate.register_forward_hook(keep_gate).remove)
        stack.callback(fuse.register_forward_hook(keep_contribution).remove)

    with ExitStack() as stack:
        for layer in layers:
            watch(stack, layer)
        yield gates, contributions


@contextmanager
def _watched_values(model: Any, layers: list[int], orders: int) -> Iterator[dict[int, Tensor]]:
    """Inside, each forward pass leaves layer -> (B, T, orders): `GateTrace.values`."""
    values: dict[int, Tensor] = {}
    blocks: Any = decoder_layers(model.base_model)
    with ExitStack() as stack:
        for layer in layers:

            def keep(
                fuse: Fuse, inputs: tuple[Any, ...], _fused: Fused, layer: int = layer
            ) -> None:
                weight_DM = fuse.kv.weight[-fuse.width :].float()
                vectors_BTM = inputs[1].float()
                parts = zip(
                    vectors_BTM.chunk(orders, dim=-1), weight_DM.chunk(orders, dim=1), strict=True
                )
                alone_BTN = torch.stack([(v @ w.T).norm(dim=-1) for v, w in parts], dim=-1)
                whole_BT1 = (vectors_BTM @ weight_DM.T).norm(dim=-1, keepdim=True)
                shares_BTN = alone_BTN / whole_BT1.clamp_min(torch.finfo(torch.float32).tiny)
                values[layer] = torch.where(whole_BT1 > 0, shares_BTN, 0.0).cpu()

            stack.enter_context(blocks[layer].engram.register_forward_hook(keep))
        yield values


def _ngrams(tokenizer: Any, ids: list[int], order: int) -> list[str]:
    ends = range(1, len(ids) + 1)
    return [
        tokenizer.decode(ids[max(0, end - order) : end], clean_up_tokenization_spaces=False)
        for end in ends
    ]
