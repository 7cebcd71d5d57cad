"""Other families' decoders with a memory: subclasses of their own classes, made when asked for.

Shapes: B sequences, T tokens, D width.
No modelling code is copied. The decoder's `forward` starts the rows and hands the reading on as one
more keyword, which every family passes to its layers; a hook before each layer takes it, and on
memory layers adds the update to the hidden states.
"""

import inspect
from collections.abc import Sequence
from functools import cache, partial, wraps
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from engram_lm.config import MemoryConfig
from engram_lm.errors import ConfigError, DataError
from engram_lm.memory.fuse import Fuse
from engram_lm.model.attached_config import BACKBONE, MODEL_TYPE, PREFIX, attached_config
from engram_lm.model.cache import forget_packs, pack_state
from engram_lm.model.call import Call
from engram_lm.model.decoder import MemoryDecoder
from engram_lm.model.directory import HUB
from engram_lm.model.generation import EngramLMGenerationMixin
from engram_lm.model.limits import Limits
from engram_lm.model.memory_pack import MemoryPack
from engram_lm.model.pack_reading import Choice, PackReading, chosen, read_packs
from engram_lm.model.pretrained import MemoryPreTrained
from engram_lm.model.reading import Reading

CAUSAL_LMS: Any = MODEL_FOR_CAUSAL_LM_MAPPING
DECODERS: Any = MODEL_MAPPING
"""Configuration's class -> model's class, as the Auto classes open it."""
READING = "engram_reading"
"""The keyword that layers are given."""


class AttachedConfig(PreTrainedConfig):
    """What config.json of model_type "engram_attached" is opened with; gives the family's class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The family's configuration with its memory. DataError where none is named."""
        name = config_dict.get(BACKBONE)
        if name not in CONFIG_MAPPING:
            raise DataError(
                f"config.json: {BACKBONE} {name!r} is none that transformers "
                f"{transformers.__version__} knows"
            )
        family = CONFIG_MAPPING[name]
        attached_decoder(DECODERS[family])  # the Auto classes know both from now on
        attached_model(CAUSAL_LMS[family])
        return attached_config(family).from_dict(config_dict, **kwargs)


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


