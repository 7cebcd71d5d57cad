"""One call's memory as the layers of a decoder see it.

Shapes: B sequences, T tokens, S streams, D width, M memory width.
"""

from dataclasses import dataclass, field

from torch import Tensor

from engram_lm.memory.fuse import Fuse
from engram_lm.memory.lookup import Pending
from engram_lm.memory.state import DecodingState
from engram_lm.memory.window import Window


@dataclass
class Reading:
    """Rows on their way, and what was remembered of the tokens before this call."""

    pending: Pending
    mask_BT: Tensor | None
    """False where a gate is held at 0: padding and image tokens."""
    state: DecodingState | None
    tails: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> convolution inputs of the window, filled in as layers run."""

    @property
    def window(self) -> Window:
        return self.pending.window

    def update(self, layer: int, fuse: Fuse, hidden_BTSD: Tensor, vectors_BTM: Tensor) -> Tensor:
        """What a layer's memory adds to its hidden states, (B, T, S, D)."""
        tail_BWSD = None if self.state is None else self.state.tails.get(layer)
        fused = fuse(hidden_BTSD, vectors_BTM, self.window, tail_BWSD, self.mask_BT)
        if fused.tail_BWSD is not None:
            self.tails[layer] = fused.tail_BWSD
        return fused.update_BTSD

    def update_plain(self, layer: int, fuse: Fuse, hidden_BTD: Tensor) -> Tensor:
        """The same on the plain residual, (B, T, D), where its rows are waited for now."""
        device = fuse.query_norm_weight.device
        home = hidden_BTD.device
        if device.type != "meta":  # there accelerate brings weights and values together
            hidden_BTD = hidden_BTD.to(device)
        vectors_BTM = self.pending.wait(layer).to(hidden_BTD.device)
        return self.update(layer, fuse, hidden_BTD.unsqueeze(2), vectors_BTM).squeeze(2).to(home)

    def finish(self) -> None:
        """After the last layer: the cache remembers this call."""
        if self.state is not None:
            self.state.commit(self.window, self.tails)
