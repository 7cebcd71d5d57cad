"""A model on the table: gates, logit lens, frequency bands, addresses; and, when asked, what each
part is worth and which layers of another model its own are like.

Shapes: S checkpoints, T tokens of the text, N windows.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engram_lm.analysis import alignment
from engram_lm.analysis.ablation import memory_decoder, memory_off
from engram_lm.analysis.ablation_losses import TOKENS, AblationLoss, ablation_losses
from engram_lm.analysis.ablation_losses import parts as ablations
from engram_lm.analysis.band_findings import band_findings
from engram_lm.analysis.bands import NgramCounts, window_bands
from engram_lm.analysis.findings import (
    AlignmentFindings,
    Analysis,
    BandFindings,
    GateFindings,
    LensFindings,
)
from engram_lm.analysis.gate_scores import gate_scores, ranked
from engram_lm.analysis.gates import GateTrace, gate_trace, stream_gates
from engram_lm.analysis.lens_findings import lens_findings
from engram_lm.analysis.logit_lens import logit_lens
from engram_lm.analysis.material import Material
from engram_lm.analysis.row_sharing import OrderSharing, RowSharing
from engram_lm.analysis.suite_ablation import PartScore, suite_ablation
from engram_lm.errors import ConfigError
from engram_lm.evaluate.token_losses import token_losses

DEFAULT = ("gates", "lens", "bands", "addresses")
PARTS = (*DEFAULT, "alignment", "ablation", "suites")
NEED_MEMORY = ("gates", "addresses", "ablation", "suites")
LENS_TEXTS = 64
"""Windows that the lens reads, at most: it makes logits of every layer."""
BATCH = 8

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how far it is, and of how much."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model: one checkpoint, or several that differ in their seeds alone."""

    name: str
    models: Sequence[Any]

    @property
    def has_memory(self) -> bool:
        return getattr(self.models[0].config, "memory_config", None) is not None


