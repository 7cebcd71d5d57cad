"""Other families' decoders with a memory: subclasses of their own classes, made when asked for.

Shapes: B sequences, T tokens, D width.
No modelling code is copied. The decoder's `forward` starts the rows and hands the reading on as one
more keyword, which every family passes to its layers; a hook before each layer takes it, and on
memory layers adds the update to the hidden states.
"""

import inspect
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
from engram_lm.model.decoder import MemoryDecoder
from engram_lm.model.directory import HUB
from engram_lm.model.generation import EngramLMGenerationMixin
from engram_lm.model.limits import Limits
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


class AttachedReading(Reading):
    """A reading that knows which layers have taken it."""

    def __init__(self, reading: Reading) -> None:
        super().__init__(reading.pending, reading.mask_BT, reading.state)
        self.taken: set[int] = set()

    def add(self, layer: int, fuse: Fuse, hidden_BTD: Tensor) -> Tensor:
        """Hidden states with what the memory of this layer adds."""
        self.taken.add(layer)
        device = fuse.query_norm_weight.device
        if device.type != "meta":  # there accelerate brings weights and values together
            hidden_BTD = hidden_BTD.to(device)
        vectors_BTM = self.pending.wait(layer).to(hidden_BTD.device)
        update_BTSD = self.update(layer, fuse, hidden_BTD.unsqueeze(2), vectors_BTM)
        return hidden_BTD + update_BTSD.squeeze(2)


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
        for name in ("hooks", "limits", "tables", "addresses", "served", "keep", "seal"):
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
        **kwargs: Any,
    ) -> Any:
        """Arguments of the family's decoder, and three of ours: see EngramLMModel.forward."""
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        ids = input_ids if engram_input_ids is None else engram_input_ids
        if self.reads_memory and ids is not None:
            self.limits.check(
                ids.shape[1], past_key_values, attention_mask, padding_mask, position_ids
            )
        reading = self.read(
            ids,
            past_key_values,
            attention_mask=attention_mask,
            padding_mask=padding_mask,
            masked=masked,
            position_ids=position_ids,
        )
        if reading is not None:
            reading = kwargs[READING] = AttachedReading(reading)
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

    def _check_taken(self, reading: AttachedReading) -> None:
        for layer in self.addresses.layers:
            run = layer < self.config.num_hidden_layers  # fewer in an early exit's drafts
            if run and layer not in reading.taken:
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
    if fuse is None:
        return args, kwargs
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
    """The family's own, whose signature tells `generate` and Trainer of our input too."""

    @wraps(family.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return family.forward(self, *args, **kwargs)

    signature = inspect.signature(family.forward)
    parameters = list(signature.parameters.values())
    ids = inspect.Parameter("engram_input_ids", inspect.Parameter.KEYWORD_ONLY, default=None)
    if not parameters or parameters[-1].kind is not inspect.Parameter.VAR_KEYWORD:
        raise ConfigError(f"{family.__name__}: its forward takes no further keywords")
    parameters.insert(-1, ids)
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
