"""A text in the terminal, every token on the colour of its gate."""

from rich.text import Text

from engram_lm.analysis.gates import GateTrace

_SHUT, _OPEN = (255, 255, 255), (213, 94, 0)
"""White to vermilion as in a report, 0 to 1 whatever the text; black can be read on all of it."""


def colour(gate: float) -> str:
    """rich's style of a gate from 0 to 1."""
    red, green, blue = (round(s + gate * (o - s)) for s, o in zip(_SHUT, _OPEN, strict=True))
    return f"black on rgb({red},{green},{blue})"


def gate_text(trace: GateTrace) -> Text:
    """The text with each token's largest gate over all layers and streams. A token that adds no
    character (the first bytes of one) shows nothing: its character stands at its last token."""
    text = Text()
    for token, written in enumerate(trace.tokens):
        gate = max(value for layer in trace.gates for value in layer[token])
        text.append(written.replace("\r", ""), style=colour(gate))
    return text
