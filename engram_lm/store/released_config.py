"""What config.json of a released checkpoint says of its memory."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from engram_lm.config import FusionConfig, MemoryConfig, deepseek_v41, qwen4_exp
from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.memory.canonical import CanonicalMap


def deepseek_memory(text: Mapping[str, Any]) -> MemoryConfig:
    """DeepSeek-V4.1's. ConfigError for a key that is missing, MismatchError for sizes that are not
    those of the primes."""
    orders = int(key(text, "engram_max_ngram_size")) - 1
    # DeepSeek's own inference code calls the key engram_pad_id, its config.json the other.
    pad = text["engram_pad_id"] if "engram_pad_id" in text else key(text, "engram_pad_token_id")
    released = deepseek_v41()
    specification = replace(
        released.specification,
        layers=tuple(key(text, "engram_layer_ids")),
        rows_per_head=(int(key(text, "engram_vocab_size")),) * orders,
        heads=int(key(text, "engram_n_heads")),
        pad_id=int(pad),
    )
    rows = [specification.table_rows(layer) for layer in specification.layers]
    if rows != list(key(text, "engram_num_embeddings")):
        raise MismatchError(
            f"engram_num_embeddings={text['engram_num_embeddings']}: the primes add up to {rows}"
        )
    return MemoryConfig(
        specification=specification,
        head_dim=int(key(text, "engram_head_dim")),
        fusion=replace(released.fusion, norm_eps=float(key(text, "rms_norm_eps"))),
    )


def qwen_memory(text: Mapping[str, Any]) -> MemoryConfig:
    """Qwen4-Exp's; keys that are missing mean what transformers takes for them. ConfigError."""
    eos, released = key(text, "eos_token_id"), qwen4_exp().specification
    orders = int(text.get("ngram_size", 3)) - 1
    specification = replace(
        released,
        layers=tuple(layer - 1 for layer in sorted(set(text["ple_layer_ids"]))),  # from 1 there
        rows_per_head=(int(text.get("ngram_vocab_size_base", 20_000_000)),) * orders,
        heads=int(text.get("heads_per_ngram", 8)),
        seed=int(text.get("seed", 1234)),
        pad_id=int(eos[0] if isinstance(eos, list) else eos),
        rows_multiple=int(text.get("make_ngram_vocab_size_divisible_by", 128)),
        vocabulary=None,
    ).bind(CanonicalMap.identity(int(key(text, "vocab_size"))))
    width = int(text.get("ple_embed_dim") or key(text, "hidden_size"))
    eps = float(text.get("rms_norm_eps", 1e-6))
    return MemoryConfig(
        specification=specification,
        head_dim=width // specification.heads_per_layer,
        fusion=FusionConfig(
            conv_kernel=int(text.get("ple_conv_kernel_size", 4)),
            norm_eps=eps,
            conv_norm_eps=eps,
            zero_centered_norms=True,
        ),
    )


def key(text: Mapping[str, Any], name: str) -> Any:
    """A value that must be there. ConfigError."""
    if text.get(name) is None:
        raise ConfigError(f"config.json: the key {name} is missing")
    return text[name]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object. DataError."""
    try:
        return dict(json.loads(path.read_text()))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
