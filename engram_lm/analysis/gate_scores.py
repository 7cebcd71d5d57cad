"""What gates tell apart: n-grams seen often from others, ends of names from other tokens.

Shapes: L Engram layers, N windows, T positions of a window, S streams.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engram_lm.analysis.ablation import memory_decoder
from engram_lm.analysis.auroc import auroc, auroc_interval
from engram_lm.analysis.bands import Integers, NgramCounts, ngram_keys
from engram_lm.analysis.findings import Estimate, GateScore, NgramGate
from engram_lm.analysis.gates import Values
from engram_lm.errors import DataError

FREQUENT = 10
"""Times in the corpus from which on an n-gram counts as seen often."""
SHOWN = 15
TIMES = 3
"""An n-gram must stand so often in the text before its mean gate is ranked."""


def gate_scores(
    layers: Sequence[int],
    gates_LNTS: Values,
    counts: Sequence[Integers],
    names_NT: npt.NDArray[np.bool_],
    since_NT: npt.NDArray[np.integer],
) -> list[GateScore]:
    """For each layer, stream and order. counts: order -> (N, T), how often the n-gram that ends at
    each position stood in the corpus; [] where nothing was counted, which gives one score for
    order 2 with names alone. since_NT: tokens that each position sees before it.

    Positions that see too few for an n-gram, where memory reads padding, are left out.
    """
    found = []
    for place, layer in enumerate(layers):
        for stream in range(gates_LNTS.shape[3]):
            for index, order in enumerate(range(2, 2 + max(1, len(counts)))):
                gates_NT = gates_LNTS[place, :, :, stream]
                whole_NT = since_NT >= order - 1
                named_NT = names_NT & whole_NT
                often_NT = whole_NT & (counts[index] >= FREQUENT if counts else False)
                some = bool(named_NT.any())
                found.append(
                    GateScore(
                        layer=layer,
                        stream=stream,
                        order=order,
                        frequent=int(often_NT.sum()),
                        auroc_frequent=told_apart(gates_NT, often_NT, whole_NT),
                        names=int(named_NT.sum()),
                        auroc_names=told_apart(gates_NT, named_NT, whole_NT),
                        gate_names=float(gates_NT[named_NT].mean()) if some else None,
                        gate_elsewhere=float(gates_NT[whole_NT & ~named_NT].mean())
                        if some
                        else None,
                    )
                )
    return found


def told_apart(
    scores_NT: Values, positive_NT: npt.NDArray[np.bool_], among_NT: npt.NDArray[np.bool_]
) -> Estimate | None:
    """AUROC of these against the rest of `among_NT`, with its interval over windows; None where one
    kind has no token."""
    try:
        mean = auroc(scores_NT[among_NT], positive_NT[among_NT])
        low, high = auroc_interval(scores_NT, positive_NT, among_NT)
    except DataError:
        return None
    return Estimate(mean=mean, low=low, high=high)


def ranked(
    model: Any,
    tokenizer: Any,
    ids_NT: Integers,
    gates_LNTS: Values,
    contributions_LNTS: Values,
    counts: NgramCounts | None,
) -> tuple[list[NgramGate], list[NgramGate]]:
    """The n-grams of the longest order with the highest mean gate, and those with the lowest.

    ids_NT: what the gates were taken of. An n-gram across a document's start is left out.
    """
    addresses = memory_decoder(model).memory.addresses
    order, canonical = addresses.specification.max_order, addresses.canonical
    separator = canonical.ids_V.numpy()[ids_NT[0, 0]]  # a text begins with one
    canonical_NT = canonical.ids_V.numpy()[ids_NT]
    keys, gates, added, ends = [], [], [], []
    for window, canonical_T in enumerate(canonical_NT):
        grams = np.lib.stride_tricks.sliding_window_view(canonical_T, order)
        inside = ~(grams == separator).any(axis=1)
        last = np.flatnonzero(inside) + order - 1
        keys.append(ngram_keys(canonical_T, order, canonical.canonical_ids)[inside])
        gates.append(gates_LNTS[:, window, last].mean(axis=(0, 2)))
        added.append(contributions_LNTS[:, window, last].mean(axis=(0, 2)))
        ends += [(window, int(position)) for position in last]
    _, first, place, times = np.unique(
        np.concatenate(keys), return_index=True, return_inverse=True, return_counts=True
    )
    mean_gate = np.bincount(place, np.concatenate(gates)) / times
    mean_added = np.bincount(place, np.concatenate(added)) / times
    often = np.flatnonzero(times >= TIMES)
    by_gate = often[np.argsort(-mean_gate[often], kind="stable")]

    def shown(which: int) -> NgramGate:
        window, end = ends[first[which]]
        known = None
        if counts is not None:
            known = int(counts.of(canonical_NT[window, : end + 1])[-1])
        return NgramGate(
            ngram=tokenizer.decode(
                ids_NT[window, end - order + 1 : end + 1], clean_up_tokenization_spaces=False
            ),
            times=int(times[which]),
            in_corpus=known,
            gate=float(mean_gate[which]),
            added=float(mean_added[which]),
        )

    half = min(SHOWN, len(by_gate) // 2)
    highest = [shown(which) for which in by_gate[:half]]
    return highest, [shown(which) for which in by_gate[::-1][:half]]
