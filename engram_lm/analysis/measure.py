"""Reads everything that an analysis needs off one checkpoint, part by part.

Shapes: N windows, T positions of a window.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch

from engram_lm.analysis import alignment
from engram_lm.analysis.ablation import memory_decoder, memory_off
from engram_lm.analysis.ablation_losses import TOKENS, ablation_losses, ablations
from engram_lm.analysis.bands import NgramCounts
from engram_lm.analysis.gate_scores import gate_scores, ranked
from engram_lm.analysis.gates import GateTrace, gate_trace, stream_gates
from engram_lm.analysis.logit_lens import LogitLens, logit_lens
from engram_lm.analysis.material import Integers, Material
from engram_lm.analysis.measured import Measured, Nats
from engram_lm.analysis.row_sharing import RowSharing, sharing_of
from engram_lm.analysis.suite_ablation import suite_ablation
from engram_lm.errors import DataError
from engram_lm.evaluate.token_losses import token_losses

LENS_TEXTS = 64
"""Windows that the lens reads, at most: it makes logits of every layer."""
BATCH = 8

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how far it is, and of how much."""


def measure(
    model: Any,
    tokenizer: Any,
    material: Material,
    canonical_V: Integers,
    counts: Sequence[NgramCounts],
    parts: Sequence[str],
    *,
    traced: bool = True,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Measured:
    """The model stays as it is. parts: of analyze.PARTS, those that this model can be asked for.

    counts: of the material's corpus, orders 2 and up; canonical_V: of each token id, as they have
    it. traced: colours sentences and ranks n-grams as well, which a report needs of one checkpoint
    only.
    """
    found = Measured()
    work = _Measuring(
        model, tokenizer, material, canonical_V, counts, traced, autocast, progress or silent
    )
    for part in parts:
        begun = time.perf_counter()
        getattr(work, part)(found)
        found.seconds[part] = time.perf_counter() - begun
    return found


@dataclass
class _Measuring:
    """One method a part."""

    model: Any
    tokenizer: Any
    material: Material
    canonical_V: Integers
    counts: Sequence[NgramCounts]
    traced: bool
    autocast: torch.dtype | None
    progress: Progress
    known: dict[tuple[int, int], RowSharing] | None = None

    def gates(self, found: Measured) -> None:
        windows_NT = self.material.windows_NT[:, :-1]
        addresses = memory_decoder(self.model).memory.addresses
        canonical_NT = self.canonical_V[windows_NT]
        counts = [
            np.stack([each.of(canonical_T) for canonical_T in canonical_NT]) for each in self.counts
        ]
        since_NT = self.material.positions_NT
        if since_NT is None:
            since_NT = np.broadcast_to(np.arange(self.material.context), windows_NT.shape)
        gates, added = stream_gates(
            self.model,
            windows_NT,
            positions_NT=self.material.positions_NT,
            batch=BATCH,
            autocast=self.autocast,
            progress=self._told("gates", len(windows_NT)),
        )
        found.scores = gate_scores(
            addresses.layers, gates, counts, self.material.named_NT, since_NT
        )
        if self.traced:
            counted = self.counts[-1] if self.counts else None
            found.highest, found.lowest = ranked(
                self.model, self.tokenizer, windows_NT, gates, added, counted
            )
            found.traces = [self._trace(sentence) for sentence in self.material.sentences]

    def lens(self, found: Measured) -> None:
        found.lens = self._lens("logit lens")
        if self._has_memory:
            with memory_off(self.model):
                found.lens_off = self._lens("logit lens, memory off")

    def bands(self, found: Measured) -> None:
        found.bands_OT = self.material.bands(self.counts, self.canonical_V)
        found.losses_T = self._losses("losses")
        if self._has_memory:
            with memory_off(self.model):
                found.losses_off_T = self._losses("losses, memory off")

    def addresses(self, found: Measured) -> None:
        found.addresses = [sharing.summary() for sharing in self._sharing().values()]

    def alignment(self, found: Measured) -> None:
        windows_NT = self.material.windows_NT
        where_I2, found.where = alignment.places(self.material)
        found.states_AID = alignment.states(
            self.model,
            windows_NT,
            where_I2,
            positions_NT=self.material.positions_NT,
            batch=BATCH,
            progress=self._told("hidden states", len(windows_NT)),
        )

    def ablation(self, found: Measured) -> None:
        passes, steps = 1 + len(ablations(self.model, {}, {}, heads=True)), count(0)
        found.ablation = ablation_losses(
            self.model,
            self.material.stream_T[: TOKENS + 1],
            context=self.material.context,
            batch=BATCH,
            counts=self.counts,
            starts_T=self.material.read_starts_T,
            heads=True,
            autocast=self.autocast,
            progress=lambda name: self.progress(f"ablation: {name}", next(steps), passes),
        )

    def suites(self, found: Measured) -> None:
        heads = self.material.heads
        each = 1 + len(ablations(self.model, {}, {}, heads=heads))
        passes, steps = len(self.material.suites) * each, count(0)
        found.suites = suite_ablation(
            self.model,
            self.tokenizer,
            self.material.suites,
            questions=self.material.questions,
            heads=heads,
            progress=lambda name: self.progress(f"suites: {name}", next(steps), passes),
        )

    @property
    def _has_memory(self) -> bool:
        return getattr(self.model.config, "memory_config", None) is not None

    def _lens(self, said: str) -> LogitLens:
        windows_NT = self.material.windows_NT[:LENS_TEXTS]
        positions_NT = self.material.positions_NT
        return logit_lens(
            self.model,
            windows_NT,
            positions_NT=None if positions_NT is None else positions_NT[:LENS_TEXTS],
            autocast=self.autocast,
            progress=self._told(said, len(windows_NT)),
        )

    def _losses(self, said: str) -> Nats:
        ids_T = self.material.stream_T
        losses_T = token_losses(
            self.model,
            ids_T,
            context=self.material.context,
            batch=BATCH,
            starts_T=self.material.read_starts_T,
            autocast=self.autocast,
            progress=self._told(said, len(ids_T) - 1),
        ).astype(np.float64)
        if not np.isfinite(losses_T).all():
            raise DataError(f"{said}: some are not finite numbers")
        return losses_T

    def _sharing(self) -> dict[tuple[int, int], RowSharing]:
        """(layer, order) -> who reads the rows; {} without a corpus."""
        if self.material.corpus_C is None:
            return {}
        if self.known is None:
            self.known = sharing_of(
                memory_decoder(self.model).memory.addresses,
                self.material.corpus_C,
                self.material.corpus_starts_C,
                partial(self.progress, "n-grams on rows"),
            )
        return self.known

    def _trace(self, sentence: str) -> GateTrace:
        """With counts and sharers, where there is a corpus."""
        trace = gate_trace(self.model, self.tokenizer, sentence)
        sharing = self._sharing()
        if not sharing:
            return trace
        canonical_T = self.canonical_V[np.array(trace.ids)]
        columns = len(trace.rows[0][0]) // len(trace.orders)
        sharers = [
            np.concatenate(
                [
                    sharing[layer, order].of(rows_TH[:, at * columns : (at + 1) * columns])
                    for at, order in enumerate(trace.orders)
                ],
                axis=1,
            ).tolist()
            for layer, rows_TH in zip(trace.layers, map(np.array, trace.rows), strict=True)
        ]
        return replace(
            trace,
            counts=[each.of(canonical_T).tolist() for each in self.counts],
            sharers=sharers,
        )

    def _told(self, what: str, steps: int) -> Callable[[int], None]:
        return lambda done: self.progress(what, done, steps)


def silent(_what: str, _done: int, _of: int) -> None:
    """For who does not want to know."""