def analyze(
    subject: Subject,
    tokenizer: Any,
    material: Material,
    *,
    against: Subject | None = None,
    parts: Sequence[str] = DEFAULT,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """Measures without changing a model. Parts that need a memory are left out where the subject
    has none, and those that nothing was given for.

    against: of the same tokenizer. ConfigError for a part that there is not, or when nothing is
    left to do; DataError where text or corpus is too short.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ConfigError(f"parts: {unknown[0]!r}; there are {', '.join(PARTS)}")
    wanted = [part for part in PARTS if part in parts]
    needs = {
        "a memory": NEED_MEMORY if not subject.has_memory else (),
        "a model to compare with": ("alignment",) if against is None else (),
        "a corpus": ("addresses",) if material.corpus_C is None else (),
        "a suite": ("suites",) if not material.suites else (),
    }
    wanted = [part for part in wanted if not any(part in named for named in needs.values())]
    if not wanted:
        missing = [need for need, named in needs.items() if set(parts) & set(named)]
        raise ConfigError(f"{', '.join(parts)}: {' and '.join(missing)} is needed")
    for each in (subject, against) if against else (subject,):
        sizes = {model.config.vocab_size for model in each.models}
        if sizes != {subject.models[0].config.vocab_size}:
            raise ConfigError(f"{each.name}: vocabularies of {sorted(sizes)} ids, not one and same")
    work = _Work(subject, tokenizer, material, against, autocast, progress or _silent)
    found: dict[str, Any] = {}
    seconds = {}
    for part in wanted:
        begun = time.perf_counter()
        found[part] = getattr(work, part)()
        seconds[part] = time.perf_counter() - begun
    return Analysis(
        name=subject.name,
        against=None if against is None else against.name,
        checkpoints=len(subject.models),
        checkpoints_against=0 if against is None else len(against.models),
        text=material.text,
        tokens=len(material.stream_T) - 1,
        bytes=material.stream_bytes,
        corpus=material.corpus,
        context=material.context,
        seconds=seconds,
        **found,
    )


class _Work:
    """What the parts have in common. One method a part."""

    def __init__(
        self,
        subject: Subject,
        tokenizer: Any,
        material: Material,
        against: Subject | None,
        autocast: torch.dtype | None,
        progress: Progress,
    ) -> None:
        self.subject, self.tokenizer, self.material = subject, tokenizer, material
        self.subjects = [subject] if against is None else [subject, against]
        self.autocast, self.progress = autocast, progress
        self.canonical: npt.NDArray[Any] = np.zeros(0)
        self.counts: list[NgramCounts] = []
        self.sharing: dict[tuple[int, int], RowSharing] | None = None
        holder = next((each for each in self.subjects if each.has_memory), None)
        if holder is not None:
            addresses = memory_decoder(holder.models[0]).memory.addresses
            self.canonical = addresses.canonical.ids_V.numpy()
            self.counts = material.counts(addresses.canonical, addresses.specification.max_order)

    def gates(self) -> GateFindings:
        windows_NT = self.material.windows_NT[:, :-1]
        traces = [self._trace(sentence) for sentence in self.material.sentences]
        names_NT = self.material.names_T[: windows_NT.size].reshape(windows_NT.shape)
        canonical_NT = self.canonical[windows_NT]
        counts = [
            np.stack([each.of(canonical_T) for canonical_T in canonical_NT]) for each in self.counts
        ]
        scores = []
        for number, model in enumerate(self.subject.models):
            layers = memory_decoder(model).memory.addresses.layers
            gates, added = stream_gates(
                model,
                windows_NT,
                batch=BATCH,
                autocast=self.autocast,
                progress=self._told("gates", number, len(self.subject.models), len(windows_NT)),
            )
            scores.append(gate_scores(layers, gates, counts, names_NT))
            if number == 0:
                counted = self.counts[-1] if self.counts else None
                highest, lowest = ranked(model, self.tokenizer, windows_NT, gates, added, counted)
        return GateFindings(
            traces=traces, scores=scores, highest=highest, lowest=lowest, tokens=windows_NT.size
        )

    def lens(self) -> dict[str, LensFindings]:
        windows_NT = self.material.windows_NT[:LENS_TEXTS]
        found = {}
        for each in self.subjects:
            lenses = [
                logit_lens(
                    model,
                    windows_NT,
                    autocast=self.autocast,
                    progress=self._told("logit lens", number, len(each.models), len(windows_NT)),
                )
                for number, model in enumerate(each.models)
            ]
            found[each.name] = lens_findings(lenses)
        return found

    def bands(self) -> BandFindings:
        losses = {each.name: self._losses(each, off=False) for each in self.subjects}
        if self.subject.has_memory:
            losses[f"{self.subject.name}, memory off"] = self._losses(self.subject, off=True)
        by_order = [
            window_bands(each, self.canonical[self.material.stream_T], self.material.context)
            for each in self.counts
        ]
        return band_findings(
            losses,
            [each.order for each in self.counts],
            by_order,
            text_bytes=self.material.stream_bytes,
            context=self.material.context,
        )

    def addresses(self) -> list[OrderSharing]:
        return [sharing.summary() for sharing in self._sharing().values()]

    def alignment(self) -> AlignmentFindings:
        other = self.subjects[1]
        where_I2, where = alignment.places(self.material)
        states = {
            each.name: [
                alignment.states(
                    model,
                    self.material.windows_NT,
                    where_I2,
                    batch=BATCH,
                    progress=self._told(
                        "hidden states", number, len(each.models), len(self.material.windows_NT)
                    ),
                )
                for number, model in enumerate(each.models)
            ]
            for each in self.subjects
        }
        return alignment.align(
            other.name, states[other.name], self.subject.name, states[self.subject.name], where
        )

    def ablation(self) -> list[list[AblationLoss]]:
        models = self.subject.models
        passes = 1 + len(ablations(models[0], {}, heads=True))
        steps = count(0)
        return [
            ablation_losses(
                model,
                self.material.stream_T[: TOKENS + 1],
                context=self.material.context,
                batch=BATCH,
                counts=self.counts,
                heads=True,
                autocast=self.autocast,
                progress=lambda name: self.progress(
                    f"ablation: {name}", next(steps), passes * len(models)
                ),
            )
            for model in models
        ]

    def suites(self) -> list[list[PartScore]]:
        models, material = self.subject.models, self.material
        passes = (
            len(models) * len(material.suites) * (1 + len(ablations(models[0], {}, heads=False)))
        )
        steps = count(0)
        return [
            suite_ablation(
                model,
                self.tokenizer,
                material.suites,
                questions=material.questions,
                progress=lambda name: self.progress(f"suites: {name}", next(steps), passes),
            )
            for model in models
        ]

    def _losses(self, each: Subject, *, off: bool) -> npt.NDArray[np.float64]:
        """(S, T), nats."""
        ids_T = self.material.stream_T
        name = f"losses of {each.name}{', memory off' if off else ''}"
        found = []
        for number, model in enumerate(each.models):
            with memory_off(model) if off else nullcontext():
                losses_T = token_losses(
                    model,
                    ids_T,
                    context=self.material.context,
                    batch=BATCH,
                    autocast=self.autocast,
                    progress=self._told(name, number, len(each.models), len(ids_T) - 1),
                )
            found.append(losses_T.astype(np.float64))
        return np.stack(found)

    def _sharing(self) -> dict[tuple[int, int], RowSharing]:
        """(layer, order) -> who reads the rows; {} without a corpus."""
        if self.material.corpus_C is None:
            return {}
        if self.sharing is None:
            addresses = memory_decoder(self.subject.models[0]).memory.addresses
            orders = range(2, addresses.specification.max_order + 1)
            tables = [(layer, order) for layer in addresses.layers for order in orders]
            self.sharing = {}
            for done, (layer, order) in enumerate(tables):
                self.progress("n-grams on rows", done, len(tables))
                self.sharing[layer, order] = RowSharing(
                    addresses, self.material.corpus_C, layer, order
                )
        return self.sharing

    def _trace(self, sentence: str) -> GateTrace:
        """With counts and sharers, where there is a corpus."""
        trace = gate_trace(self.subject.models[0], self.tokenizer, sentence)
        sharing = self._sharing()
        if not sharing:
            return trace
        canonical_T = self.canonical[np.array(trace.ids)]
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

    def _told(self, what: str, number: int, models: int, steps: int) -> Callable[[int], None]:
        def tell(done: int) -> None:
            self.progress(what, number * steps + done, models * steps)

        return tell


def _silent(_what: str, _done: int, _of: int) -> None:
    return None
