"""Gives a decoder of transformers a memory, in place, and takes it off again."""

import copy
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from engram_lm.config import MemoryConfig
from engram_lm.errors import ConfigError, EngramError, instance, shown
from engram_lm.memory.fuse import Fuse
from engram_lm.memory.offload import computes_on, stays_on
from engram_lm.memory.table import Table
from engram_lm.model.attached import (
    CAUSAL_LMS,
    AttachedForCausalLM,
    attached_decoder,
    attached_model,
)
from engram_lm.model.attached_config import bare_config
from engram_lm.model.attached_decoder import AttachedDecoder
from engram_lm.model.cache import StateLayer
from engram_lm.model.config import TABLE_DTYPES
from engram_lm.model.identity import name_after, record_outputs
from engram_lm.model.pretrained import MemoryPreTrained
from engram_lm.model.probe import probe
from engram_lm.model.small_copy import decoder_layers
from engram_lm.model.surgery import canonical_of, silence

TRIED = 2
"""Tokens of the one forward pass that shows whether a family hands memory to its layers."""


def attach(
    model: Any, tokenizer: Any, memory: MemoryConfig | None, *, table_dtype: str | None = None
) -> Any:
    """The model itself, with a memory that adds nothing yet: logits stay the same, bit for bit.

    It stays a model of its family (forward, generate, save_pretrained, Trainer, PEFT) and becomes
    an AttachedForCausalLM; `from_pretrained` of that class, or AutoModelForCausalLM after `import
    engram_lm`, opens what it saves. Fuses go where their layers are, tables to the token embedding;
    both are of the model's dtype, tables of `table_dtype` ("fp32", "bf16") where it is given.
    Rows and keys are drawn by torch's generator; the value projection is zero, and so is the short
    convolution. What the family itself gets wrong (packed documents, padding, a cache: see
    `probe`) is tried once, mostly in under a second, and refused from then on.
    tokenizer: the model's, in any form that CanonicalMap.from_tokenizer takes, or a CanonicalMap.
    memory: None makes a place for memory packs alone (`load_pack`).
    ConfigError for a model that memory cannot be given to; MismatchError if the tokenizer has more
    ids than the model. Then the model is as it was.
    """
    try:
        with torch.no_grad():
            return _attached(model, tokenizer, memory, table_dtype)
    except EngramError:
        raise
    except Exception as error:  # from the family's own code, which may do anything
        line = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"{type(model).__name__}: no memory can be given to it ({type(error).__name__}: {line})"
        ) from error


def _attached(
    model: Any, tokenizer: Any, memory: MemoryConfig | None, table_dtype: str | None
) -> Any:
    _check(model, table_dtype)
    instance("memory", memory, MemoryConfig, type(None))
    canonical = None if memory is None else canonical_of(memory, tokenizer, model.config)
    decoder: Any = model.base_model
    layers = decoder_layers(decoder)
    family: Any = type(model)
    body_family: Any = type(decoder)
    kind, body = attached_model(family), attached_decoder(body_family)
    bare = model.config
    config: Any = copy.deepcopy(bare)
    config.__class__ = kind.config_class
    config.memory = None if memory is None else memory.to_dict()
    config.table_dtype = table_dtype
    # Under accelerate's init_empty_weights no copy can be made; then the first call asks.
    config.refused_modes = None if model.device.type == "meta" else probe(family, bare, layers)
    config.check()
    config.architectures = [kind.__name__]
    origin = bare.name_or_path
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    names = [part.name_or_path for part in parts]
    try:
        _exchange(model, config)
        _become(model, kind)
        _become(decoder, body)
        model.bare = (origin, bare.architectures)
        name_after(model, config)
        record_outputs(model)
        decoder.mount(memory)
        if memory is not None:
            _place(model, [layers[layer] for layer in memory.specification.layers])
            model.set_canonical_map(canonical)
        _try(model)
    except BaseException:
        _take_off(model, bare, origin)
        for part, name in zip(parts, names, strict=True):
            part.name_or_path = name
        raise
    return model


