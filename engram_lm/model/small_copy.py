"""A small copy of a decoder's class: few layers of each kind, narrow, with loud random weights.

What a family's masks and caches can do does not depend on its widths, so it can be tried on a copy
that is made and run within a second. The copy's configuration is the model's own but for sizes.
"""

import copy
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from engram_lm.errors import ConfigError

VOCABULARY = 64
FIRST_ID = 3
"""Token ids below it stand for the pad and other special tokens."""
WINDOW = 6
"""Tokens of a sliding window or of a chunk of attention: fewer than a probe's texts have."""
HEAD_VALUES = 8
"""Values of a head that are left of more."""
EXPERTS = 8
PARAMETERS = 12_000_000
"""At most so many: they are drawn and used in seconds on one core."""

_WIDTH = re.compile(
    r"(^|_)(hidden|size|sizes|dim|rank|width|embd|inner|d_model|d_ff|d_ssm|d_state|d_inner)($|_)"
)
_NO_WIDTH = re.compile(
    r"vocab|kernel|window|chunk|conv|batch|patch|image|group|block|step|^n_|num|beam|head|topk"
)
_HEAD_WIDTH = re.compile(r"head_(dim|size)|d_head|_rotary_dim|^rotary_dim|^kv_channels")
_HEADS = re.compile(r"(^|_)(n|num)(_\w+)?_heads?(_\w*)?$|^n_head$|^num_query_groups$")
_EXPERTS = re.compile(r"(^|_)(n|num)_(local_|routed_)?experts$")
_CHOSEN = re.compile(r"experts_per_tok$|top_?k(_experts)?$|^num_selected_experts$")
_GROUPS = ("n_group", "topk_group")
_WINDOWS = re.compile(r"sliding_window$|window_size$|attention_chunk_size$")
_CHUNKS = re.compile(r"^(mamba_)?chunk_size$")
_KIND = ("layer_type", "attention_type", "block_type", "sliding_window", "is_sliding")
"""What layers of one class are told apart by."""


def decoder_layers(decoder: Any) -> nn.ModuleList:
    """The list of a decoder's layers. ConfigError where it has no list of their number, or two."""
    count = getattr(decoder.config, "num_hidden_layers", None)
    if count is None:
        raise ConfigError(
            f"{type(decoder).__name__}: its configuration has no num_hidden_layers; a decoder of "
            "text alone is needed"
        )
    lists = [
        module
        for module in decoder.children()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(lists) != 1:
        raise ConfigError(
            f"{type(decoder).__name__}: {len(lists)} lists of {count} decoder layers stand in it; "
            "one is needed"
        )
    return lists[0]


def kinds(layers: nn.ModuleList) -> list[str]:
    """One text a layer; equal where their parts have the same names, classes and types."""
    return [
        repr(
            [
                (name, type(part).__name__, [str(getattr(part, field, None)) for field in _KIND])
                for name, part in layer.named_modules()
                if not name.startswith("engram")
            ]
        )
        for layer in layers
    ]


def small_copy(family: Any, config: Any, layer_kinds: list[str]) -> Any:
    """A model of the class `family`, in evaluation mode; None where none can be made.

    family: a causal language model's class of transformers. layer_kinds: from `kinds`, for the
    layers of the model itself; the first layers are kept, until there is one of each kind. Draws
    from torch's generator, and takes its default dtype and device.
    """
    count = max(2, 1 + max(layer_kinds.index(kind) for kind in set(layer_kinds)))
    try:
        for small in _configurations(config, min(count, len(layer_kinds))):
            model = _made(family, small)
            if model is not None and _has(model, layer_kinds):
                return model
    except Exception:  # whatever a family's configuration makes of other sizes
        return None
    return None


def _made(family: Any, small: Any) -> Any:
    """None where the class does not run with these sizes, or is too large."""
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in family(small).parameters())
        if size > PARAMETERS:
            return None
        torch.manual_seed(0)
        model = family(copy.deepcopy(small)).eval()
        _make_loud(model)
        ids = torch.arange(FIRST_ID, FIRST_ID + 2 * WINDOW)[None]
        with torch.no_grad():
            return model if model(input_ids=ids).logits.isfinite().all() else None
    except Exception:  # whatever a family's class makes of sizes that do not fit each other
        return None


