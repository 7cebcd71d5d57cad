"""report.html: one file that says and shows what a comparison found, and needs nothing beside it.

Prose and styles are in report_template.html; here are the numbers, tables and figures put into it.
"""

import re
from importlib.resources import files
from pathlib import Path
from string import Template

from matplotlib.figure import Figure

from engram_lm.analysis import figures
from engram_lm.analysis.bands import BANDS, BandLoss
from engram_lm.analysis.escape import escape
from engram_lm.analysis.ledger_html import ledger_table
from engram_lm.analysis.results import DemoResults, Evaluation, Value
from engram_lm.analysis.samples import Sample
from engram_lm.analysis.token_html import choices, coloured

CLAIM_BPB = 0.02
"""Bits per byte, about what other seeds change at this size: nothing is claimed below it."""
EQUAL_BUDGETS = 0.005
"""Arms whose P_tot, P_act and FLOPs differ by less count as equal."""


def write_report(out: Path, results: DemoResults) -> Path:
    """Writes out/report.html, out/report.json and out/figures/*.svg and *.png; gives the first.

    `DemoResults.load(out / "report.json")` reads the second, so that a report can be drawn again.
    """
    out.mkdir(parents=True, exist_ok=True)
    results.save(out / "report.json")
    page = Template((files("engram_lm.analysis") / "report_template.html").read_text("utf-8"))
    moe, engram = results.moe, results.engram
    directory = out / "figures"
    html = page.substitute(
        title=escape(f"{engram.name} against {moe.name}: two small models of one budget"),
        verdict="".join(f"<p>{_subscripts(sentence)}</p>" for sentence in verdict(results)),
        moe=escape(moe.name),
        engram=escape(engram.name),
        facts=_facts(_settings(results)) + _facts(results.machine),
        command=escape(f"$ {results.command}"),
        budget=_subscripts(_budget(results)),
        ledger=ledger_table(results.arms),
        smoothing=str(figures.smoothing(moe)),
        curves=_curves(results, directory),
        validation_tokens=f"{results.validation_tokens:,}",
        validation_bytes=f"{results.validation_bytes:,}",
        validation_table=_validation_table(results),
        validation=_figure(
            figures.validation_bars(results.evaluations),
            directory,
            "validation",
            "Validation loss; numbers in the table beside it.",
        ),
        training_tokens=f"{moe.log.curve[-1]['tokens']:,}",
        bands=_bands(results, directory),
        band_table=_band_table(results),
        samples=_samples(results.evaluations),
        choices=_choices(results),
        gates="".join(coloured(trace) for trace in results.gates),
        speed=_figure(
            figures.throughput_bars(results.arms),
            directory,
            "throughput",
            "Training tokens per second: "
            + ", ".join(f"{arm.name} {arm.log.tokens_per_second:,.0f}" for arm in results.arms),
        ),
        disk=escape(_from_disk(results)),
        disk_table=_disk_table(results),
        seed=str(results.seed),
        context=str(results.context),
        analysis=f"Losses, bands, samples and gates took {results.analysis_seconds:.0f} s.",
    )
    path = out / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def verdict(results: DemoResults) -> list[str]:
    """The outcome in sentences of plain English, from the numbers alone."""
    moe, engram = results.moe, results.engram
    bpb = engram.evaluation.bpb - moe.evaluation.bpb
    lower = results.difference < 0
    better, equal = ("better", "lower") if lower else ("worse", "higher")
    sentences = [
        f"After {moe.log.curve[-1]['tokens']:,} training tokens, {engram.name} predicts unseen "
        f"text {better} than {moe.name}: {engram.evaluation.loss:.3f} against "
        f"{moe.evaluation.loss:.3f} nats per token. That is {abs(results.difference):.3f} nats "
        f"(standard error {results.difference_error:.3f}) or {abs(bpb):.3f} bits per byte {equal}."
    ]
    if abs(bpb) < CLAIM_BPB:
        sentences.append(
            f"This is one seed, and single-seed differences under {CLAIM_BPB} bits per byte are "
            "not a claim: take it as a tie until more seeds say otherwise."
        )
    else:
        sentences.append(
            f"This is one seed. Differences under {CLAIM_BPB} bits per byte would not be a claim; "
            "this one is larger, and worth confirming with more seeds."
        )
    off = results.memory_off.loss - engram.evaluation.loss
    if off > 0:
        sentences.append(
            f"With its memory switched off, the same {engram.name} model rises by {off:.3f} nats "
            f"to {results.memory_off.loss:.3f}: it does use what it stored."
        )
    else:
        sentences.append(
            f"Switching its memory off does not raise the loss of {engram.name} "
            f"({results.memory_off.loss:.3f} nats): it does not use what it stored."
        )
    if max(abs(gap) for gap in _gaps(results).values()) > EQUAL_BUDGETS:
        sentences.append("Careful: the two budgets are not equal. " + _budget(results))
    return sentences