def detach(model: Any) -> Any:
    """The model as it was before `attach`, of its family's own class; what was trained of its own
    parameters stays. ConfigError for a model that has nothing attached, and for a wrapper around
    one that has."""
    if not isinstance(model, AttachedForCausalLM):
        name = type(model).__name__
        parts = model.modules() if isinstance(model, nn.Module) else ()
        inner = next((part for part in parts if isinstance(part, AttachedForCausalLM)), None)
        if inner is not None:
            raise ConfigError(
                f"{name}: detach the {type(inner).__name__} inside this wrapper, after taking the "
                "wrapper off (of PEFT: model.unload() or model.merge_and_unload())"
            )
        raise ConfigError(f"{name}: no memory was attached to this model")
    family = type(model).family
    origin, architectures = model.__dict__.get("bare", (None, [family.__name__]))
    config = bare_config(model.config)
    config.architectures = architectures
    _take_off(model, config, origin)
    return model


def _take_off(model: Any, config: Any, origin: str | None) -> None:
    """Leaves the family's own model, with this configuration and the name it had."""
    decoder: Any = model.base_model
    if isinstance(decoder, AttachedDecoder):
        decoder.unmount()
    for part in (model, decoder):
        _become(part, getattr(type(part), "family", type(part)))
    model.__dict__.pop("bare", None)
    _exchange(model, config)
    name_after(model, config, origin)


def _check(model: Any, table_dtype: str | None) -> None:
    name = type(model).__name__
    if isinstance(model, MemoryPreTrained):
        raise ConfigError(f"{name}: the model has a memory already")
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"{name}: a causal language model of transformers is needed; attach before PEFT or "
            "another wrapper"
        )
    config = type(model.config)
    if config not in CAUSAL_LMS or CAUSAL_LMS[config] is not type(model):
        raise ConfigError(
            f"{name}: not the class that AutoModelForCausalLM opens a {config.__name__} with"
        )
    if all(DynamicCache(config=model.config).is_linear):
        raise ConfigError(f"{name}: no layer has attention, whose cache would carry the memory")
    if model.config.is_encoder_decoder or getattr(model.config, "num_kv_shared_layers", False):
        raise ConfigError(f"{name}: a decoder is needed whose every layer has a cache of its own")
    if table_dtype not in tuple(TABLE_DTYPES):
        accepted = ", ".join(map(repr, TABLE_DTYPES))
        raise ConfigError(f"table_dtype={shown(table_dtype)}: accepted are {accepted}")


def _become(part: Any, kind: Any) -> None:
    """Changes the class, and the forward that accelerate has put aside where it hooked the part."""
    part.__class__ = kind
    if "_old_forward" in vars(part):
        part._old_forward = MethodType(kind.forward, part)


def _exchange(model: Any, config: Any) -> None:
    """Gives every part that looks at the model's configuration the new one."""
    old = model.config
    for part in model.modules():
        if getattr(part, "config", None) is old:
            part.config = config


def _place(model: Any, layers: list[Any]) -> None:
    decoder: AttachedDecoder = model.base_model
    embedding = model.get_input_embeddings()
    home = stays_on(embedding)
    dtype = model.dtype if model.dtype.is_floating_point else torch.float32
    if model.config.table_dtype is None:
        decoder.tables.to(dtype)
    decoder.tables.to(home)
    decoder.seal.to(home)
    for layer in layers:
        layer.engram.to(computes_on(layer), dtype)
    for part in decoder.modules():
        if isinstance(part, Fuse):
            for inner in part.modules():
                model._init_weights(inner)
            silence(part)
        elif isinstance(part, Table):
            model._init_weights(part)


def _try(model: Any) -> None:
    """ConfigError where the family's layers do not get their memory."""
    embedding = model.get_input_embeddings()
    device = computes_on(embedding)
    if device.type == "meta":
        return
    # As in training: 4-bit weights on a CPU are packed by bitsandbytes in a pass that needs no
    # gradient, and have none from then on.
    hook = embedding.register_forward_hook(lambda *each: each[-1].requires_grad_())
    ids = torch.zeros(1, TRIED, dtype=torch.int64, device=device)
    cache = DynamicCache(config=model.config)
    modes = [(part, part.training) for part in model.modules()]
    try:
        with torch.enable_grad():
            model.eval()(input_ids=ids, past_key_values=cache, use_cache=True)
    except TypeError as error:
        raise ConfigError(
            f"{model.family.__name__}: its layers are not handed keywords ({error})"
        ) from error
    finally:
        hook.remove()
        for part, training in modes:
            part.training = training
    if model.config.memory is not None and not any(
        isinstance(layer, StateLayer) for layer in cache.layers
    ):
        raise ConfigError(f"{model.family.__name__}: its decoder runs without its own forward")
