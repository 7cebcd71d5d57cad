"""One page that needs nothing beside it: prose and styles from pages/*.html, the rest put in."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from matplotlib.figure import Figure

from engram_lm.analysis import figures
from engram_lm.analysis.escape import escape
from engram_lm.analysis.figures import minus


def page(title: str, verdict: Sequence[str], sections: Iterable[str]) -> str:
    """A whole document; title is text, verdict and sections are HTML."""
    return _template("page").substitute(
        title=escape(title),
        verdict="".join(f"<p>{sentence}</p>" for sentence in verdict),
        sections="\n".join(sections),
    )


def section(name: str, **values: str) -> str:
    """pages/NAME.html with these values, which are HTML, put in."""
    return f'<section id="{name}">\n{_template(name).substitute(**values)}</section>'


def figure(drawn: Figure, directory: Path, name: str, label: str) -> str:
    """The figure as SVG in the page, and as NAME.svg and NAME.png in `directory`. label: what it
    says, for those who do not see it."""
    svg = figures.save(drawn, directory, name)
    tag = f'<svg role="img" aria-label="{escape(label)}"'
    return f"<figure>{svg.replace('<svg', tag, 1)}</figure>"


def facts(values: Mapping[str, str | int | float]) -> str:
    """Label -> value, line by line."""
    rows = "".join(
        f'<tr><th scope="row">{escape(label)}</th><td>{escape(_plain(value))}</td></tr>'
        for label, value in values.items()
    )
    return f"<table><tbody>{rows}</tbody></table>"


def table(heads: Sequence[str], bodies: Iterable[Iterable[Sequence[str]]]) -> str:
    """Text in, escaped; a row's first cell is its label, all others are numbers. One body a group
    of rows."""
    titles = "".join(f'<th class="n" scope="col">{escape(head)}</th>' for head in heads[1:])
    groups = "".join(
        "<tbody>"
        + "".join(
            f'<tr><th scope="row">{escape(row[0])}</th>'
            + "".join(f'<td class="n">{escape(minus(cell))}</td>' for cell in row[1:])
            + "</tr>"
            for row in rows
        )
        + "</tbody>"
        for rows in bodies
    )
    return (
        f'<div class="wide hint"><table class="ledger"><thead><tr><th scope="col">'
        f"{escape(heads[0])}</th>{titles}</tr></thead>{groups}</table></div>"
    )


def details(summary: str, html: str) -> str:
    """What opens on a click, and in print not at all."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def _template(name: str) -> Template:
    return Template((files("engram_lm.analysis") / "pages" / f"{name}.html").read_text("utf-8"))


def _plain(value: str | int | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
