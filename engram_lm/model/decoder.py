"""What a decoder with memory can do, whosever its layers are: start early, switch it off.

Shapes: B sequences, T tokens, H earlier positions.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from engram_lm.config import MemoryConfig
from engram_lm.errors import ConfigError
from engram_lm.memory import untaken
from engram_lm.memory.fuse import Fuse, ShortConv
from engram_lm.memory.lookup import Memory, OnDisk
from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.served import ServedTables
from engram_lm.memory.state import DecodingState
from engram_lm.memory.table import Table
from engram_lm.model import serve
from engram_lm.model.cache import decoding_state, forget_state
from engram_lm.model.call import Call
from engram_lm.model.config import TABLE_DTYPES
from engram_lm.model.pretrained import MemoryPreTrained
from engram_lm.model.probe import CROP
from engram_lm.model.reading import Reading
from engram_lm.model.seal import Seal


class MemoryDecoder(MemoryPreTrained):
    """Tables, addresses and their use; a Fuse stands on each memory layer, as `layer.engram`."""

    addresses: Addresses | None
    tables: nn.ModuleDict
    served: ServedTables | None
    """Instead of tables, where rows stay in files."""
    keep: int
    """Positions that decoding must remember."""

    def make_tables(self, memory: MemoryConfig | None) -> None:
        """Gives the decoder what belongs to all layers; those of a memory have their Fuse."""
        self.addresses = None
        self.tables = nn.ModuleDict()
        self.served = None
        self.keep = 0
        self._without_memory = False
        self._serving = False
        if memory is None:
            return
        self.seal = Seal()
        for layer in memory.specification.layers if serve.makes_tables() else ():
            rows = memory.specification.table_rows(layer)
            dtype = TABLE_DTYPES[self.config.table_dtype]
            self.tables[str(layer)] = Table(rows, memory.head_dim, dtype=dtype)
        convs = [module for module in self.modules() if isinstance(module, ShortConv)]
        self.keep = max([memory.specification.lookback, *(conv.reach for conv in convs)])

    def memories(self) -> dict[str, Any]:
        """All that has addresses here, by what errors call it."""
        return {} if self.addresses is None else {"the memory": self}

    @contextmanager
    def without_memory(self) -> Iterator[None]:
        """Inside, no row is read and nothing is added: the backbone alone, weights untouched."""
        outer, self._without_memory = self._without_memory, True
        try:
            yield
        finally:
            self._without_memory = outer

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, no row is read either, but memory adds what it makes of zeros, and rows of tables
        that workers share are there for the others: the part of one that has no tokens."""
        self._serving = True
        try:
            yield
        finally:
            self._serving = False

    @property
    def reads_memory(self) -> bool:
        """False for a model without memory, and inside `without_memory`."""
        return self.config.memory is not None and not self._without_memory

    @property
    def memory(self) -> Memory:
        """Addresses and tables. ConfigError where the canonical map is still missing."""
        if self.addresses is None:
            raise ConfigError(
                "no canonical map: call set_canonical_map(CanonicalMap.from_tokenizer(t))"
            )
        if self.served is not None:
            return Memory(self.addresses, self.served.layers)
        tables: dict[int, Any] = {int(layer): table for layer, table in self.tables.items()}
        return Memory(self.addresses, tables)

    def look_ahead(self, prompts: Iterable[Sequence[int]]) -> None:
        """Begins to read the rows of texts that wait for their turn, first things first.

        prompts: token ids of each text from its start. What is beyond the part of the memory
        budget that pages on their way may take is read when it is asked for. Does nothing where
        rows are in memory.
        """
        for prompt in prompts:
            self.memory.look_ahead(torch.as_tensor(prompt)[None])

    def expect(self, token_ids_BT: Tensor) -> None:
        """Asks for the rows of the last position, before the forward pass on it does.

        token_ids_BT: the texts so far, their last few tokens at least. A wrong guess costs reading.
        """
        if self.served is None or not self.reads_memory:
            return
        addresses = self.memory.addresses
        history_BH = token_ids_BT[:, :-1][:, -addresses.specification.lookback :]
        rows_LBTH = addresses.rows(token_ids_BT[:, -1:], history_BH)
        for served, rows_BTH in zip(self.served.layers.values(), rows_LBTH, strict=True):
            served.expect(rows_BTH.reshape(-1))

    @property
    def refused_modes(self) -> Mapping[str, str]:
        """What the layers get wrong without memory, and how it showed: of ours nothing."""
        return {}

    def state_of(self, cache: Cache) -> DecodingState:
        """What a cache remembers for this memory; a fresh state is put into a new one."""
        layers, kept = self.config.num_hidden_layers, self.refused_modes.get(CROP)
        return decoding_state(cache, layers, self.keep, kept)

    def read(self, call: Call | None, cache: Cache | None) -> Reading | None:
        """Starts early: the rows of all layers are on their way before the first block runs.

        call: None where no memory is read; a cache that goes on without it forgets our state.
        """
        layers = self.config.num_hidden_layers
        if call is None:
            if cache is not None:
                forget_state(cache, layers)
            return None
        memory = self.memory
        state = None if cache is None else self.state_of(cache)
        window = call.window(memory.addresses, self.keep, state)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            untaken.owned(self, (each for each in self.tables.values() if isinstance(each, Table)))
        pending = memory.serve(window) if self._serving else memory.start_window(window)
        if self.served is not None and self._trains_memory():
            pending = OnDisk(pending)
        return Reading(pending, call.kept_BT, state)

    def _trains_memory(self) -> bool:
        fuses = (module for module in self.modules() if isinstance(module, Fuse))
        wanted = (p.requires_grad for fuse in fuses for p in fuse.parameters())
        return torch.is_grad_enabled() and any(wanted)
