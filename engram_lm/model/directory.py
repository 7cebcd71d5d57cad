"""What a saved model needs beside its weights: finished on saving, checked on loading.

config.json holds the specification and is what counts. specification.json repeats it for other
engines, canonical_map.safetensors is the tokenizer's map, README.md the card; checksums.json says
whether the files are those that were saved.
"""

import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig
from transformers.utils.hub import cached_file

from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.memory.canonical import FILE_NAME as CANONICAL_MAP
from engram_lm.memory.canonical import CanonicalMap, backend_of, vocabulary_size
from engram_lm.memory.specification import Specification
from engram_lm.model import card, checksums
from engram_lm.model.adapters import has_adapter
from engram_lm.model.checksums import SPECIFICATION

UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError),
    *(StrictDataclassError, SafetensorError),
)
"""What the readers of JSON, configurations and weights raise for damaged files."""

_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
"""What wrappers of parts add to the names of weights."""

HUB = (
    *("cache_dir", "force_download", "local_files_only"),
    *("proxies", "revision", "subfolder", "token"),
)
"""Options that say where on the hub a file is."""


def begin(model: Any, directory: Path, options: dict[str, Any]) -> None:
    """Before weights are written. ConfigError for a model that could not be loaded again.

    options: what save_pretrained was called with.
    """
    if model.base_model.served is not None:
        raise ConfigError("memory='disk': the rows are in files; open it without, to save it")
    if model.config.memory is not None and model.base_model.addresses is None:
        raise ConfigError(
            "no canonical map: call set_canonical_map(CanonicalMap.from_tokenizer(t)) before saving"
        )
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        rows, known = len(embedding.weight), embedding.num_embeddings
        if rows not in (0, known):  # 0: DeepSpeed holds it elsewhere
            raise ConfigError(
                f"the embedding has {rows} rows, and this model knows of {known}: it was resized "
                f"through a model that shares it; call resize_token_embeddings({rows}) here too"
            )
    for name, part in (
        ("embedding", embedding),
        ("head", model.get_output_embeddings()),
    ):
        rows = len(getattr(part, "weight", ()))
        if rows not in (0, model.config.vocab_size):
            raise ConfigError(
                f"the {name} has {rows} rows, and vocab_size is {model.config.vocab_size}: the "
                "files could not be opened again; call resize_token_embeddings of the model"
            )
    weights = options.get("state_dict")
    if has_adapter(model):
        for name in ("state_dict", "push_to_hub", "distributed_checkpoint"):
            if options.get(name):
                raise ConfigError(
                    f"{name}: not of a model with an adapter, which is written in two parts; save "
                    "it without into a directory"
                )
    elif weights is not None:
        # Names alone: where workers share the weights, state_dict() would wait for the others.
        names = {_WRAPPERS.sub("", name) for name, _ in model.named_parameters()}
        ignored = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
        lacking = {name for name in names - ignored if "_flat_param" not in name} - set(weights)
        if lacking:
            raise ConfigError(f"state_dict: without {first(lacking)}, the model would not be whole")
    # From here on the old ones would be wrong.
    (directory / checksums.FILE_NAME).unlink(missing_ok=True)


def finish(model: Any, directory: Path) -> None:
    """Adds what belongs to the weights that have just been written, checksums last."""
    _remove_stale(directory)
    addresses = model.base_model.addresses
    if addresses is None:
        (directory / CANONICAL_MAP).unlink(missing_ok=True)
        (directory / SPECIFICATION).unlink(missing_ok=True)
    else:
        addresses.canonical.save(directory)
        addresses.specification.save(directory / SPECIFICATION)
    card.write(model.config, directory)
    checksums.write(directory)


def finish_upload(model: Any, directory: Path) -> None:
    """The same before an upload, which comes before save_pretrained returns, or long after."""
    if (directory / checksums.FILE_NAME).exists():
        card.write(model.config, directory)
    else:
        finish(model, directory)


