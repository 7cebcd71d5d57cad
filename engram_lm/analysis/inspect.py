"""What a memory holds for one text: its rows, who else reads them, and what each of them says.

Shapes: T tokens, L Engram layers, H heads (order-major), E values per row, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engram_lm.analysis.ablation import altered, memory_decoder
from engram_lm.analysis.gates import GateTrace, gate_trace
from engram_lm.analysis.row_sharing import RowSharing
from engram_lm.evaluate.inference import inference

RAISED = 5
"""Tokens that are named for each row."""


@dataclass(frozen=True, kw_only=True)
class RowEffect:
    """One row that the text's last token reads, and what it does when it alone is read there."""

    layer: int
    order: int
    head: int
    """Of the order, from 0."""
    row: int
    """In the layer's whole table."""
    norm: float
    sharers: int | None
    """Distinct n-grams of a corpus that read this row; None where no corpus was given."""
    divergence: float
    """KL(with this row || with no row at the last token), nats."""
    raised: list[tuple[str, float]]
    """Tokens whose probability it raises most, and by how much."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A text as the memory sees it."""

    trace: GateTrace
    canonical_ids: list[int]
    norms: list[list[list[float]]]
    """Layer -> token -> head: lengths of the vectors of `trace.rows`."""
    effects: list[RowEffect]
    """At the last token, every layer and head."""
    unread: list[tuple[str, float]]
    """The likeliest next tokens where the last token reads no row."""
    read: list[tuple[str, float]]
    """And where it reads all of them, as it does."""


def inspect(
    model: Any,
    tokenizer: Any,
    text: str,
    sharing: Mapping[tuple[int, int], RowSharing] | None = None,
) -> Inspection:
    """Passes over the text: those of `gate_trace`, and one with a sequence for each row of the last
    token.

    sharing: (layer, order) -> the corpus's n-grams on that layer's rows. ConfigError for a model
    without memory, DataError where the text holds no token.
    """
    trace = gate_trace(model, tokenizer, text)
    decoder = memory_decoder(model)
    addresses = decoder.memory.addresses
    specification, dim = addresses.specification, model.config.memory_config.head_dim
    layers = list(specification.layers)
    heads = (specification.max_order - 1) * specification.heads
    norms: dict[int, Tensor] = {}

    def one_each(layer: int, vectors_BTM: Tensor, _rows_BTH: Tensor) -> Tensor:
        """Sequence L * H reads no row at its last token, L * H + 1 all, any other its own."""
        vectors_BTHE = vectors_BTM.unflatten(-1, (heads, dim)).clone()
        norms[layer] = vectors_BTHE[0].float().norm(dim=-1)
        kept_BH = torch.zeros(len(vectors_BTHE), heads, device=vectors_BTHE.device)
        first = layers.index(layer) * heads
        kept_BH[first : first + heads] = torch.eye(heads, device=kept_BH.device)
        kept_BH[-1] = 1
        vectors_BTHE[:, -1] *= kept_BH[..., None].to(vectors_BTHE.dtype)
        return vectors_BTHE.flatten(2)

    ids_BT = torch.tensor([trace.ids], device=model.device).repeat(len(layers) * heads + 2, 1)
    with inference(model), altered(decoder, one_each):
        log_BV = (
            model(input_ids=ids_BT, use_cache=False, logits_to_keep=1)
            .logits[:, -1]
            .double()
            .log_softmax(-1)
        )
    none_V, all_V = log_BV[-2], log_BV[-1]
    divergence_B = (log_BV.exp() * (log_BV - none_V)).sum(1)

    def likeliest(values_V: Tensor) -> list[tuple[str, float]]:
        top = values_V.topk(RAISED)
        named = (tokenizer.decode([id]) for id in top.indices.tolist())
        return list(zip(named, top.values.tolist(), strict=True))

    effects = []
    for place, layer in enumerate(layers):
        for head in range(heads):
            order, number = 2 + head // specification.heads, head % specification.heads
            row = trace.rows[place][-1][head]
            known = None if sharing is None else sharing[layer, order]
            sequence = place * heads + head
            effects.append(
                RowEffect(
                    layer=layer,
                    order=order,
                    head=number,
                    row=row,
                    norm=float(norms[layer][-1, head]),
                    sharers=None if known is None else known.on(number, row),
                    divergence=float(divergence_B[sequence]),
                    raised=likeliest(log_BV[sequence].exp() - none_V.exp()),
                )
            )
    return Inspection(
        trace=trace,
        canonical_ids=addresses.canonical.ids_V[torch.tensor(trace.ids)].tolist(),
        norms=[norms[layer].tolist() for layer in layers],
        effects=effects,
        unread=likeliest(none_V.exp()),
        read=likeliest(all_V.exp()),
    )
