"""An analysis in the terminal: coloured texts and tables."""

import statistics
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from engram_lm.analysis import cells
from engram_lm.analysis.bands import BANDS
from engram_lm.analysis.figures import over_seeds, seeds
from engram_lm.analysis.findings import Analysis
from engram_lm.analysis.gate_text import gate_text

_KL = {"final_to_layer": "KL(final ‖ layer)", "layer_to_final": "KL(layer ‖ final)"}


def show(found: Analysis, console: Console) -> None:
    """What was measured, part by part."""
    said = f"{found.name} ({seeds(found.checkpoints)}): {found.tokens:,} tokens of {found.text}"
    console.print(Text(f"{said}; n-grams counted in {found.corpus_named}"), "")
    for part in (_gates, _bands, _lens, _alignment, _ablation, _suites, _addresses):
        part(found, console)


def _gates(found: Analysis, console: Console) -> None:
    if found.gates is None:
        return
    for trace in found.gates.traces:
        console.print(gate_text(trace))
    heads = ("frequent", "AUROC", "names", "AUROC", "gate there", "elsewhere")
    table = _table(f"gates: white 0, orange 1; in brackets {_over(found)}", "gate", *heads)
    for together in zip(*found.gates.scores, strict=True):
        first = together[0]
        table.add_row(
            f"layer {first['layer']}, stream {first['stream'] + 1}, {first['order']}-gram",
            f"{first['frequent']:,}",
            cells.estimated([score["auroc_frequent"] for score in together]),
            f"{first['names']:,}",
            cells.estimated([score["auroc_names"] for score in together]),
            cells.mean([score["gate_names"] for score in together]),
            cells.mean([score["gate_elsewhere"] for score in together]),
        )
    console.print("", table, "")
    for title, ngrams in (("highest", found.gates.highest), ("lowest", found.gates.lowest)):
        said = ", ".join(f"{each['ngram']!r} {each['gate']:.2f}" for each in ngrams)
        console.print(Text(f"{title} gates: {said or 'no n-gram stands often enough'}"))
    console.print()


def _bands(found: Analysis, console: Console) -> None:
    if found.bands is None:
        return
    bands = found.bands
    title = "loss, nats per token"
    if bands.difference is not None:
        title += f"; ±: {_over(found)}"
    table = _table(title, "times in the corpus", *bands.losses)
    if bands.difference is not None:
        table.add_column(Text(bands.difference), justify="right")
    difference = []
    if bands.difference_mean is not None:
        difference = [f"{bands.difference_mean:+.4f} ± {found.difference_half:.4f}"]
    table.add_row("all", *(f"{each.loss:.4f}" for each in bands.losses.values()), *difference)
    for index, order in enumerate(bands.orders):
        for place, band in enumerate(BANDS):
            columns = [each.bands[index][place] for each in bands.losses.values()]
            means = [cells.mean([row["mean"]], ".4f") for row in columns]
            if bands.difference is not None:
                change = bands.difference_bands[index][place]["mean"]
                means.append(cells.mean([change], "+.4f"))
            table.add_row(f"{order}-gram, {band} ({columns[0]['tokens']:,})", *means)
    console.print(table, "")


def _lens(found: Analysis, console: Console) -> None:
    if found.lens is None:
        return
    for name, lens in found.lens.items():
        title = f"{name} ({seeds(lens.checkpoints)}): each place read by the model's head"
        table = _table(title, "place", *_KL.values(), "loss", "agreement")
        for place, (layer, at) in enumerate(zip(lens.layers, lens.at, strict=True)):
            values = (lens.normed[name][place]["mean"] for name in (*_KL, "loss", "agreement"))
            table.add_row(f"{at} {layer}", *(f"{value:.3f}" for value in values))
        console.print(table, "")


def _alignment(found: Analysis, console: Console) -> None:
    if found.alignment is None:
        return
    aligned = found.alignment
    null = "null: two seeds" if aligned.null_index else "null: one seed, none"
    title = f"blocks of {aligned.second} in {aligned.first}: {aligned.inputs:,} {aligned.where}"
    if aligned.above:
        title += f"; in brackets {over_seeds(len(aligned.above))}"
    table = _table(title, "block", "alignment index", "most like", null, "above it")
    for layer, likest in enumerate(aligned.likest):
        index = statistics.mean(pair[layer] for pair in aligned.index)
        nulls = [pair[layer] for pair in aligned.null_index if layer < len(pair)]
        above = cells.bounded([seed[layer] for seed in aligned.above], "+.2f")
        table.add_row(str(layer), f"{index:.2f}", str(likest), cells.mean(nulls, ".2f"), above)
    console.print(table, "")


def _ablation(found: Analysis, console: Console) -> None:
    if found.ablation is None:
        return
    table = _table("loss without a part", "part", f"change, nats ({_over(found)})")
    for together in zip(*found.ablation, strict=True):
        one, changes = together[0], [part.change for part in together]
        table.add_row(one.name, cells.bounded(changes, "+.4f", (one.low, one.high)))
    console.print(table, "")


def _suites(found: Analysis, console: Console) -> None:
    if found.suites is None:
        return
    title = "suites without a part; retained above chance"
    table = _table(title, "part", "score", "chance", "retained", "above chance")
    by_asked: dict[str, list[Any]] = {}
    for together in zip(*found.suites, strict=True):
        first = together[0]
        asked = f"{first['suite']} {first['kind']}, {first['metric']}"
        by_asked.setdefault(asked, []).append(together)
    for asked, rows in by_asked.items():
        table.add_row(asked)
        for together in rows:
            chance = together[0]["chance"]
            table.add_row(
                f"  {together[0]['part']}",
                cells.mean([row["value"] for row in together]),
                cells.mean([chance], ".2g"),
                cells.mean([row["retained"] for row in together], ".0%"),
                cells.mean([row["above_chance"] for row in together], ".0%"),
            )
    console.print(table, "")


def _addresses(found: Analysis, console: Console) -> None:
    if found.addresses is None:
        return
    heads = ("table", "n-grams", "load", "share all rows", "expected", "untouched", "expected")
    table = _table("who shares rows", *heads)
    for each in found.addresses:
        table.add_row(
            f"layer {each.layer}, {each.order}-gram",
            f"{each.distinct:,}",
            f"{each.load:.2f}",
            f"{each.every_head:.4f}",
            f"{each.every_head_expected:.4f}",
            f"{each.untouched:.4f}",
            f"{each.untouched_expected:.4f}",
        )
    console.print(table, "")


def _over(found: Analysis) -> str:
    return "95 % over windows" if found.checkpoints == 1 else over_seeds(found.checkpoints)


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(Column(Text(first)), title=Text(title), box=None, title_justify="left")
    for other in others:
        table.add_column(Text(other), justify="right")
    return table
