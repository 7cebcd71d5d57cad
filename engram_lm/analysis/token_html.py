"""Texts with every token coloured by its gate, and by what memory does to its loss, as HTML that
works without JavaScript.

A token's colour comes from two CSS properties: --m, the largest gate over all layers and streams,
is what a page shows at first and in print; --g, set by the page's script, is that of a chosen layer
and stream. --n and --c do the same for the bar below it, the length of what memory adds.
"""

import unicodedata
from collections.abc import Sequence
from itertools import product

from engram_lm.analysis.escape import escape
from engram_lm.analysis.figures import minus
from engram_lm.analysis.gates import GateTrace

CHANGE = 3.0
"""Nats of change in a token's loss that have the full colour; the scale is always this one."""
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
    """One text twice, by its gates and by the change in loss when memory is off, and under it a
    table with the numbers behind its colours."""
    spans, changes, rows = [], [], []
    for token in range(len(trace.tokens)):
        gates, added = _flat(trace.gates, token), _flat(trace.contributions, token)
        spans.append(_span(trace, token, gates, added))
        changes.append(_change_span(trace, token))
        rows.append(_row(trace, token, gates, added))
    heads = "".join(f"<th>{order}-gram (in the corpus)</th>" for order in trace.orders)
    return (
        f'<div class="trace"><div class="pair"><p class="tokens">{"".join(spans)}</p>'
        f'<p class="tokens change">{"".join(changes)}</p></div>'
        "<details><summary>the numbers</summary>"
        '<div class="wide"><table><thead><tr><th>token</th><th class="n">largest gate</th>'
        '<th>where</th><th class="n">added there</th><th class="n">loss</th>'
        f'<th class="n">memory off</th><th class="n">off here alone</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details></div>"
    )


def inline(trace: GateTrace) -> str:
    """One text by its gates, without a page around it."""
    spans = []
    for token in range(len(trace.tokens)):
        gates, added = _flat(trace.gates, token), _flat(trace.contributions, token)
        said = escape(_tooltip(trace, token, gates, added))
        style = f"background:rgba(213,94,0,{max(gates):.3f});color:#1b1b1b"
        written = visible(trace.tokens[token])
        spans.append(f'<wbr><span style="{style};padding:.1em" title="{said}">{written}</span>')
    return f'<p style="background:#fff;line-height:1.8;padding:.5em">{"".join(spans)}</p>'


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
    style = f"--m:{max(gates):.3f};--n:{min(1, max(added)):.3f}"
    return _box(
        trace,
        token,
        f'style="{style}" data-g="{_values(gates)}" '
        f'data-c="{_values([min(1, value) for value in added])}" '
        f'title="{escape(_tooltip(trace, token, gates, added))}"',
    )


def _change_span(trace: GateTrace, token: int) -> str:
    loss, off = trace.losses[token], trace.losses_off[token]
    if loss is None or off is None:
        return _box(trace, token, 'title="nothing predicts the first token"')
    change = off - loss
    colour = "--up" if change > 0 else "--down"
    said = f"loss {loss:.3f} nats, memory off {off:.3f}: {minus(f'{change:+.3f}')}"
    if trace.alone[token] is not None:
        said += f"\nmemory off at this token alone, all later ones: {_change(trace, token)}"
    share = min(1.0, abs(change) / CHANGE)
    return _box(trace, token, f'style="{colour}:{share:.3f}" title="{escape(said)}"')


def _change(trace: GateTrace, token: int) -> str:
    alone = trace.alone[token]
    return "" if alone is None else minus(f"{alone:+.3f}")


def _box(trace: GateTrace, token: int, attributes: str) -> str:
    text = trace.tokens[token]
    # Lines may break before a word. A space that is only drawn gives a browser no such place.
    before = "<wbr>" if text[:1].isspace() or not text[:1].isascii() else ""
    kind = "" if text else ' class="part"'
    return f"{before}<b{kind} {attributes}>{visible(text)}</b>"


def _tooltip(trace: GateTrace, token: int, gates: Sequence[float], added: Sequence[float]) -> str:
    lines = [
        f"{name}: gate {gate:.3f}, added {ratio:.3f} of the hidden state's length"
        for name, gate, ratio in zip(choices(trace), gates, added, strict=True)
    ]
    lines += [
        f"{order}-gram: {trace.ngrams[index][token]!r}{_seen(trace, index, token)}"
        for index, order in enumerate(trace.orders)
    ]
    for place, layer in enumerate(trace.layers):
        heads = len(trace.rows[place][token]) // len(trace.orders)
        for index, order in enumerate(trace.orders):
            part = slice(index * heads, (index + 1) * heads)
            rows = trace.rows[place][token][part]
            said = ", ".join(f"{row:,}" for row in rows)
            if trace.sharers is not None:
                known = trace.counts is not None and trace.counts[index][token] > 0
                others = [sharers - known for sharers in trace.sharers[place][token][part]]
                said += f" (other n-grams on them: {', '.join(map(str, others))})"
            value = f"value of length {trace.values[place][token][index]:.2f} of the whole of 1"
            lines.append(f"layer {layer}, {order}-gram reads rows {said}; {value}")
    return "\n".join(lines)


def _row(trace: GateTrace, token: int, gates: Sequence[float], added: Sequence[float]) -> str:
    best = max(range(len(gates)), key=gates.__getitem__)
    ngrams = "".join(
        f"<td>{visible(trace.ngrams[index][token])}{_seen(trace, index, token)}</td>"
        for index in range(len(trace.orders))
    )
    return (
        f'<tr><td>{visible(trace.tokens[token])}</td><td class="n">{gates[best]:.3f}</td>'
        f'<td>{choices(trace)[best]}</td><td class="n">{added[best]:.3f}</td>'
        f'<td class="n">{_nats(trace.losses[token])}</td>'
        f'<td class="n">{_nats(trace.losses_off[token])}</td>'
        f'<td class="n">{_change(trace, token)}</td>{ngrams}</tr>'
    )


def _nats(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.3f}"


def _seen(trace: GateTrace, index: int, token: int) -> str:
    return "" if trace.counts is None else f" ({trace.counts[index][token]:,})"


def _flat(values: list[list[list[float]]], token: int) -> list[float]:
    return [value for layer in values for value in layer[token]]


def _values(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in [*values, sum(values) / len(values)])
