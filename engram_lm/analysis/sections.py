"""The parts of an analysis as sections of a page, and their figures as files.

What each figure shows and what would refute it stands in pages/*.html; here are the numbers.
"""

from pathlib import Path

from engram_lm.analysis import cells, figures, map_figures, part_figures
from engram_lm.analysis.ablation_losses import TOKENS
from engram_lm.analysis.bands import BANDS, BandLoss, half
from engram_lm.analysis.escape import escape
from engram_lm.analysis.figures import over_seeds, seeds
from engram_lm.analysis.findings import Analysis
from engram_lm.analysis.gate_section import gate_section
from engram_lm.analysis.layer_sections import alignment_section, lens_section
from engram_lm.analysis.page import details, figure, section, table


def sections(found: Analysis, directory: Path) -> list[str]:
    """One for each part that was measured, in the order in which they are best read."""
    made = {
        "bands": _bands,
        "gates": gate_section,
        "lens": lens_section,
        "alignment": alignment_section,
        "ablation": _ablation,
        "suites": _suites,
        "addresses": _addresses,
    }
    return [make(found, directory) for part, make in made.items() if getattr(found, part)]


def _bands(found: Analysis, directory: Path) -> str:
    assert found.bands is not None
    bands = found.bands
    # What is compared with stands first, as in all figures.
    losses = dict(sorted(bands.losses.items(), key=lambda item: item[0] != found.against))
    drawn = []
    for index, order in enumerate(bands.orders):
        label = f"by how often the {order}-gram stood in the corpus; numbers in the table below"
        bars = figures.band_bars(losses, order, index, against=found.against)
        drawn.append(figure(bars, directory, f"bands-{order}", f"Loss {label}"))
        if bands.difference is not None:
            rows_of = bands.difference_bands[index]
            dots = figures.band_differences(rows_of, order, bands.difference, found.checkpoints)
            name = f"band-differences-{order}"
            drawn.append(figure(dots, directory, name, f"{bands.difference} {label}"))
    rows = [
        [f"{name} ({seeds(len(each.by_checkpoint))})", f"{each.loss:.4f}", f"{each.bpb:.4f}"]
        for name, each in losses.items()
    ]
    names = [*losses, *([bands.difference] if bands.difference is not None else [])]
    bodies = []
    for index, order in enumerate(bands.orders):
        columns = [each.bands[index] for each in losses.values()]
        if bands.difference is not None:
            columns.append(bands.difference_bands[index])
        bodies.append(
            [
                [
                    f"{order}-gram, {band}",
                    f"{columns[0][place]['tokens']:,}",
                    *(
                        _mean(column[place], found.checkpoints, signed=at >= len(losses))
                        for at, column in enumerate(columns)
                    ),
                ]
                for place, band in enumerate(BANDS)
            ]
        )
    return section(
        "bands",
        tokens=f"{found.tokens:,}",
        text=escape(found.text),
        corpus=escape(found.corpus_named),
        documents="documents see nothing of one another; n-grams that began in another one are "
        "in no band"
        if found.apart
        else "across document separators",
        errors=f"over {seeds(found.checkpoints)} (Student's t)"
        if found.checkpoints > 1
        else "taking tokens as independent; one seed",
        losses=table(["model", "nats per token", "bits per byte"], [rows]),
        figures="".join(drawn),
        table=table(["times in the corpus", "tokens", *names], bodies) if bodies else "",
    )


def _ablation(found: Analysis, directory: Path) -> str:
    checkpoints = found.ablation
    assert checkpoints
    dots = part_figures.ablation_dots(checkpoints)
    last = len(checkpoints[0][0].bands) - 1
    heads = ["without", "change", *(BANDS if last >= 0 else ())]
    rows = []
    for together in zip(*checkpoints, strict=True):
        one, changes = together[0], [part.change for part in together]
        row = [one.name, cells.bounded(changes, "+.4f", (one.low, one.high))]
        if last >= 0:
            for place in range(len(BANDS)):
                means = [part.bands[last][place]["mean"] for part in together]
                row.append(cells.mean(means, "+.3f"))
        rows.append(row)
    note = ""
    if last >= 0:
        note = f'<p class="note">Right: by times that the {last + 2}-gram stood in the corpus.</p>'
    return section(
        "ablation",
        tokens=f"{min(found.tokens, TOKENS):,}",
        text=escape(found.text),
        whiskers="95 % of bootstraps over windows; one seed"
        if len(checkpoints) == 1
        else over_seeds(len(checkpoints)),
        figure=figure(dots, directory, "ablation", "Change in loss; numbers in the table below"),
        table=table(heads, [rows]) + note,
    )


def _suites(found: Analysis, directory: Path) -> str:
    checkpoints = found.suites
    assert checkpoints
    bodies: dict[str, list[list[str]]] = {}
    for together in zip(*checkpoints, strict=True):
        first = together[0]
        bounds = first["above_chance_low"], first["above_chance_high"]
        bodies.setdefault(f"{first['suite']} {first['kind']} {first['metric']}", []).append(
            [
                f"{first['suite']} {first['kind']}, {first['metric']}: {first['part']}",
                cells.mean([first["chance"]], ".2g"),
                cells.bounded(
                    [row["value"] for row in together], within=(first["low"], first["high"])
                ),
                cells.bounded([row["retained"] for row in together], ".0%"),
                cells.bounded([row["above_chance"] for row in together], ".0%", bounds),
            ]
        )
    heads = ["asked", "chance", "score", "retained", "above chance"]
    drawn = map_figures.suite_map(checkpoints)
    return section(
        "suites",
        questions=f"{checkpoints[0][0]['questions']:,}",
        brackets="95 % of bootstraps over questions; one seed"
        if len(checkpoints) == 1
        else over_seeds(len(checkpoints)),
        figure="" if drawn is None else figure(drawn, directory, "suites", "Scores by part"),
        table=table(heads, bodies.values()),
    )


def _addresses(found: Analysis, directory: Path) -> str:
    orders = found.addresses
    assert orders
    rows, single = [], []
    for each in orders:
        label = f"layer {each.layer}, {each.order}-gram"
        rows.append(
            [
                label,
                f"{each.distinct:,}",
                f"{each.load:.2f}",
                f"{each.every_head:.4f}",
                f"{each.every_head_expected:.4f}",
                f"{each.untouched:.4f}",
                f"{each.untouched_expected:.4f}",
            ]
        )
        single += [
            [
                f"{label}, head {number}",
                f"{head.rows:,}",
                f"{head.load:.2f}",
                f"{head.shared:.4f}",
                f"{head.shared_expected:.4f}",
                f"{head.untouched:,}",
                f"{head.untouched_expected:,.1f}",
                f"{head.most:,}",
            ]
            for number, head in enumerate(each.heads)
        ]
    heads = ["table", "n-grams", "load", "shared in all heads", "expected", "untouched", "expected"]
    each_head = ["head", "rows", "load", "shared", "expected", "untouched", "expected", "most"]
    return section(
        "addresses",
        corpus=escape(found.corpus_named),
        figure=figure(
            part_figures.sharing_dots(orders), directory, "sharing", "Shared rows, head by head"
        ),
        table=table(heads, [rows]),
        heads=details("head by head", table(each_head, [single])),
    )


def _mean(row: BandLoss, checkpoints: int, *, signed: bool) -> str:
    """Behind ± half the 95 % interval, as pages/bands.html says."""
    if row["mean"] is None:
        return cells.UNKNOWN
    width = half(row, checkpoints)
    error = "" if width is None else f" ± {width:.3f}"
    return f"{row['mean']:{'+' if signed else ''}.3f}{error}"
