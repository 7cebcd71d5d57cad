"""One call's memory packs: which sequences read which, and what each pack adds to them.

Shapes: B sequences, P packs, N sequences that read one pack, T tokens, D width.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import Cache

from engram_lm.errors import ConfigError
from engram_lm.memory.state import DecodingState
from engram_lm.model.cache import forget_packs, pack_state
from engram_lm.model.call import Call
from engram_lm.model.memory_pack import MemoryPack
from engram_lm.model.reading import Reading

Choice = str | Sequence[str | Sequence[str] | None] | Tensor | None
"""One pack for all sequences, or for each one: a name, several that are stacked, or None."""


def chosen(packs: Choice, names: Sequence[str], sequences: int) -> Tensor:
    """Bool (B, P), True where a sequence reads a pack. ConfigError for another name or number."""
    if isinstance(packs, Tensor):
        return packs
    each = [packs] * sequences if packs is None or isinstance(packs, str) else list(packs)
    if len(each) != sequences:
        raise ConfigError(f"packs: {len(each)} choices for {sequences} sequences; one for each")
    wanted = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in each]
    for name in (name for one in wanted for name in one):
        if name not in names:
            loaded = ", ".join(names) or "none"
            raise ConfigError(f"packs: {name!r} is not loaded; loaded are {loaded}")
    return torch.tensor([[name in one for name in names] for one in wanted]).view(sequences, -1)


class PackReading:
    """Rows of one pack on their way, for those sequences that read it."""

    def __init__(
        self,
        name: str,
        pack: MemoryPack,
        on_B: Tensor,
        call: Call,
        cache: Cache | None,
        layers: int,
        kept: str | None,
    ) -> None:
        self.pack = pack
        self.of_N = None if bool(on_B.all()) else on_B.nonzero()[:, 0].to(call.ids_BT.device)
        self.state = None
        if cache is not None:
            self.state = pack_state(cache, layers, name, pack.keep, on_B, kept)
        self.window = call.window(pack.addresses, pack.keep, self.state)
        part, kept_BT, state = self.window, call.kept_BT, self.state
        if self.of_N is not None:
            part = self.window.select(self.of_N)
            kept_BT = None if kept_BT is None else kept_BT[self.of_N]
            if self.state is not None:
                state = DecodingState(pack.keep)
                state.tails = {k: tail[self.of_N] for k, tail in self.state.tails.items()}
        self.reading = Reading(pack.memory.start_window(part), kept_BT, state)

    def update(self, layer: int, hidden_BTD: Tensor) -> Tensor | None:
        """What this layer of the pack adds, (B, T, D), 0 for the other sequences; None for none."""
        fuse = self.pack.fuse(layer)
        if fuse is None:
            return None
        if self.of_N is None:
            return self.reading.update_plain(layer, fuse, hidden_BTD)
        part_NTD = self.reading.update_plain(layer, fuse, hidden_BTD[self.of_N])
        return torch.zeros_like(hidden_BTD).index_copy_(0, self.of_N, part_NTD)

    def finish(self) -> None:
        """After the last layer: the cache remembers this call."""
        if self.state is None:
            return
        tails = self.reading.tails
        if self.of_N is not None:
            whole = len(self.window.ids_BW)
            tails = {
                layer: tail.new_zeros(whole, *tail.shape[1:]).index_copy_(0, self.of_N, tail)
                for layer, tail in tails.items()
            }
        self.state.commit(self.window, tails)


def read_packs(
    packs: Mapping[str, MemoryPack],
    on_BP: Tensor,
    call: Call,
    cache: Cache | None,
    layers: int,
    kept: str | None,
) -> list[PackReading]:
    """Starts the rows of every pack that a sequence reads; a cache forgets the other packs.

    layers: of the decoder; kept: as for decoding_state.
    """
    columns = zip(packs.items(), on_BP.unbind(1), strict=True)
    read = {name: (pack, on_B) for (name, pack), on_B in columns if bool(on_B.any())}
    if cache is not None:
        forget_packs(cache, read)
    return [
        PackReading(name, pack, on_B, call, cache, layers, kept)
        for name, (pack, on_B) in read.items()
    ]
