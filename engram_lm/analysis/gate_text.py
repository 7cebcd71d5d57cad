"""A text in the terminal, every token on the colour of its gate."""

from rich.text import Text

from engram_lm.analysis.gates import GateTrace

_SHUT, _OPEN = (255, 255, 255), (8, 81, 156)
"""White to blue, 0 to 1 whatever the text: one hue, so that lightness alone says how far."""


def colour(gate: float) -> str:
    """rich's style of a gate from 0 to 1, with writing that can be read on it."""
    red, green, blue = (round(s + gate * (o - s)) for s, o in zip(_SHUT, _OPEN, strict=True))
    return f"{'white' if gate > 0.5 else 'black'} on rgb({red},{green},{blue})"


def gate_text(trace: GateTrace) -> Text:
    """The text with each token's largest gate over all layers and streams. A token that adds no
    character (the first bytes of one) shows nothing: its character stands at its last token."""
    text = Text()
    for token, written in enumerate(trace.tokens):
        gate = max(value for layer in trace.gates for value in layer[token])
        text.append(written.replace("\r", ""), style=colour(gate))
    return text
