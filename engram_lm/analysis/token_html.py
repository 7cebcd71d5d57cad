"""Texts with every token coloured by its gate, as HTML that works without JavaScript.

A token's colour comes from two CSS properties: --m, the largest gate over all layers and streams,
is what a page shows at first and in print; --g, set by the page's script, is that of a chosen layer
and stream. --n and --c do the same for the bar below it, the length of what memory adds.
"""

import unicodedata
from collections.abc import Sequence
from itertools import product

from engram_lm.analysis.escape import escape
from engram_lm.analysis.gates import GateTrace

_SHOWN = {" ": "·", "\n": "⏎", "\t": "⇥"}


def choices(trace: GateTrace) -> list[str]:
    """Labels of the layer and stream pairs, in the order of a token's data-g and data-c.

    Behind them, both hold the mean of all as one more value.
    """
    if trace.streams == 1:
        return [f"layer {layer}" for layer in trace.layers]
    pairs = product(trace.layers, range(1, trace.streams + 1))
    return [f"layer {layer}, stream {stream}" for layer, stream in pairs]


def coloured(trace: GateTrace) -> str:
    """One text, and under it a table with the numbers behind its colours."""
    spans, rows = [], []
    for token in range(len(trace.tokens)):
        gates, added = _flat(trace.gates, token), _flat(trace.contributions, token)
        spans.append(_span(trace, token, gates, added))
        rows.append(_row(trace, token, gates, added))
    heads = "".join(f"<th>{order}-gram (in training)</th>" for order in trace.orders)
    return (
        f'<div class="trace"><p class="tokens">{"".join(spans)}</p>'
        "<details><summary>the numbers</summary>"
        '<div class="wide"><table><thead><tr><th>token</th><th class="n">largest gate</th>'
        f'<th>where</th><th class="n">added there</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details></div>"
    )


def visible(text: str) -> str:
    """Escaped, with spaces, line ends and characters of no shape to be seen."""
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character in _SHOWN:
        return f"<i>{_SHOWN[character]}</i>"
    category = unicodedata.category(character)
    if category in ("Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"):
        return f"<i>U+{ord(character):04X}</i>"
    if category.startswith("M"):  # a mark needs something to stand on
        return f"◌{character}"
    return escape(character)


def _span(trace: GateTrace, token: int, gates: Sequence[float], added: Sequence[float]) -> str:
    text = trace.tokens[token]
    # Lines may break before a word. A space that is only drawn gives a browser no such place.
    before = "<wbr>" if text[:1].isspace() or not text[:1].isascii() else ""
    kind = "" if text else ' class="part"'
    style = f"--m:{max(gates):.3f};--n:{min(1, max(added)):.3f}"
    return (
        f'{before}<b{kind} style="{style}" data-g="{_values(gates)}" '
        f'data-c="{_values([min(1, value) for value in added])}" '
        f'title="{escape(_tooltip(trace, token, gates, added))}">{visible(text)}</b>'
    )


def _tooltip(trace: GateTrace, token: int, gates: Sequence[float], added: Sequence[float]) -> str:
    lines = [
        f"{name}: gate {gate:.3f}, added {ratio:.3f} of the hidden state's length"
        for name, gate, ratio in zip(choices(trace), gates, added, strict=True)
    ]
    lines += [
        f"{order}-gram: {trace.ngrams[index][token]!r}{_seen(trace, index, token)}"
        for index, order in enumerate(trace.orders)
    ]
    return "\n".join(lines)


def _row(trace: GateTrace, token: int, gates: Sequence[float], added: Sequence[float]) -> str:
    best = max(range(len(gates)), key=gates.__getitem__)
    ngrams = "".join(
        f"<td>{visible(trace.ngrams[index][token])}{_seen(trace, index, token)}</td>"
        for index in range(len(trace.orders))
    )
    return (
        f'<tr><td>{visible(trace.tokens[token])}</td><td class="n">{gates[best]:.3f}</td>'
        f'<td>{choices(trace)[best]}</td><td class="n">{added[best]:.3f}</td>{ngrams}</tr>'
    )


def _seen(trace: GateTrace, index: int, token: int) -> str:
    return "" if trace.counts is None else f" ({trace.counts[index][token]:,})"


def _flat(values: list[list[list[float]]], token: int) -> list[float]:
    return [value for layer in values for value in layer[token]]


def _values(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in [*values, sum(values) / len(values)])
