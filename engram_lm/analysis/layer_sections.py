"""The logit lens and the alignment of an analysis as sections of a page."""

from pathlib import Path

from engram_lm.analysis import cells, layer_figures, map_figures
from engram_lm.analysis.escape import escape
from engram_lm.analysis.figures import over_seeds
from engram_lm.analysis.findings import Analysis
from engram_lm.analysis.page import details, figure, section, table


def lens_section(found: Analysis, directory: Path) -> str:
    """How far each block's reading is from the final prediction."""
    lenses = found.lens
    assert lenses is not None
    drawn = []
    for normed in (True, False):
        for measure, name in layer_figures.NAMES.items():
            if not normed and measure in ("loss", "agreement"):
                continue
            file = f"lens-{measure.replace('_', '-')}{'' if normed else '-plain'}"
            lines = layer_figures.lens_lines(lenses, measure, normed=normed)
            drawn.append(figure(lines, directory, file, f"{name}; numbers in the table below"))
    if found.lens_difference is not None:
        for measure in ("final_to_layer", "loss"):
            lines = layer_figures.lens_differences(found.lens_difference, measure)
            file = f"lens-difference-{measure.replace('_', '-')}"
            drawn.append(figure(lines, directory, file, "Difference after each block"))
    measures = [*layer_figures.NAMES]
    bodies = [
        [
            [
                f"{name}, {'after block' if lens.at[place] == 'block' else lens.at[place]} {layer}",
                *(cells.estimated([lens.normed[measure][place]]) for measure in measures),
                *(cells.estimated([lens.plain[measure][place]]) for measure in measures[:2]),
            ]
            for place, layer in enumerate(lens.layers)
        ]
        for name, lens in lenses.items()
    ]
    many = max(lens.checkpoints for lens in lenses.values())
    texts = next(iter(lenses.values())).texts
    heads = ["place", "KL(final ‖ layer)", "KL(layer ‖ final)", "loss", "agreement"]
    return section(
        "lens",
        over=f"{texts} windows and {many} seeds (Student's t)"
        if many > 1
        else f"{texts} windows (bootstraps); one seed",
        figures="".join(drawn),
        numbers=details(
            "the numbers",
            table([*heads, "KL(final ‖ layer), no norm", "KL(layer ‖ final), no norm"], bodies),
        ),
    )


def alignment_section(found: Analysis, directory: Path) -> str:
    """CKA of two models' blocks, beside the null of two seeds."""
    aligned = found.alignment
    assert aligned is not None
    first, second = aligned.first, aligned.second
    across = map_figures.cka_map(aligned.across, first, second, f"{second} against {first}")
    label = "CKA of each pair of blocks; the alignment index is in the table below"
    drawn = [figure(across, directory, "cka", label)]
    if aligned.null is not None:
        null = map_figures.cka_map(aligned.null, first, first, f"two seeds of {first}")
        drawn.append(figure(null, directory, "cka-null", label))
    lines = layer_figures.alignment_lines(aligned)
    drawn.append(figure(lines, directory, "alignment", "Soft alignment index of each block"))
    if aligned.above:
        above = layer_figures.above_lines(aligned)
        drawn.append(figure(above, directory, "alignment-above", "Index above the null"))
    rows = []
    for layer, likest in enumerate(aligned.likest):
        nulls = [pair[layer] for pair in aligned.null_index if layer < len(pair)]
        rows.append(
            [
                f"block {layer}",
                cells.ranged([pair[layer] for pair in aligned.index], ".2f"),
                str(likest),
                cells.ranged(nulls, ".2f"),
                cells.bounded([seed[layer] for seed in aligned.above], "+.2f"),
                str(aligned.null_likest[layer]) if nulls else cells.UNKNOWN,
            ]
        )
    heads = ["block", "alignment index", "most like", "null: index", "above it", "null: most like"]
    return section(
        "alignment",
        first=escape(first),
        second=escape(second),
        inputs=f"{aligned.inputs:,}",
        batch=str(aligned.batch),
        where=escape(aligned.where),
        neighbours=str(aligned.neighbours),
        layers=str(len(aligned.across)),
        seeds=f"Here: {len(aligned.index)} pairs across, {len(aligned.null_index)} of the null; "
        "shaded, and in brackets, is the range over pairs. An index depends much on whose blocks "
        "it counts in, so what counts is how far it lies above the null in each seed of "
        f"{escape(first)} alone; there it is {over_seeds(len(aligned.above))}. Each block is a "
        "test of its own: of twenty that do not differ, one is expected to seem so."
        if aligned.null_index
        else f"Here is one seed of {escape(first)}, so no null, and nothing can be concluded.",
        figures="".join(drawn),
        numbers=details("the numbers", table(heads, [rows])),
    )
