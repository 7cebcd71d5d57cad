"""What merging saves on real text, and the paper's models planned on 64 to 512 workers.

    python recipes/debian_text.py --out runs/debian
    engram data runs/debian/*.jsonl --out runs/debian/deepseek --tokenizer tokenizer.json \
        --separator '<｜end▁of▁sentence｜>'
    python benchmarks/scaling.py --data runs/debian/deepseek

Distinct rows are counted with the addressing of `engram_27b` and `engram_40b` at full size, in
worker batches drawn from the text as training draws them; no table is allocated. tokenizer.json is
DeepSeek's, whose 129,280 ids are the paper's. Writes results/scaling.json and docs/scaling.svg; the
last line printed is the summary.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter
from rich.console import Console

from engram_lm.analysis.figures import BLUE, GRID, INK, VERMILION, save
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.ngrams_numba import CompiledAddresses
from engram_lm.memory.specification import Specification
from engram_lm.model.cluster import Cluster, Job
from engram_lm.model.plan import Plan, Sizes
from engram_lm.model.presets import engram_27b, engram_40b, for_vocabulary
from engram_lm.model.row_profile import MeasuredProfile, zipf_distinct
from engram_lm.studies.record import Record
from engram_lm.train.row_samples import sampled_profile
from engram_lm.train.shards import Shards

CONTEXT, TOKENS = 4_096, 1280 * 4_096
WORKERS = (64, 128, 256, 512)
SEQUENCES = tuple(2**power for power in range(11))
"""Per worker batch: 4,096 tokens to 4.2 million."""
ROWS = 2_262_400
"""Per head of engram_27b, where the figure's law has n-grams share rows."""
FITTED = (16, 64, 256)
"""Sequences per batch that Zipf's exponents are fitted to: 65,536 tokens to a million."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("runs/debian/deepseek"))
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the figure goes")
    arguments = parser.parse_args()
    record, console = Record("scaling"), Console(stderr=True)
    shards = Shards(arguments.data)
    stream, canonical = shards.split("train"), CanonicalMap.from_tokenizer(shards.encoder.fast())
    summary: dict[str, float] = {"text_tokens": len(stream)}
    raw: dict[str, Any] = {"plans": {}, "distinct": {}}

    console.print("counting distinct n-grams")
    ngrams = _ngrams(stream, canonical, shards.encoder.separator_id)
    shares = {
        order: {size: float(ngrams.distinct(size)[0, order - 2]) / size for size in ngrams.sizes}
        for order in (2, 3, 4)
    }
    for order, found in shares.items():
        summary[f"zipf_exponent_{order}"] = _exponent(found)
        raw["distinct"][str(order)] = {str(size): share for size, share in found.items()}

    for name, preset in (("27b", engram_27b), ("40b", engram_40b)):
        console.print(f"addressing engram_{name}")
        config = for_vocabulary(
            preset(),
            token_ids=shards.encoder.token_ids,
            separator_id=shards.encoder.separator_id,
            padding_id=shards.encoder.padding_id,
        )
        memory = config.memory_config
        assert memory is not None
        addresses = CompiledAddresses(memory.specification, canonical)
        sizes = [1, 2, 3, 4] if name == "40b" else [*SEQUENCES, 3]
        profile = _sampled(stream, addresses, sizes)
        for size in profile.sizes:
            rows_LH = profile.distinct(size)
            for order, part in ((2, rows_LH[:, :8]), (3, rows_LH[:, 8:])):
                share = float(part.mean()) / size
                raw["distinct"].setdefault(f"engram_{name} order {order}", {})[str(size)] = share
                if name == "27b" and size in (16_384, 65_536, 1_048_576):
                    summary[f"share_{order}grams_{size}"] = share
        for workers in WORKERS:
            plan = Plan(
                sizes=Sizes.of(config, CONTEXT),
                profile=profile,
                cluster=Cluster(workers=workers),
                job=Job(tokens=TOKENS, context=CONTEXT),
            )
            raw["plans"][f"engram_{name} {workers}"] = plan.to_dict()
            summary |= {f"{key}_{name}_{workers}": value for key, value in _short(plan).items()}
    drawn = {order: raw["distinct"][f"engram_27b order {order}"] for order in (2, 3)}
    exponents = {order: summary[f"zipf_exponent_{order}"] for order in (2, 3)}
    save(_figure(drawn, exponents), arguments.docs, "scaling")
    record.write(summary, raw, seeds=[0])
    print(json.dumps(summary))


def _sampled(stream: Any, addresses: Any, sequences: Any) -> MeasuredProfile:
    """Larger batches vary less, and there is text for fewer of them."""
    points: dict[int, Any] = {}
    for size in sorted(sequences):
        batches = max(1, min(16, 256 // size))
        profile = sampled_profile(
            stream, addresses, context=CONTEXT, sequences=[size], batches=batches
        )
        points |= profile.points
    return MeasuredProfile(addresses.specification, points)


def _ngrams(stream: Any, canonical: CanonicalMap, separator: int) -> MeasuredProfile:
    """One head for each order, so wide that hardly two n-grams share a row."""
    specification = Specification(
        layers=(1,),
        rows_per_head=(2**44,) * 3,
        heads=1,
        pad_id=separator,
        boundary_rule="document",
    )
    return _sampled(stream, CompiledAddresses(specification, canonical), FITTED)


def _exponent(shares: dict[int, float]) -> float:
    """Zipf's exponent with the least squared error of the logarithm of distinct n-grams."""
    candidates = np.arange(1.01, 1.6, 0.005)
    errors = [
        sum(
            np.log(zipf_distinct(exponent, size) / (share * size)) ** 2
            for size, share in shares.items()
        )
        for exponent in candidates
    ]
    return round(float(candidates[int(np.argmin(errors))]), 3)


