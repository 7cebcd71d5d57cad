"""Other families' decoders with a memory: subclasses of their own classes, made when asked for.

No modelling code is copied.
"""

import inspect
from functools import cache, wraps
from typing import Any

import transformers
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
)

from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.memory.offload import computes_on, stays_on
from engram_lm.model.attached_config import (
    BACKBONE,
    MODEL_TYPE,
    PREFIX,
    attached_config,
    check_saved,
)
from engram_lm.model.attached_decoder import AttachedDecoder
from engram_lm.model.directory import HUB
from engram_lm.model.generation import EngramLMGenerationMixin
from engram_lm.model.identity import FamilyCode, convert_as, know_as_causal
from engram_lm.model.memory_pack import MemoryPack
from engram_lm.model.pack_reading import chosen
from engram_lm.model.pretrained import MemoryPreTrained
from engram_lm.model.small_copy import decoder_layers

CAUSAL_LMS: Any = MODEL_FOR_CAUSAL_LM_MAPPING
DECODERS: Any = MODEL_MAPPING
"""Configuration's class -> model's class, as the Auto classes open it."""


class AttachedConfig(PreTrainedConfig):
    """What config.json of model_type "engram_attached" is opened with; gives the family's class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The family's configuration with its memory. DataError where none is named."""
        check_saved(config_dict)
        name = config_dict.get(BACKBONE)
        if name not in CONFIG_MAPPING:
            raise DataError(
                f"config.json: {BACKBONE} {name!r} is none that transformers "
                f"{transformers.__version__} knows"
            )
        return known_config(CONFIG_MAPPING[name]).from_dict(config_dict, **kwargs)


class AttachedForCausalLM(FamilyCode, MemoryPreTrained, EngramLMGenerationMixin):
    """Comes before a family's model with its head; `from_pretrained` opens any saved one."""

    config_class: Any = AttachedConfig
    bare: tuple[str, Any] | None = None
    """Where the model without memory came from, and its architectures; None where nobody knows."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        decoder: Any = self.base_model
        family: Any = type(decoder)
        decoder.__class__ = attached_decoder(family)
        decoder.mount(config.memory_config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, path: Any, *inputs: Any, **kwargs: Any) -> Any:
        """See MemoryPreTrained.from_pretrained; called here, it opens any model of ours.

        MismatchError for a directory whose model has no place for a memory.
        """
        if cls is AttachedForCausalLM:
            hub = {name: kwargs[name] for name in HUB if name in kwargs}
            config = kwargs.get("config")
            if not hasattr(config, "memory_config"):
                config = AutoConfig.from_pretrained(config or path, **hub)
            if not hasattr(config, "memory_config"):
                raise MismatchError(f"{path}: a {config.model_type!r} without memory")
            cls = CAUSAL_LMS[type(config)]
            return cls.from_pretrained(path, *inputs, **kwargs)
        return super().from_pretrained(path, *inputs, **kwargs)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As everywhere in transformers; packs: as for forward, one choice for each prompt."""
        prompts = inputs
        for name in ("input_ids", "inputs_embeds"):
            prompts = kwargs.get(name) if prompts is None else prompts
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
        for layer in pack.layers:
            pack.layers[layer].to(computes_on(layers[int(layer)]), self.dtype)
        pack.tables.to(stays_on(self.get_input_embeddings()))
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
    know_as_causal(made)
    AutoModelForCausalLM.register(made.config_class, made)
    return made


def known_config(family: Any) -> Any:
    """The class of a family's configurations with memory, whose models the Auto classes know."""
    attached_decoder(DECODERS[family])
    attached_model(CAUSAL_LMS[family])
    return attached_config(family)


def _made(family: Any, ours: type, more: dict[str, Any]) -> Any:
    made = type(
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
    convert_as(made, family)
    return made


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
        make = known_config
    elif issubclass(family, GenerationMixin):
        make = attached_model
    return make(family)
