"""What recipes/two_source.py found, run by run, put together: summary, figure and report."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import two_source_claims
from two_source_figure import draw

from engram_lm.analysis.ablation_losses import retention
from engram_lm.analysis.analyze import assemble
from engram_lm.analysis.findings import Analysis
from engram_lm.analysis.material import Material
from engram_lm.analysis.measured import Measured
from engram_lm.analysis.report import write_report
from engram_lm.analysis.student import spread
from engram_lm.analysis.suite_ablation import WHOLE
from engram_lm.studies.record import Record
from engram_lm.train.provenance import machine

OWN, OTHER = "Engram", "MoE"


def summarise(
    results: Path,
    out: Path,
    material: Material,
    max_order: int,
    seeds: list[int],
    chance: float,
    command: str,
) -> dict[str, float]:
    """Reads ARM-SEED.json and .safetensors of both arms and all seeds; writes results.json, its
    figure, and out/report."""
    runs = {
        arm: [json.loads((results / f"{arm}-{seed}.json").read_text()) for seed in seeds]
        for arm in (OWN, OTHER)
    }
    record = Record(results.name, precision=runs[OWN][0].get("precision", "bf16"))
    found = {
        arm: [Measured.load(results / f"{arm}-{seed}.safetensors") for seed in seeds]
        for arm in (OWN, OTHER)
    }
    analysis = assemble(found, material, list(range(2, max_order + 1)))
    by_seed = [
        {**own["asked"], **other["asked"]} for own, other in zip(*runs.values(), strict=True)
    ]
    flat = {
        "seeds": len(seeds),
        "tokens": runs[OWN][0]["tokens"],
        "chance": chance,
        **asked(by_seed, chance, runs[OWN][0]["questions"]),
        **layers(analysis, found),
        **gates(analysis),
        **parts(analysis),
        **kept(analysis),
    }
    record.write(
        flat,
        {"runs": runs, "asked": by_seed, "analysis": plain(analysis)},
        seeds=seeds,
        before=sum(run["training_seconds"] for each in runs.values() for run in each),
    )
    draw(record.path)
    two_source_claims.draw(record.path)
    write_report(out / "report", analysis, command=f"$ {command}", about=machine())
    return flat


def asked(
    by_seed: list[dict[str, dict[str, float]]], chance: float, number: int
) -> dict[str, float]:
    """Share of right answers with every switch, to so many questions of each kind; what is
    retained, raw and above chance, of what is 4 standard errors of a guess above chance."""
    values: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        plain_name = name.replace(", ", "_").replace(" ", "_").replace("/", "_")
        values.setdefault(plain_name, []).append(value)

    told = chance + 4 * (chance * (1 - chance) / number) ** 0.5
    for seed in by_seed:
        for name, kinds in seed.items():
            whole = seed[name.split(", ")[0]]
            for kind, score in kinds.items():
                add(f"{name} {kind}", score)
                if ", " in name and whole[kind] > told:
                    add(f"{name} {kind} retained", retention(score, whole[kind]))
                    add(f"{name} {kind} above chance", retention(score, whole[kind], chance))
    return {
        f"{name}_{what}": number
        for name, each in values.items()
        if len(each) == len(by_seed)  # a score at chance in one seed retains nothing there
        for what, number in spread(each).items()
    }


def layers(analysis: Analysis, found: dict[str, list[Measured]]) -> dict[str, float]:
    """LogitLens, seed by seed: block by block, and means over all blocks but the last and over
    those below the middle. Alignment, MoE by MoE, for an index depends on whose blocks it counts
    in: the index, the null's, and how far one lies above the other; which block is most like each
    (k = 1), for of few layers the index of 5 lies in the middle whatever they are."""
    flat: dict[str, float] = {}
    for measure in ("final_to_layer", "layer_to_final", "loss"):
        blocks = {
            arm: np.array(
                [each.lens.of_blocks(measure).mean(1) for each in checkpoints if each.lens]
            )
            for arm, checkpoints in found.items()
        }
        off = [each.lens_off.of_blocks(measure).mean(1) for each in found[OWN] if each.lens_off]
        blocks[f"{OWN}_memory_off"] = np.array(off)
        blocks["difference"] = blocks[OWN] - blocks[OTHER]
        for arm, values in blocks.items():
            layers = values.shape[1]
            flat |= named(f"lens_{measure}_{arm}", values[:, :-1].mean(1).tolist())
            lower = values[:, : layers // 2].mean(1).tolist()
            flat |= named(f"lens_{measure}_{arm}_below_middle", lower)
            for layer in range(layers):
                flat |= named(f"lens_{measure}_{arm}_block_{layer}", values[:, layer].tolist())
    aligned = analysis.alignment
    assert aligned is not None
    index = np.array(aligned.index).reshape(len(found[OTHER]), -1, len(aligned.likest)).mean(1)
    for layer, likest in enumerate(aligned.likest):
        flat |= named(f"alignment_index_block_{layer}", index[:, layer].tolist())
        flat[f"alignment_most_like_block_{layer}"] = likest
        if aligned.null_index:
            above = [moe[layer] for moe in aligned.above]
            flat |= named(f"alignment_above_null_block_{layer}", above)
            null = (index[:, layer] - above).tolist()
            flat |= named(f"alignment_null_block_{layer}", null)
            flat[f"alignment_null_most_like_block_{layer}"] = aligned.null_likest[layer]
    return flat


def gates(analysis: Analysis) -> dict[str, float]:
    """AUROC of each gate for the ends of names and for frequent n-grams."""
    assert analysis.gates is not None
    flat: dict[str, float] = {}
    for together in zip(*analysis.gates.scores, strict=True):
        first = together[0]
        place = f"layer_{first['layer']}_stream_{first['stream']}_order_{first['order']}"
        for key in ("auroc_names", "auroc_frequent"):
            known = [score[key]["mean"] for score in together if score[key] is not None]
            if len(known) == len(together):
                flat |= named(f"gate_{key}_{place}", known)
    return flat


def parts(analysis: Analysis) -> dict[str, float]:
    """Change in loss on held-out documents without each part of the memory."""
    assert analysis.ablation is not None
    flat: dict[str, float] = {}
    for together in zip(*analysis.ablation, strict=True):
        if "head" not in together[0].name:
            name = together[0].name.replace(" ", "_")
            flat |= named(f"without_{name}", [part.change for part in together])
    return flat


def kept(analysis: Analysis) -> dict[str, float]:
    """What every suite's score keeps above chance without each part of the memory, where it has a
    score above chance with all of them in all seeds."""
    assert analysis.suites is not None
    flat: dict[str, float] = {}
    for together in zip(*analysis.suites, strict=True):
        first = together[0]
        known = [row["above_chance"] for row in together if row["above_chance"] is not None]
        if first["part"] != WHOLE and first["metric"] == "right" and len(known) == len(together):
            name = f"kept_{first['part']}_{first['suite']}_{first['kind']}"
            flat |= named(name.replace(" ", "_").replace("/", "_"), known)
    return flat


def named(name: str, values: list[float]) -> dict[str, float]:
    return {f"{name}_{what}": number for what, number in spread(values).items()}


def plain(analysis: Analysis) -> dict[str, Any]:
    """Everything but texts coloured by gates, which stand in the report."""
    made = asdict(analysis)
    made["gates"]["traces"] = []
    return made
