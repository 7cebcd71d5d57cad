"""A model on the table: gates, logit lens, frequency bands, addresses; and, when asked, what each
part is worth and which layers of another model its own are like.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch

from engram_lm.analysis.ablation import memory_decoder
from engram_lm.analysis.alignment import align
from engram_lm.analysis.band_findings import band_findings
from engram_lm.analysis.bands import NgramCounts
from engram_lm.analysis.findings import Analysis, GateFindings
from engram_lm.analysis.lens_findings import lens_difference, lens_findings
from engram_lm.analysis.material import Integers, Material, trained_apart
from engram_lm.analysis.measure import Progress, measure
from engram_lm.analysis.measured import Measured
from engram_lm.errors import ConfigError

DEFAULT = ("gates", "lens", "bands", "addresses")
PARTS = (*DEFAULT, "alignment", "ablation", "suites")
WITHOUT_MEMORY = ("lens", "bands", "alignment")
"""Parts that a model without memory can be asked for."""


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
    parts: Sequence[str] | None = None,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """Measures without changing a model.

    parts: of PARTS; None: the default ones, and alignment where there is something to align with,
    without those that need a memory, a corpus or a suite that is not there. against: of the same
    tokenizer, and as many checkpoints. Documents are kept apart for a model of ours that was
    trained so (boundary rule "document"). ConfigError for parts that cannot be measured; DataError
    where text or corpus is too short, or what comes out is not a number.
    """
    wanted = _wanted(parts, subject.has_memory, against is not None, material)
    both = [subject] if against is None else [subject, against]
    _check(both, material)
    if any(trained_apart(model) for each in both for model in each.models):
        material = replace(material, apart=True)
    holder = next((each for each in both if each.has_memory), None)
    canonical_V: Integers = np.zeros(0, dtype=np.int64)
    counts: list[NgramCounts] = []
    if holder is not None:
        addresses = memory_decoder(holder.models[0]).memory.addresses
        canonical_V = addresses.canonical.ids_V.numpy()
        counts = material.counts(addresses.canonical, addresses.specification.max_order)
    found = {
        each.name: [
            measure(
                model,
                tokenizer,
                material,
                canonical_V,
                counts,
                wanted if each is subject else [part for part in wanted if part in WITHOUT_MEMORY],
                traced=number == 0,
                autocast=autocast,
                progress=_numbered(progress, each, number),
            )
            for number, model in enumerate(each.models)
        ]
        for each in both
    }
    return assemble(found, material, [each.order for each in counts])


def assemble(
    found: dict[str, list[Measured]],
    material: Material,
    orders: list[int],
) -> Analysis:
    """Name -> what was measured of each checkpoint, on this material: the subject's first, and what
    it is compared with, if anything, second; as many of both, seed by seed. orders: of the n-grams
    that were counted."""
    (name, own), *others = found.items()
    against, other = others[0] if others else (None, [])
    made: dict[str, Any] = {}
    if own[0].scores is not None:
        made["gates"] = GateFindings(
            traces=own[0].traces,
            scores=_each("scores", own),
            highest=own[0].highest,
            lowest=own[0].lowest,
        )
    if own[0].lens is not None:
        made["lens"] = {each: lens_findings(_each("lens", of)) for each, of in found.items()}
        if own[0].lens_off is not None:
            made["lens"][f"{name}, memory off"] = lens_findings(_each("lens_off", own))
        if against is not None:
            made["lens_difference"] = lens_difference(
                f"{name} \N{MINUS SIGN} {against}", _each("lens", own), _each("lens", other)
            )
    if own[0].losses_T is not None:
        losses = {each: np.stack(_each("losses_T", of)) for each, of in found.items()}
        if own[0].losses_off_T is not None:
            losses[f"{name}, memory off"] = np.stack(_each("losses_off_T", own))
        made["bands"] = band_findings(
            losses,
            orders,
            np.stack(_each("bands_OT", own)),
            text_bytes=material.stream_bytes,
            context=material.context,
        )
    if own[0].states_AID is not None and against is not None:
        states = _each("states_AID", other), _each("states_AID", own)
        made["alignment"] = align(against, states[0], name, states[1], own[0].where)
    if own[0].addresses is not None:
        made["addresses"] = own[0].addresses
    for part in ("ablation", "suites"):
        if getattr(own[0], part) is not None:
            made[part] = _each(part, own)
    seconds: dict[str, float] = {}
    for each in chain(own, other):
        for part, spent in each.seconds.items():
            seconds[part] = seconds.get(part, 0.0) + spent
    return Analysis(
        name=name,
        against=against,
        checkpoints=len(own),
        text=material.text,
        tokens=len(material.stream_T) - 1,
        bytes=material.stream_bytes,
        corpus=material.corpus,
        context=material.context,
        names=material.names,
        apart=material.apart,
        seconds=seconds,
        **made,
    )


def _check(both: Sequence[Subject], material: Material) -> None:
    subject, *others = both
    for each in both:
        sizes = {model.config.vocab_size for model in each.models}
        if sizes != {subject.models[0].config.vocab_size}:
            raise ConfigError(f"{each.name}: vocabularies of {sorted(sizes)} ids, not one and same")
        positions = getattr(each.models[0].config, "max_position_embeddings", material.context)
        if positions < material.context:
            raise ConfigError(f"context={material.context}: {each.name} has {positions} positions")
    for other in others:
        if len(other.models) != len(subject.models):
            raise ConfigError(
                f"{len(subject.models)} of {subject.name}, {len(other.models)} of {other.name}: "
                "as many checkpoints of both are needed, seed by seed"
            )
        if other.name == subject.name:
            raise ConfigError(f"{other.name}: the name of both models")


def _wanted(
    parts: Sequence[str] | None, has_memory: bool, has_other: bool, material: Material
) -> list[str]:
    needs = {
        "a memory": [part for part in PARTS if part not in WITHOUT_MEMORY and not has_memory],
        "a model to compare with (--against)": [] if has_other else ["alignment"],
        "a corpus (--corpus)": ["addresses"] if material.corpus_C is None else [],
        "a suite (--set suites.names=NAME)": [] if material.suites else ["suites"],
    }
    if parts is None:
        lacking = {part for named in needs.values() for part in named}
        return [part for part in (*DEFAULT, "alignment", "suites") if part not in lacking]
    for part in parts:
        if part not in PARTS:
            raise ConfigError(f"parts: {part!r}; there are {', '.join(PARTS)}")
        for need, named in needs.items():
            if part in named:
                raise ConfigError(f"{part}: {need} is needed")
    if not parts:
        raise ConfigError(f"parts: none; there are {', '.join(PARTS)}")
    return [part for part in PARTS if part in parts]


def _each(part: str, checkpoints: Sequence[Measured]) -> list[Any]:
    return [getattr(checkpoint, part) for checkpoint in checkpoints]


def _numbered(progress: Progress | None, subject: Subject, number: int) -> Progress | None:
    if progress is None:
        return None
    last = f" {number + 1} of {len(subject.models)}" if len(subject.models) > 1 else ""

    def tell(what: str, done: int, of: int) -> None:
        progress(f"{subject.name}{last}, {what}", done, of)

    return tell