class AttachedDecoder(MemoryDecoder):
    """Comes before a family's decoder."""

    family: Any
    """The class without memory."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.mount(config.memory_config)
        self.post_init()

    def mount(self, memory: MemoryConfig | None) -> None:
        """Sets a Fuse on each memory layer, hooks before all, and makes the tables."""
        _CAN_RECORD_REGISTRY[self] = self._can_record_outputs  # it is kept by the class's name
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
        self.limits = Limits(self.config)
        self.packs: dict[str, MemoryPack] = {}
        """Beside the model's own memory, and no part of it: they are saved apart."""
        self.packs_on: tuple[str, ...] = ()
        """What calls read that do not say."""
        self.hooks = [
            layer.register_forward_pre_hook(partial(_before, index), with_kwargs=True)
            for index, layer in enumerate(layers)
        ]

    def unmount(self) -> None:
        """Takes everything off again that `mount` set."""
        for hook in self.hooks:
            hook.remove()
        for layer in decoder_layers(self):
            if hasattr(layer, "engram"):
                del layer.engram
        for name in (
            "hooks",
            "limits",
            "packs",
            "packs_on",
            "tables",
            "addresses",
            "served",
            "keep",
            "seal",
        ):
            if hasattr(self, name):
                delattr(self, name)

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
            self.limits.check(
                call.ids_BT.shape[1], past_key_values, attention_mask, padding_mask, position_ids
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
        layers = self.config.num_hidden_layers
        for (name, pack), on_B in zip(self.packs.items(), on_BP.unbind(1), strict=True):
            if bool(on_B.any()):
                pack_state(cache, layers, name, pack.keep, on_B).recording |= recording

    def _reading(self, call: Call, cache: Cache | None, on_BP: Tensor | None) -> "AttachedReading":
        own = self.read(call, cache) if self.reads_memory else None
        if on_BP is None:
            if cache is not None:
                forget_packs(cache, ())
            return AttachedReading(own, ())
        layers = self.config.num_hidden_layers
        return AttachedReading(own, read_packs(self.packs, on_BP, call, cache, layers))

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


class AttachedForCausalLM(MemoryPreTrained, EngramLMGenerationMixin):
    """Comes before a family's model with its head; `from_pretrained` opens any saved one."""

    config_class: Any = AttachedConfig
    family: Any
    """The class without memory."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        decoder: Any = self.base_model
        family: Any = type(decoder)
        decoder.__class__ = attached_decoder(family)
        decoder.mount(config.memory_config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, path: Any, *inputs: Any, **kwargs: Any) -> Any:
        """See MemoryPreTrained.from_pretrained; called here, it opens any attached model."""
        if cls is AttachedForCausalLM:
            hub = {name: kwargs[name] for name in HUB if name in kwargs}
            config = AutoConfig.from_pretrained(kwargs.get("config") or path, **hub)
            cls = CAUSAL_LMS[type(config)]
            return cls.from_pretrained(path, *inputs, **kwargs)
        return super().from_pretrained(path, *inputs, **kwargs)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As everywhere in transformers; packs: as for forward, one choice for each prompt."""
        prompts = next(
            (
                e
                for e in (inputs, *map(kwargs.get, ("input_ids", "inputs_embeds")))
                if e is not None
            ),
            None,
        )
        on_BP = None
        if prompts is not None:
            decoder: Any = self.base_model
            on_BP = decoder.choice(kwargs.pop("packs", None), prompts)
        if on_BP is not None:
            kwargs["packs"] = on_BP
        return super().generate(inputs, *args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> Any:
        """Packs have their states in the cache too."""
        prepared = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        cache, on_BP = model_kwargs.get("past_key_values"), model_kwargs.get("packs")
        if cache is not None and on_BP is not None:
            decoder: Any = self.base_model
            decoder.begin_packs(cache, on_BP, bool(generation_config.is_assistant))
        return prepared

    def load_pack(self, name: str, directory: Any, **places: Any) -> None:
        """Opens what `save_pack` wrote; calls name it in `packs`. places: as MemoryPack.open.

        ConfigError for a name that is taken.
        """
        decoder: Any = self.base_model
        if not name or name in decoder.packs:
            raise ConfigError(f"packs: {name!r} is loaded already, or no name")
        pack = MemoryPack.open(directory, self.config, **places)
        layers = decoder_layers(decoder)
        home = self.get_input_embeddings().weight.device
        for layer in pack.layers:
            norm = next(layers[int(layer)].parameters())
            pack.layers[layer].to(norm.device, self.dtype)
        pack.tables.to(home)
        decoder.packs[name] = pack

    def drop_pack(self, name: str) -> None:
        """Gives its memory and files back. ConfigError for one that is not loaded."""
        decoder: Any = self.base_model
        chosen([name], list(decoder.packs), 1)
        pack = decoder.packs.pop(name)
        decoder.packs_on = ()
        if pack.served is not None:
            pack.served.close()

    def use_packs(self, *names: str) -> None:
        """What calls read that do not say; without names, none. Several are stacked."""
        decoder: Any = self.base_model
        chosen([names], list(decoder.packs), 1)
        decoder.packs_on = names


def decoder_layers(decoder: Any) -> nn.ModuleList:
    """The list of a decoder's layers. ConfigError where it has no list of their number, or two."""
    found = [
        module
        for module in decoder.children()
        if isinstance(module, nn.ModuleList) and len(module) == decoder.config.num_hidden_layers
    ]
    if len(found) != 1:
        raise ConfigError(
            f"{type(decoder).__name__}: {len(found)} lists of {decoder.config.num_hidden_layers} "
            "decoder layers stand in it; one is needed"
        )
    return found[0]


@cache
def attached_decoder(family: Any) -> Any:
    """The class of a family's decoders with memory, made once."""
    made = _made(family, AttachedDecoder, {})
    AutoModel.register(made.config_class, made)
    return made


@cache
def attached_model(family: Any) -> Any:
    """The class of a family's causal language models with memory, made once."""
    made = _made(family, AttachedForCausalLM, {"forward": _forward(family)})
    AutoModelForCausalLM.register(made.config_class, made)
    return made


def _made(family: Any, ours: type, more: dict[str, Any]) -> Any:
    return type(
        PREFIX + family.__name__,
        (ours, family),
        {
            "__module__": __name__,
            "__doc__": f"{family.__name__} with a memory.",
            "config_class": attached_config(family.config_class),
            "family": family,
            **more,
        },
    )


def _forward(family: Any) -> Any:
    """The family's own, whose signature tells `generate` and Trainer of our inputs too."""

    @wraps(family.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return family.forward(self, *args, **kwargs)

    signature = inspect.signature(family.forward)
    parameters = list(signature.parameters.values())
    ours = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ("engram_input_ids", "packs")
    ]
    if not parameters or parameters[-1].kind is not inspect.Parameter.VAR_KEYWORD:
        raise ConfigError(f"{family.__name__}: its forward takes no further keywords")
    parameters[-1:-1] = ours
    forward.__signature__ = signature.replace(parameters=parameters)
    return forward


def __getattr__(name: str) -> Any:
    """Our class for a family's, by its name: what unpickling a model looks for."""
    family: Any = getattr(transformers, name.removeprefix(PREFIX), None)
    if not name.startswith(PREFIX) or not isinstance(family, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    make: Any = attached_decoder
    if issubclass(family, PreTrainedConfig):
        make = attached_config
    elif issubclass(family, GenerationMixin):
        make = attached_model
    return make(family)