def _gaps(results: DemoResults) -> dict[str, float]:
    # Engram against MoE, as shares of the MoE's.
    moe, engram = results.moe.log.ledger, results.engram.log.ledger
    return {
        "P_tot": engram["p_tot"] / moe["p_tot"] - 1,
        "P_act": engram["p_act"] / moe["p_act"] - 1,
        "FLOPs per token": engram["flops_per_token"] / moe["flops_per_token"] - 1,
    }


def _budget(results: DemoResults) -> str:
    gaps = ", ".join(f"{name} {_minus(f'{gap:+.2%}')}" for name, gap in _gaps(results).items())
    return f"Here, {results.engram.name} against {results.moe.name}: {gaps}."


def _subscripts(text: str) -> str:
    return re.sub(r"P_(tot|act)", r"P<sub>\1</sub>", escape(text))


def _validation_table(results: DemoResults) -> str:
    moe = results.moe.evaluation
    rows = []
    for place, (name, evaluation) in enumerate(results.evaluations.items()):
        pairs = ((evaluation.loss, moe.loss), (evaluation.bpb, moe.bpb))
        gaps = [_minus(f"<br>{value - other:+.4f}") if place else "" for value, other in pairs]
        rows.append(
            f'<tr><th scope="row">{escape(name)}</th>'
            f'<td class="n">{evaluation.loss:.4f}{gaps[0]}</td>'
            f'<td class="n">{evaluation.bpb:.4f}{gaps[1]}</td></tr>'
        )
    return (
        '<table><thead><tr><td></td><th class="n" scope="col">nats per token</th>'
        '<th class="n" scope="col">bits per byte</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
        f'<p class="note">Second lines: against {escape(results.moe.name)}.</p>'
    )


def _from_disk(results: DemoResults) -> str:
    disk = results.disk
    equal = "the same, bit for bit" if disk.equal_logits else "NOT the same"
    speed = disk.disk_tokens_per_second / disk.memory_tokens_per_second
    return (
        f"{results.engram.name}'s tables take {disk.table_bytes / 1e6:.1f} MB. Here they stay in "
        f'the model\'s file, with {disk.budget_bytes / 1e6:.1f} MB for rows (memory="disk"). Over '
        f"{disk.tokens:,} tokens the logits were {equal}, at {speed:.2f}x the speed."
    )


def _disk_table(results: DemoResults) -> str:
    disk = results.disk
    return _facts(
        {
            "tokens per second, tables in memory": f"{disk.memory_tokens_per_second:,.0f}",
            "tokens per second, rows on disk": f"{disk.disk_tokens_per_second:,.0f}",
            "distinct rows asked for": disk.rows_asked,
            "found within the budget": f"{disk.hits / disk.rows_asked:.1%}",
            "read from the file": f"{disk.bytes_read / 1e6:,.1f} MB",
            "wait of a layer for its rows": f"{disk.wait_ms:.2f} ms",
        }
    )


def _settings(results: DemoResults) -> dict[str, Value]:
    times = {
        f"training time, {arm.name}": f"{arm.log.seconds:,.0f} s"
        for arm in (results.moe, results.engram)
    }
    return {**results.settings, "seed": results.seed, **times}


def _facts(facts: dict[str, Value]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(label)}</th><td>{escape(_plain(value))}</td></tr>'
        for label, value in facts.items()
    )
    return f"<table><tbody>{rows}</tbody></table>"


