"""What each layer would predict: its hidden states read by the model's own final norm and head.

Shapes: N texts of T + 1 token ids, K places of the residual stream, V vocabulary.
Section 6.1 of arXiv 2601.07372 projects "each intermediate hidden state with the final LM head" and
does not say whether it is normalised first, nor which way the divergence goes: both are measured.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engram_lm.analysis.gates import batched
from engram_lm.analysis.residual import Residual, watched
from engram_lm.errors import DataError
from engram_lm.evaluate.inference import inference

MEASURES = ("final_to_layer", "layer_to_final", "loss", "agreement")
"""KL(final || layer), KL(layer || final), cross-entropy to the true token: nats; and the share of
tokens whose likeliest next token is that of the final distribution."""
CHUNK = 2**23
"""Logits that are compared at once, at most."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the stream is read: after a block, or at a memory layer before or after its update."""

    layer: int
    at: str
    """"block", "before memory" or "after memory"."""


@dataclass(frozen=True, kw_only=True)
class LogitLens:
    """Means over each text's tokens; the last block reads as the final distribution itself."""

    places: tuple[Place, ...]
    """In the order in which a token passes them."""
    normed: dict[str, npt.NDArray[np.float64]]
    """Measure -> (K, N), with the final norm."""
    plain: dict[str, npt.NDArray[np.float64]]
    """The same without it: streams merged, not normalised."""

    def of_blocks(self, measure: str, *, norm: bool = True) -> npt.NDArray[np.float64]:
        """(layers, N): after each block alone."""
        blocks = [place.at == "block" for place in self.places]
        return (self.normed if norm else self.plain)[measure][blocks]


def logit_lens(
    model: Any,
    ids_NT: npt.NDArray[np.integer],
    *,
    positions_NT: npt.NDArray[np.integer] | None = None,
    batch: int = 4,
    autocast: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> LogitLens:
    """Reads every block of a model of ours, of one with a memory attached, or of a bare decoder.

    ids_NT: (N, T + 1) token ids; the last of each text is only predicted. positions_NT: (N, T),
    beginning again with each document, where documents are apart. autocast: None for the weights'
    own precision; divergences are float32's of those logits. progress: texts so far. ConfigError
    where a model's logits are not its head's of its final norm; DataError for no text.
    """
    if ids_NT.ndim != 2 or ids_NT.shape[0] < 1 or ids_NT.shape[1] < 2:
        raise DataError(f"ids of shape {ids_NT.shape}: (texts, tokens), 1 and 2 or more")
    found: list[tuple[list[Place], dict[bool, Tensor]]] = []
    with inference(model), watched(model) as residual:
        for first in range(0, len(ids_NT), batch):
            part = slice(first, first + batch)
            asked = batched(ids_NT[:, :-1], positions_NT, part, model.device)
            targets = torch.from_numpy(ids_NT[part, 1:].astype(np.int64)).to(model.device)
            with torch.autocast(model.device.type, autocast) if autocast else nullcontext():
                logits_BTV = model(**asked, use_cache=False).logits
                residual.check(logits_BTV)
                found.append(_measure(residual, logits_BTV, targets))
            if progress is not None:
                progress(min(first + batch, len(ids_NT)))
    places = found[0][0]
    normed, plain = (
        torch.cat([values[norm] for _, values in found], dim=2).double().cpu().numpy()
        for norm in (True, False)
    )
    return LogitLens(
        places=tuple(places),
        normed=dict(zip(MEASURES, normed, strict=True)),
        plain=dict(zip(MEASURES, plain, strict=True)),
    )


def _measure(
    residual: Residual, logits_BTV: Tensor, targets_BT: Tensor
) -> tuple[list[Place], dict[bool, Tensor]]:
    """Places, and with the norm and without: (measures, K, B)."""
    states: list[tuple[Place, Tensor]] = []
    for layer, block in residual.blocks.items():
        if layer in residual.before:
            states.append((Place(layer=layer, at="before memory"), residual.before[layer]))
            states.append((Place(layer=layer, at="after memory"), residual.after[layer]))
        states.append((Place(layer=layer, at="block"), block))
    values = {
        norm: torch.stack(
            [_compared(residual, state, logits_BTV, targets_BT, norm) for _, state in states], dim=1
        )
        for norm in (True, False)
    }
    return [place for place, _ in states], values


def _compared(
    residual: Residual, state: Tensor, logits_BTV: Tensor, targets_BT: Tensor, norm: bool
) -> Tensor:
    """(measures, B), means over tokens."""
    step = max(1, CHUNK // (logits_BTV.shape[0] * logits_BTV.shape[2]))
    sums = []
    for begin in range(0, logits_BTV.shape[1], step):
        part = slice(begin, begin + step)
        own = residual.logits(residual.read(state[:, part], norm=norm)).float().log_softmax(-1)
        final = logits_BTV[:, part].float().log_softmax(-1)
        gap = final - own
        sums.append(
            torch.stack(
                [
                    (final.exp() * gap).sum((1, 2)),
                    -(own.exp() * gap).sum((1, 2)),
                    -own.gather(2, targets_BT[:, part, None]).sum((1, 2)),
                    (own.argmax(2) == final.argmax(2)).float().sum(1),
                ]
            )
        )
    return torch.stack(sums).sum(0) / logits_BTV.shape[1]