def _remove_stale(directory: Path) -> None:
    # transformers leaves one file behind when it saves shards, and reads that one file first.
    pair = [directory / "model.safetensors", directory / "model.safetensors.index.json"]
    if all(path.exists() for path in pair):
        min(pair, key=lambda path: path.stat().st_mtime_ns).unlink()


def canonical_map(path: Any, tokenizer: Any, options: dict[str, Any]) -> CanonicalMap | None:
    """The map of a saved model, None where it has no memory; before any weights are read.

    Raises DataError if it is missing or damaged, MismatchError if config, specification, map and
    tokenizer (the one beside the weights, and `tokenizer`) are not of one model.
    """
    hub = {name: options[name] for name in HUB if name in options}
    config: Any = options.get("config")
    if not hasattr(config, "memory_config"):
        config = AutoConfig.from_pretrained(config or path, **hub)
    if not hasattr(config, "memory_config"):
        raise MismatchError(f"{path}: config.json is of a {config.model_type!r} without memory")
    memory = config.memory_config
    if memory is None:
        return None
    specification = memory.specification
    copy = _beside(path, SPECIFICATION, hub)
    if copy is not None:
        compare(Specification.load(copy), specification)
    file = _beside(path, CANONICAL_MAP, hub)
    if file is None:
        raise DataError(f"{path}: no {CANONICAL_MAP}; save_pretrained writes it beside the weights")
    canonical = CanonicalMap.load(file)
    specification = specification.bind(canonical)
    for given in (_beside(path, "tokenizer.json", hub), tokenizer):
        if given is not None:
            ids = check_tokenizer(specification, given)
            if ids > config.vocab_size:  # its model was saved before it was resized
                warnings.warn(
                    f"{path}: the tokenizer has {ids} ids, vocab_size is {config.vocab_size}; "
                    f"resize_token_embeddings({ids}) gives the model more",
                    stacklevel=3,
                )
    return canonical


def check_tokenizer(specification: Specification, tokenizer: Any) -> int:
    """How many ids it has. MismatchError unless it is the specification's, or that one grown."""
    ids = vocabulary_size(backend_of(tokenizer))
    specification.model_map(specification.canonical_map(tokenizer, ids), ids)
    return ids


def compare(copy: Specification, specification: Specification) -> None:
    """MismatchError unless specification.json says what config.json says."""
    if copy.digest != specification.digest:
        raise MismatchError(
            f"{SPECIFICATION} has sha256 {copy.digest}, the specification in config.json "
            f"{specification.digest}: they are of two models"
        )


def _beside(path: Any, name: str, hub: dict[str, Any]) -> str | None:
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)


def check_loaded(
    model: Any, path: Any, info: dict[str, Any], ignore_mismatched_sizes: bool
) -> None:
    """MismatchError if the weights lack a part of the decoder, or hold one that it has not.

    transformers would draw new values for the one and drop the other. Heads are not our business.
    """
    prefix = f"{model.base_model_prefix}."
    parts = {"tables", "seal", *(name for name, _ in model.base_model.named_children())}
    for key, saved, wanted in sorted(info["mismatched_keys"]):
        if _is_memory(key.removeprefix(prefix)) or not ignore_mismatched_sizes:
            raise MismatchError(
                f"{path}: {key} has shape {tuple(saved)} in the weights, {tuple(wanted)} by "
                "config.json"
            )
    for keys, words in (
        (info["missing_keys"], "the weights lack"),
        (info["unexpected_keys"], "config.json has no place for these weights:"),
    ):
        decoder = [key for key in keys if key.removeprefix(prefix).split(".")[0] in parts]
        if decoder:
            raise MismatchError(f"{path}: {words} {first(decoder)}")


def first(names: Collection[str]) -> str:
    """The first of many names, and how many more."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{min(names)}{more}"


def _is_memory(key: str) -> bool:
    return key.split(".")[0] in ("tables", "seal") or ".engram." in key