def _has(model: Any, layer_kinds: list[str]) -> bool:
    """Whether it has layers of as many kinds; classes may differ, where the model is quantised."""
    return len(set(kinds(decoder_layers(model.base_model)))) == len(set(layer_kinds))


@torch.no_grad()
def _make_loud(model: nn.Module) -> None:
    """So that every part matters to the logits, and none drowns the others."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "norm" not in name:
            nn.init.normal_(parameter, std=0.85 / math.sqrt(parameter.shape[-1]))


def _configurations(config: Any, layers: int) -> Iterator[Any]:
    """The smallest first."""
    values = config.to_dict()
    integers = {name: value for name, value in values.items() if type(value) is int and value > 0}
    heads = [value for name, value in integers.items() if _HEADS.search(name) and value > 1]
    widths = [value for name, value in integers.items() if _HEAD_WIDTH.search(name)]
    if not widths:
        widths = [config.hidden_size // config.num_attention_heads]
    by_heads = math.gcd(*heads) if heads else 1
    by_width = max(1, math.gcd(*widths) // HEAD_VALUES)
    by_width = 2 ** (by_width.bit_length() - 1)
    divisors = {
        (g, f)
        for g in (max(1, by_heads // 2), by_heads, 1)
        for f in (by_width, max(1, by_width // 4), 1)
    }
    for fewer_experts in (True, False):
        # Two heads or more where it can be: one alone would hide that keys are shared.
        for pair in sorted(
            divisors, key=lambda pair: (pair[0] < by_heads, math.prod(pair)), reverse=True
        ):
            yield _shrunk(config, values, layers, *pair, fewer_experts)


def _shrunk(
    config: Any, values: dict[str, Any], layers: int, by_heads: int, by_width: int, experts: bool
) -> Any:
    small = copy.deepcopy(config)
    for name in ("quantization_config", "dtype"):
        if hasattr(small, name):
            setattr(small, name, None)
    if small._attn_implementation not in ("eager", "sdpa"):
        small._attn_implementation = "eager"
    count = config.num_hidden_layers
    for name, value in values.items():
        changed = value
        if isinstance(value, list | tuple) and len(value) == count > 2:
            changed = value[:layers]
            if all(type(each) is int for each in value) and _WIDTH.search(name):
                changed = type(value)(max(1, each // (by_heads * by_width)) for each in changed)
        elif name.endswith("token_id") and value is not None:
            changed = 1 if name == "pad_token_id" else 2
        elif type(value) is int and value > 0:
            longest = getattr(config, "max_position_embeddings", None) or math.inf
            changed = _smaller(name, value, by_heads, by_width, experts, longest)
        if changed is not value:
            setattr(small, name, changed)
    small.num_hidden_layers = layers
    return small


def _smaller(
    name: str, value: int, by_heads: int, by_width: int, experts: bool, longest: float
) -> int:
    if "vocab_size" in name:
        return VOCABULARY
    if _WINDOWS.search(name):
        # One that no text can fill is none.
        return min(value, WINDOW) if value < longest else value
    if _CHUNKS.search(name):
        return min(value, 8)
    if experts and _EXPERTS.search(name):
        return min(value, EXPERTS)
    if experts and _CHOSEN.search(name) and not name.startswith("index"):
        return min(value, 2)
    if experts and name in _GROUPS:
        return 1
    if _HEAD_WIDTH.search(name):
        return max(1, value // by_width)
    if _HEADS.search(name):
        return max(1, value // by_heads) if value > 1 else value
    if (_WIDTH.search(name) and not _NO_WIDTH.search(name)) or name in ("n_embd", "n_inner"):
        smaller = max(1, value // (by_heads * by_width))
        # Products over groups of experts want rows of whole 16 bytes.
        return -(-smaller // 8) * 8 if "intermediate" in name else smaller
    return value
