"""Another family's decoder with a memory: where rows are started, and how layers get them.

Shapes: B sequences, T tokens, D width, P packs.
The decoder's `forward` starts the rows and hands the reading on as one more keyword, which every
family passes to its layers; a hook before each layer takes it, and on memory layers adds the update
to the hidden states.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, Cache, DynamicCache
from transformers.utils.generic import merge_with_config_defaults

from engram_lm.config import MemoryConfig
from engram_lm.errors import ConfigError
from engram_lm.memory.fuse import Fuse
from engram_lm.model import limits
from engram_lm.model.attached_config import bare_config
from engram_lm.model.cache import forget_packs, pack_state
from engram_lm.model.call import Call
from engram_lm.model.decoder import MemoryDecoder
from engram_lm.model.identity import FamilyCode, record_outputs
from engram_lm.model.memory_pack import MemoryPack
from engram_lm.model.pack_reading import Choice, PackReading, chosen, read_packs
from engram_lm.model.probe import CROP, probe
from engram_lm.model.reading import Reading
from engram_lm.model.small_copy import decoder_layers

READING = "engram_reading"
"""The keyword that layers are given."""
_MOUNTED = (
    *("hooks", "packs", "packs_on"),
    *("tables", "addresses", "served", "keep", "seal", "_without_memory", "_serving"),
)
"""What a decoder has while it is mounted."""


class AttachedReading:
    """What the layers of one call are handed: the model's own memory, and packs beside it."""

    def __init__(self, own: Reading | None, packs: Sequence[PackReading]) -> None:
        self.own, self.packs = own, packs
        self.taken: set[int] = set()
        """Layers that have added theirs."""

    def add(self, layer: int, fuse: Fuse | None, hidden_BTD: Tensor) -> Tensor:
        """Hidden states with what memory adds at this layer; packs read them as they came in."""
        self.taken.add(layer)
        updates = [pack.update(layer, hidden_BTD) for pack in self.packs]
        if self.own is not None and fuse is not None:
            hidden_BTD = hidden_BTD + self.own.update_plain(layer, fuse, hidden_BTD)
        for update_BTD in updates:
            if update_BTD is not None:
                hidden_BTD = hidden_BTD + update_BTD
        return hidden_BTD

    def finish(self) -> None:
        """After the last layer."""
        for reading in (self.own, *self.packs):
            if reading is not None:
                reading.finish()


class AttachedDecoder(FamilyCode, MemoryDecoder):
    """Comes before a family's decoder."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.mount(config.memory_config)
        self.post_init()

    def mount(self, memory: MemoryConfig | None) -> None:
        """Sets a Fuse on each memory layer, hooks before all, and makes the tables."""
        record_outputs(self)
        layers = decoder_layers(self)
        for layer in memory.specification.layers if memory is not None else ():
            layers[layer].engram = Fuse(
                1,
                self.config.hidden_size,
                memory.memory_dim,
                memory.fusion,
                memory.specification.max_order,
            )
        self.make_tables(memory)
        self.packs: dict[str, MemoryPack] = {}
        """Beside the model's own memory, and no part of it: they are saved apart."""
        self.packs_on: tuple[str, ...] = ()
        """What calls read that do not say."""
        self.hooks = [
            layer.register_forward_pre_hook(partial(_before, index), with_kwargs=True)
            for index, layer in enumerate(layers)
        ]

    def unmount(self) -> None:
        """Takes everything off again that `mount` set, or began to."""
        for hook in getattr(self, "hooks", ()):
            hook.remove()
        for layer in decoder_layers(self):
            if hasattr(layer, "engram"):
                del layer.engram
        for name in _MOUNTED:
            if hasattr(self, name):
                delattr(self, name)

    @property
    def refused_modes(self) -> Mapping[str, str]:
        """What the bare family gets wrong, and how it showed; saved with the model."""
        if self.config.refused_modes is None and not torch.compiler.is_compiling():
            config = bare_config(self.config)
            family = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            self.config.refused_modes = probe(family, config, decoder_layers(self))
        return self.config.refused_modes or {}

    def memories(self) -> dict[str, Any]:
        """Packs too."""
        return super().memories() | {f"the pack {name!r}": p for name, p in self.packs.items()}

    @merge_with_config_defaults
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        engram_input_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        masked: Tensor | None = None,
        packs: Choice = None,
        **kwargs: Any,
    ) -> Any:
        """Arguments of the family's decoder, three of ours (see EngramLMModel.forward), and packs:
        for each sequence the name of a memory pack, several, or None."""
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        reading = None
        on_BP = self.choice(packs, inputs_embeds if input_ids is None else input_ids)
        if self.reads_memory or on_BP is not None:
            call = Call.of(
                input_ids if engram_input_ids is None else engram_input_ids,
                past_key_values,
                attention_mask=attention_mask,
                padding_mask=padding_mask,
                masked=masked,
                position_ids=position_ids,
            )
            limits.check(
                self.family.__name__,
                self.refused_modes,
                call.ids_BT.shape[1],
                past_key_values,
                attention_mask,
                padding_mask,
                call.positions_BT,
                placed=position_ids is not None,
            )
            reading = kwargs[READING] = self._reading(call, past_key_values, on_BP)
        else:
            self.read(None, past_key_values)
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if reading is not None:
            self._check_taken(reading)
            reading.finish()
        return outputs

    def choice(self, packs: Choice, inputs: Tensor) -> Tensor | None:
        """Which sequences read which pack, (B, P), of what a caller said; None where none does."""
        if self._without_memory or (packs is None and not self.packs_on):
            return None
        if packs is None:
            packs = [self.packs_on] * len(inputs)
        return chosen(packs, list(self.packs), len(inputs))

    def begin_packs(self, cache: Cache, on_BP: Tensor, recording: bool) -> None:
        """Puts the packs' states into a cache before anybody asks it to record its past."""
        layers, kept = self.config.num_hidden_layers, self.refused_modes.get(CROP)
        for (name, pack), on_B in zip(self.packs.items(), on_BP.unbind(1), strict=True):
            if bool(on_B.any()):
                state = pack_state(cache, layers, name, pack.keep, on_B, kept)
                state.recording |= recording

    def _reading(self, call: Call, cache: Cache | None, on_BP: Tensor | None) -> "AttachedReading":
        own = self.read(call, cache) if self.reads_memory else None
        if on_BP is None:
            if cache is not None:
                forget_packs(cache, ())
            return AttachedReading(own, ())
        layers, kept = self.config.num_hidden_layers, self.refused_modes.get(CROP)
        return AttachedReading(own, read_packs(self.packs, on_BP, call, cache, layers, kept))

    def _check_taken(self, reading: AttachedReading) -> None:
        run = range(self.config.num_hidden_layers)  # fewer in an early exit's drafts
        for layer in run:
            if layer not in reading.taken:
                raise ConfigError(
                    f"{type(self).__name__}: layer {layer} was not handed its memory; this family "
                    "keeps keywords from its layers"
                )


def _before(
    index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before each layer: takes the reading, and where there is memory, adds it."""
    if READING not in kwargs:
        return None
    kwargs = dict(kwargs)
    reading = kwargs.pop(READING)
    fuse: Any = getattr(layer, "engram", None)
    if args:
        return (reading.add(index, fuse, args[0]), *args[1:]), kwargs
    kwargs["hidden_states"] = reading.add(index, fuse, kwargs["hidden_states"])
    return args, kwargs
