"""report.html of an analysis: one file that says and shows what was found, in any browser."""

from collections.abc import Mapping
from pathlib import Path

from engram_lm import whole
from engram_lm.analysis.escape import escape
from engram_lm.analysis.figures import minus, seeds
from engram_lm.analysis.findings import Analysis
from engram_lm.analysis.page import facts, page, section
from engram_lm.analysis.sections import sections


def write_report(
    out: Path, found: Analysis, *, command: str, about: Mapping[str, str | int | float]
) -> Path:
    """Writes out/report.html, out/analysis.json and out/figures/*.svg and *.png; gives the first.

    command, about: how and on what it was measured, shown as they are. `Analysis.load` reads the
    second, so that a report can be drawn again.
    """
    out.mkdir(parents=True, exist_ok=True)
    found.save(out / "analysis.json")
    against = "" if found.against is None else f" against {found.against}"
    spent = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in found.seconds.items())
    html = page(
        f"{found.name}{against}: what its memory does"
        if found.gates or found.ablation
        else f"{found.name}{against}: an analysis",
        [escape(sentence) for sentence in verdict(found)],
        [
            section("analyzed", facts=facts(_about(found) | dict(about)), command=escape(command)),
            *sections(found, out / "figures"),
            section("definitions", record="analysis.json", analysis=escape(f"Took: {spent}.")),
        ],
    )
    path = out / "report.html"
    whole.write(path, html)
    return path


def verdict(found: Analysis) -> list[str]:
    """What the numbers say, in sentences, with what they cannot say."""
    said = []
    if found.bands is not None:
        losses = found.bands.losses
        own = losses[found.name]
        if found.against is not None:
            other = losses[found.against]
            gap, half = found.bands.difference_mean, found.difference_half
            assert gap is not None
            told = f"{found.name} predicts this text {'better' if gap < 0 else 'worse'} than"
            if abs(gap) < half:
                told = f"On this text {found.name} is not told apart from"
            said.append(
                f"{told} {found.against}: {own.loss:.3f} against {other.loss:.3f} nats per token "
                f"({minus(f'{gap:+.3f}')} ± {half:.3f}, 95 % over "
                f"{'windows of the text' if found.checkpoints == 1 else 'seeds'})."
            )
        off = losses.get(f"{found.name}, memory off")
        if off is not None:
            rise = off.loss - own.loss
            said.append(
                f"Without its memory its loss {'rises' if rise > 0 else 'falls'} by "
                f"{abs(rise):.3f} nats to {off.loss:.3f}."
            )
    if found.gates is not None:
        best = [
            max(score["auroc_names"]["mean"] for score in scores if score["auroc_names"])
            for scores in found.gates.scores
            if any(score["auroc_names"] for score in scores)
        ]
        if best:
            said.append(
                f"The gate that best tells ends of names from other tokens does so with an AUROC "
                f"of {min(best):.2f}"
                + (f" to {max(best):.2f}" if len(best) > 1 else "")
                + " (0.5 is a coin; the best of several gates is above it by chance alone)."
            )
    if found.checkpoints == 1:
        said.append(
            "One seed: nothing here says what another one would give. Intervals are over texts."
        )
    return said


def _about(found: Analysis) -> dict[str, str | int | float]:
    about: dict[str, str | int | float] = {
        "Model": f"{found.name} ({seeds(found.checkpoints)})",
        "Text": found.text,
        "Tokens read": found.tokens,
        "Window": f"{found.context} tokens; windows share nothing",
        "N-grams counted in": found.corpus_named,
    }
    if found.against is not None:
        about["Against"] = f"{found.against} ({seeds(found.checkpoints)})"
    return about
