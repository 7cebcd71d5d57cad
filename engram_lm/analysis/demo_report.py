"""The report of `engram demo`: how two arms were trained and what they say, around an analysis."""

import re
from pathlib import Path

from engram_lm import whole
from engram_lm.analysis import figures
from engram_lm.analysis.escape import escape
from engram_lm.analysis.figures import minus
from engram_lm.analysis.ledger_html import ledger_table
from engram_lm.analysis.page import facts, figure, page, section
from engram_lm.analysis.results import DemoResults, Value
from engram_lm.analysis.samples import Sample
from engram_lm.analysis.sections import sections

CLAIM_BPB = 0.02
"""Bits per byte, about what other seeds change at this size: nothing is claimed below it."""
EQUAL_BUDGETS = 0.005
"""Arms whose P_tot, P_act and FLOPs differ by less count as equal."""


def write_demo_report(out: Path, results: DemoResults) -> Path:
    """Writes out/report.html, out/report.json and out/figures/*.svg and *.png; gives the first.

    `DemoResults.load(out / "report.json")` reads the second, so that a report can be drawn again.
    """
    out.mkdir(parents=True, exist_ok=True)
    results.save(out / "report.json")
    moe, engram = results.moe, results.engram
    directory = out / "figures"
    html = page(
        f"{engram.name} against {moe.name}: two small models of one budget",
        [_subscripts(sentence) for sentence in verdict(results)],
        [
            section(
                "trained",
                moe=escape(moe.name),
                engram=escape(engram.name),
                facts=facts(_settings(results)) + facts(results.machine),
                command=escape(f"$ {results.command}"),
            ),
            section(
                "ledger",
                budget=_subscripts(_budget(results)),
                ledger=ledger_table(results.arms),
            ),
            section(
                "curves", smoothing=str(figures.smoothing(moe)), curves=_curves(results, directory)
            ),
            section(
                "validation",
                validation_tokens=f"{results.analysis.tokens:,}",
                validation_bytes=f"{results.analysis.bytes:,}",
                validation_table=_validation_table(results),
                validation=figure(
                    figures.validation_bars(results.losses),
                    directory,
                    "validation",
                    "Validation loss; numbers in the table beside it.",
                ),
            ),
            section("samples", samples=_samples(results.samples)),
            *sections(results.analysis, directory),
            section(
                "speed",
                speed=figure(
                    figures.throughput_bars(results.arms),
                    directory,
                    "throughput",
                    "Training tokens per second: "
                    + ", ".join(
                        f"{arm.name} {arm.log.tokens_per_second:,.0f}" for arm in results.arms
                    ),
                ),
            ),
            section("disk", disk=escape(_from_disk(results)), disk_table=_disk_table(results)),
            section("limits", seed=str(results.seed), context=str(results.analysis.context)),
            section(
                "definitions",
                record="report.json",
                analysis=f"Losses, samples and the analysis took {results.analysis_seconds:.0f} s.",
            ),
        ],
    )
    path = out / "report.html"
    whole.write(path, html)
    return path


def verdict(results: DemoResults) -> list[str]:
    """The outcome in sentences of plain English, from the numbers alone."""
    moe, engram, bands = results.moe, results.engram, results.bands
    before, after, without = results.losses.values()
    difference, error = bands.difference_mean, bands.difference_error
    assert difference is not None and error is not None
    bpb = after.bpb - before.bpb
    better, equal = ("better", "lower") if difference < 0 else ("worse", "higher")
    sentences = [
        f"After {moe.log.curve[-1]['tokens']:,} training tokens, {engram.name} predicts unseen "
        f"text {better} than {moe.name}: {after.loss:.3f} against "
        f"{before.loss:.3f} nats per token. That is {abs(difference):.3f} nats "
        f"(standard error {error:.3f}) or {abs(bpb):.3f} bits per byte {equal}."
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
    off = without.loss - after.loss
    if off > 0:
        sentences.append(
            f"With its memory switched off, the same {engram.name} model rises by {off:.3f} nats "
            f"to {without.loss:.3f}: it does use what it stored."
        )
    else:
        sentences.append(
            f"Switching its memory off does not raise the loss of {engram.name} "
            f"({without.loss:.3f} nats): it does not use what it stored."
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
    gaps = ", ".join(f"{name} {minus(f'{gap:+.2%}')}" for name, gap in _gaps(results).items())
    return f"Here, {results.engram.name} against {results.moe.name}: {gaps}."


def _subscripts(text: str) -> str:
    return re.sub(r"P_(tot|act)", r"P<sub>\1</sub>", escape(text))


def _validation_table(results: DemoResults) -> str:
    moe = results.losses[results.moe.name]
    rows = []
    for place, (name, each) in enumerate(results.losses.items()):
        pairs = ((each.loss, moe.loss), (each.bpb, moe.bpb))
        gaps = [minus(f"<br>{value - other:+.4f}") if place else "" for value, other in pairs]
        rows.append(
            f'<tr><th scope="row">{escape(name)}</th>'
            f'<td class="n">{each.loss:.4f}{gaps[0]}</td>'
            f'<td class="n">{each.bpb:.4f}{gaps[1]}</td></tr>'
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
    return facts(
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


def _curves(results: DemoResults, directory: Path) -> str:
    ends = "; ".join(
        f"{arm.name} ends at {arm.log.validation[-1]['loss']:.3f}"
        for arm in results.arms
        if arm.log.validation
    )
    return "".join(
        figure(
            figures.loss_curves(results.arms, last_half=last_half),
            directory,
            "loss-last-half" if last_half else "loss",
            f"Loss over {'the last half of' if last_half else 'all'} training tokens. {ends}.",
        )
        for last_half in (False, True)
    )


def _samples(by_name: dict[str, list[Sample]]) -> str:
    drawn = []
    for together in zip(*by_name.values(), strict=True):
        columns = "".join(
            f"<div><strong>{escape(name)}</strong>{_written(sample)}</div>"
            for name, sample in zip(by_name, together, strict=True)
        )
        drawn.append(f'<div class="sample"><div class="columns">{columns}</div></div>')
    return "".join(drawn)


def _written(sample: Sample) -> str:
    end = "■" if sample["ended"] else "…"
    prompt = f'<span class="prompt">{escape(sample["prompt"])}</span>'
    return f"{prompt}{escape(sample['text'])}<em> {end}</em>"