def _plain(value: Value) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _figure(drawn: Figure, directory: Path, name: str, label: str) -> str:
    svg = figures.save(drawn, directory, name)
    tag = f'<svg role="img" aria-label="{escape(label)}"'
    return f"<figure>{svg.replace('<svg', tag, 1)}</figure>"


def _curves(results: DemoResults, directory: Path) -> str:
    ends = "; ".join(
        f"{arm.name} ends at {arm.log.validation[-1]['loss']:.3f}"
        for arm in results.arms
        if arm.log.validation
    )
    return "".join(
        _figure(
            figures.loss_curves(results.arms, last_half=last_half),
            directory,
            "loss-last-half" if last_half else "loss",
            f"Loss over {'the last half of' if last_half else 'all'} training tokens. {ends}.",
        )
        for last_half in (False, True)
    )


def _bands(results: DemoResults, directory: Path) -> str:
    drawn = []
    for index, order in enumerate(results.orders):
        label = f"by how often the {order}-gram stood in training; numbers in the table below"
        bars = figures.band_bars(results.evaluations, order, index)
        drawn.append(_figure(bars, directory, f"bands-{order}", f"Loss {label}"))
        title = f"{results.engram.name} minus {results.moe.name}"
        dots = figures.band_differences(results.difference_bands[index], order, title)
        name = f"band-differences-{order}"
        drawn.append(_figure(dots, directory, name, f"{title} {label}"))
    return "".join(drawn)


def _band_table(results: DemoResults) -> str:
    names = "".join(
        f'<th class="n" scope="col">{escape(name)}</th>' for name in results.evaluations
    )
    bodies = []
    for index, order in enumerate(results.orders):
        rows = []
        for place, band in enumerate(BANDS):
            difference = results.difference_bands[index][place]
            losses = [evaluation.bands[index][place] for evaluation in results.evaluations.values()]
            cells = "".join(f'<td class="n">{_mean(row, ".3f")}</td>' for row in losses)
            rows.append(
                f'<tr><th scope="row">{order}-gram, {escape(band)}</th>'
                f'<td class="n">{difference["tokens"]:,}</td>{cells}'
                f'<td class="n">{_mean(difference, "+.3f")}</td></tr>'
            )
        bodies.append(f"<tbody>{''.join(rows)}</tbody>")
    return (
        '<table class="ledger"><thead><tr><th scope="col">times in training</th>'
        f'<th class="n" scope="col">tokens</th>{names}'
        f'<th class="n" scope="col">{escape(results.engram.name)} − {escape(results.moe.name)}</th>'
        f"</tr></thead>{''.join(bodies)}</table>"
    )


def _mean(row: BandLoss, form: str) -> str:
    if row["mean"] is None:
        return "–"
    error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.3f}"
    return _minus(f"{row['mean']:{form}}{error}")


def _minus(text: str) -> str:
    return text.replace("-", "\u2212")


def _samples(evaluations: dict[str, Evaluation]) -> str:
    drawn = []
    for together in zip(*(each.samples for each in evaluations.values()), strict=True):
        columns = "".join(
            f"<div><strong>{escape(name)}</strong>{_written(sample)}</div>"
            for name, sample in zip(evaluations, together, strict=True)
        )
        drawn.append(f'<div class="sample"><div class="columns">{columns}</div></div>')
    return "".join(drawn)


def _written(sample: Sample) -> str:
    end = "■" if sample["ended"] else "…"
    prompt = f'<span class="prompt">{escape(sample["prompt"])}</span>'
    return f"{prompt}{escape(sample['text'])}<em> {end}</em>"


def _choices(results: DemoResults) -> str:
    if not results.gates:
        return ""
    labels = {"max": "the largest of all"}
    labels |= {str(place): label for place, label in enumerate(choices(results.gates[0]))}
    labels[str(len(labels) - 1)] = "the mean of all"
    return "".join(
        f'<label><input type="radio" name="gate" value="{value}"'
        f"{' checked' if value == 'max' else ''}><span>{escape(label)}</span></label>"
        for value, label in labels.items()
    )
