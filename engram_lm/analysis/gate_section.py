"""The gates of an analysis as a section of a page."""

from collections.abc import Iterable
from pathlib import Path

from engram_lm.analysis import cells, part_figures
from engram_lm.analysis.escape import escape
from engram_lm.analysis.figures import over_seeds
from engram_lm.analysis.findings import Analysis, GateFindings, NgramGate
from engram_lm.analysis.gate_scores import FREQUENT, TIMES
from engram_lm.analysis.page import figure, section, table
from engram_lm.analysis.token_html import CHANGE, choices, coloured, visible


def gate_section(found: Analysis, directory: Path) -> str:
    """Coloured texts, scores, and n-grams ranked."""
    gates = found.gates
    assert gates is not None
    labels = {"max": "the largest of all"}
    if gates.traces:
        labels |= {str(place): label for place, label in enumerate(choices(gates.traces[0]))}
        labels[str(len(labels) - 1)] = "the mean of all"
    return section(
        "gates",
        change=f"{CHANGE:g}",
        choices="".join(
            f'<label><input type="radio" name="gate" value="{value}"'
            f"{' checked' if value == 'max' else ''}><span>{escape(label)}</span></label>"
            for value, label in labels.items()
        ),
        traces="".join(coloured(trace) for trace in gates.traces),
        tokens=f"{found.tokens:,}",
        text=escape(found.text),
        names=escape(found.names),
        frequent=str(FREQUENT),
        times=str(TIMES),
        corpus=escape(found.corpus_named),
        brackets="95 % of bootstraps over windows; one seed"
        if len(gates.scores) == 1
        else over_seeds(len(gates.scores)),
        figure=figure(
            part_figures.auroc_dots(gates.scores),
            directory,
            "gates",
            "AUROCs; numbers in the table",
        ),
        scores=_scores(gates),
        ranked=f'<div class="figures">{_ranked("highest", gates.highest)}'
        f"{_ranked('lowest', gates.lowest)}</div>",
    )


def _scores(gates: GateFindings) -> str:
    """Checkpoints side by side become one cell."""
    rows = []
    for together in zip(*gates.scores, strict=True):
        first = together[0]
        rows.append(
            [
                f"layer {first['layer']}, stream {first['stream'] + 1}, {first['order']}-gram",
                f"{first['frequent']:,}",
                cells.estimated([score["auroc_frequent"] for score in together]),
                f"{first['names']:,}",
                cells.estimated([score["auroc_names"] for score in together]),
                cells.mean([score["gate_names"] for score in together]),
                cells.mean([score["gate_elsewhere"] for score in together]),
            ]
        )
    heads = ["gate", "frequent", "AUROC", "names", "AUROC", "gate at names", "elsewhere"]
    return table(heads, [rows])


def _ranked(which: str, ngrams: Iterable[NgramGate]) -> str:
    rows = "".join(
        f'<tr><td>{visible(each["ngram"])}</td><td class="n">{each["gate"]:.3f}</td>'
        f'<td class="n">{each["added"]:.3f}</td><td class="n">{each["times"]}</td>'
        f'<td class="n">{cells.mean([each["in_corpus"]], ",")}</td>'
        "</tr>"
        for each in ngrams
    )
    return (
        f'<div class="trace"><div class="wide"><table><thead><tr><th>{which} gates</th>'
        '<th class="n">gate</th><th class="n">added</th><th class="n">here</th>'
        f'<th class="n">corpus</th></tr></thead><tbody>{rows}</tbody></table></div></div>'
    )
