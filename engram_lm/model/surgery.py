"""A model with another memory than it was made with: given its first one, or new addresses.

The backbone of what is returned is the given model's own: parameters are shared, not copied, and
the given model is left as it was. Optimiser moments are not part of a model: training on starts
with new ones.

Shapes: C outputs of a projection (keys first, value last), O orders, K heads per order, E values
per row.
"""

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from engram_lm.config import MemoryConfig
from engram_lm.errors import ConfigError, instance
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.fuse import Fuse
from engram_lm.memory.specification import Specification
from engram_lm.model.carry import Read, carry
from engram_lm.model.identity import name_after
from engram_lm.model.modeling import EngramLMPreTrainedModel
from engram_lm.model.seal import Seal

Model = TypeVar("Model", bound=EngramLMPreTrainedModel)


@torch.no_grad()
def give_memory(model: Model, memory: MemoryConfig, tokenizer: Any) -> Model:
    """The model with a memory that adds nothing yet: its logits stay the same, bit for bit.

    Rows and keys are drawn by torch's generator; the value projection is zero, and so is the short
    convolution. The first step moves the value projection, the second the rows as well.
    tokenizer: the model's, in any form that CanonicalMap.from_tokenizer takes, or a CanonicalMap.
    ConfigError if there is a memory already or its layers are not the model's, MismatchError if
    the tokenizer has more ids than the model.
    """
    _check_model(model)
    instance("memory", memory, MemoryConfig)
    if model.config.memory is not None:
        raise ConfigError("the model has a memory already: readdress(model, ...) changes it")
    canonical = canonical_of(memory, tokenizer, model.config)
    given = _rebuild(model, memory)
    given.set_canonical_map(canonical)
    return given


def _check_model(model: Any) -> None:
    if not isinstance(model, EngramLMPreTrainedModel):
        raise ConfigError(
            f"model={type(model).__name__}: an EngramLM model is needed; attach(model, ...) gives "
            "a memory to others"
        )


def canonical_of(memory: MemoryConfig, tokenizer: Any, config: Any) -> CanonicalMap:
    """The map by the memory's rule of a tokenizer, or the CanonicalMap itself that is given."""
    if isinstance(tokenizer, CanonicalMap):
        return tokenizer
    return memory.specification.canonical_map(tokenizer, config.vocab_size)


class Readdressed(NamedTuple):
    """A model under another specification."""

    model: Any
    kept: dict[int, float]
    """Layer -> share of the given reads that find the values they found before."""


@torch.no_grad()
def readdress(
    model: EngramLMPreTrainedModel,
    specification: Specification,
    reads: Iterable[Read] | None = None,
) -> Readdressed:
    """The model under another specification: more rows, heads, orders or layers, another seed.

    reads: sequences as the model is given them. The row of each of their n-grams goes along to its
    new address; where several meet in one row, the one read most often. Where none meet, logits of
    these sequences stay the same: bit for bit, or to rounding where heads were added. N-grams that
    are not among them find new rows, as untrained ones do.
    Without reads all rows are new and the value projection is zero, as in `give_memory`: the
    backbone alone speaks until training has filled them.
    ConfigError where something would be lost, MismatchError for another vocabulary.
    """
    _check_model(model)
    instance("specification", specification, Specification)
    memory = model.config.memory_config
    if memory is None:
        raise ConfigError("memory=None: give_memory(model, ...) gives a model its first one")
    old: Any = model.base_model
    addresses = old.memory.addresses
    _check_growth(memory, specification)
    changed = _rebuild(model, replace(memory, specification=specification))
    changed.set_canonical_map(addresses.canonical)
    new: Any = changed.base_model
    for layer in memory.specification.layers:
        fuse = copy.deepcopy(old.layers[layer].engram)
        fuse.kv = _widened(fuse.kv, memory, specification)
        if reads is None:
            silence(fuse)
        new.layers[layer].engram = fuse
    if reads is None:
        return Readdressed(changed, dict.fromkeys(memory.specification.layers, 0.0))
    kept = {}
    for layer, moves in carry(addresses, new.addresses, reads).items():
        source, target = old.tables[str(layer)].weight, new.tables[str(layer)].weight
        target[moves.to_U.to(target.device)] = source[moves.from_U.to(source.device)]
        kept[layer] = moves.kept
    return Readdressed(changed, kept)


def _check_growth(memory: MemoryConfig, specification: Specification) -> None:
    before = memory.specification
    lost = sorted(set(before.layers) - set(specification.layers))
    if lost:
        raise ConfigError(
            f"layers={specification.layers}: the memory of layer {lost[0]} would be lost"
        )
    if specification.heads < before.heads:
        raise ConfigError(
            f"heads={specification.heads}: the model has {before.heads} per order, none may be lost"
        )
    if specification.max_order < before.max_order:
        raise ConfigError(
            f"orders up to {specification.max_order}: the model has {before.max_order}, none may "
            "be lost"
        )
    if specification.max_order > before.max_order and memory.fusion.conv_kernel is not None:
        raise ConfigError(
            f"orders up to {specification.max_order}: the short convolution's dilation is the "
            f"highest order, {before.max_order}, and its weights fit no other"
        )


def _rebuild(model: Model, memory: MemoryConfig) -> Model:
    """The same backbone around a new memory that adds nothing."""
    config = copy.deepcopy(model.config)
    config.memory = memory.to_dict()
    config.check()
    with torch.device("meta"):
        rebuilt = type(model)(config)
    decoder: Any = rebuilt.base_model
    fuses = [decoder.layers[layer].engram for layer in memory.specification.layers]
    own = [part for root in (decoder.tables, *fuses) for part in root.modules()]
    for fuse in fuses:
        fuse.to(model.dtype)
    if config.table_dtype is None:
        decoder.tables.to(model.dtype)
    for root in (decoder.tables, *fuses):
        root.to_empty(device=model.device)
    for part in own:
        rebuilt._init_weights(part)
    for fuse in fuses:
        silence(fuse)
    decoder.seal = Seal().to(model.device)
    backbone = dict(model.named_modules())
    for name, part in rebuilt.named_modules():
        if part not in own and part is not decoder.seal:
            parameters = backbone[name].named_parameters(recurse=False)
            for key, tensor in (*parameters, *backbone[name].named_buffers(recurse=False)):
                setattr(part, key, tensor)
    if model.can_generate():
        rebuilt.generation_config = copy.deepcopy(model.generation_config)
    name_after(rebuilt, config)
    return rebuilt.train(model.training)


def silence(fuse: Fuse) -> None:
    """Gate times 0, and a convolution of zeros: an update of exactly 0, whatever the rows are."""
    fuse.kv.weight[-fuse.width :] = 0
    if fuse.kv.bias is not None:
        fuse.kv.bias[-fuse.width :] = 0


def _widened(kv: nn.Linear, memory: MemoryConfig, specification: Specification) -> nn.Linear:
    """Projections that read further heads too, at first with weights of zero."""
    weight_CM, before = kv.weight, memory.specification
    orders, width = len(specification.rows_per_head), specification.heads_per_layer
    wide_COKE = weight_CM.new_zeros(len(weight_CM), orders, specification.heads, memory.head_dim)
    had_COKE = weight_CM.unflatten(1, (len(before.rows_per_head), before.heads, memory.head_dim))
    wide_COKE[:, : had_COKE.shape[1], : before.heads] = had_COKE
    widened = copy.deepcopy(kv)
    widened.in_features = width * memory.head_dim
    widened.weight = nn.Parameter(wide_COKE.flatten(1))
    return widened