def _short(plan: Plan) -> dict[str, float]:
    """What docs/scaling.md shows of a plan."""
    rows = [found[2] for found in plan.exchanges().values()]
    unmerged = [found[2] for found in plan.exchanges(merged=False).values()]
    memory, waits = plan.memory, plan.waits
    whole = replace(plan, job=replace(plan.job, backbone="ddp"))
    return {
        "passes": plan.passes,
        "pass_tokens": plan.pass_tokens,
        "shard_rows": sum(plan.shard.values()),
        "table_gb": (memory["table rows"] + memory["row moments"]) / 1e9,
        "memory_gb": sum(memory.values()) / 1e9,
        "ddp_memory_gb": sum(whole.memory.values()) / 1e9,
        "rows_mb": sum(each.busiest_bytes for each in rows) / 1e6,
        "unmerged_mb": sum(each.busiest_bytes for each in unmerged) / 1e6,
        "backbone_gb": plan.backbone_bytes / 1e9,
        "before_ms": waits.before[1] * 1e3,
        "arrive_ms": waits.arrive[1] * 1e3,
        "waits_ms": (waits.rows + waits.gradients) * 1e3,
        "pass_s": waits.compute,
        "backbone_wait_s": waits.backbone,
        "checkpoint_gb": plan.checkpoint_bytes / 1e9,
        "checkpoint_s": plan.checkpoint_seconds,
        "fewest": plan.fewest or 0,
        "late": plan.late or 0,
        **{f"strain_{part}": value for part, value in plan.strain.items()},
    }


def _figure(shares: Mapping[int, Mapping[str, float]], exponents: Mapping[int, float]) -> Figure:
    """Order -> tokens per batch -> distinct rows over requests; dashed: Zipf's law."""
    with matplotlib.rc_context({"font.size": 10, "svg.fonttype": "path"}):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for (order, found), colour, marker in zip(
            shares.items(), (BLUE, VERMILION), ("o", "s"), strict=True
        ):
            points = sorted((int(size), share) for size, share in found.items())
            sizes, values = zip(*points, strict=True)
            axes.plot(sizes, values, color=colour, marker=marker, markersize=4.5, linewidth=1.4)
            ngrams = np.array([zipf_distinct(exponents[order], size) for size in sizes])
            law = -ROWS * np.expm1(ngrams * np.log1p(-1 / ROWS)) / sizes
            axes.plot(sizes, law, color=colour, linestyle="--", linewidth=1)
            axes.annotate(
                f"{order}-grams",
                (sizes[-1], values[-1]),
                xytext=(6, 0),
                textcoords="offset points",
                color=colour,
                weight="bold",
                va="center",
                annotation_clip=False,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks([2**power for power in (12, 14, 16, 18, 20, 22)])
        axes.xaxis.set_major_formatter(FuncFormatter(_tokens))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("tokens of a worker's batch")
        axes.set_ylabel("distinct rows / requests")
        title = "line: counted   dashed: Zipf's law, fitted"
        axes.set_title(title, loc="left", fontsize=9.5, color=INK)
        return figure


def _tokens(value: float, _position: int = 0) -> str:
    return f"{value / 2**20:g}M" if value >= 2**20 else f"{value / 2**10:g}k"


if __name__ == "__main__":
    main()
