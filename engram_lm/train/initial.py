"""The model that a run begins with: new weights, or those of a saved model.

On several workers none holds a whole table, not even for a moment.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engram_lm.errors import MismatchError
from engram_lm.memory.canonical import CanonicalMap, backend_of, vocabulary_size
from engram_lm.memory.table import unallocated
from engram_lm.model.checksums import FILE_NAME as CHECKSUMS
from engram_lm.model.config import EngramLMConfig
from engram_lm.model.directory import canonical_map
from engram_lm.model.modeling import EngramLMForCausalLM
from engram_lm.train.export import load_weights
from engram_lm.train.sharded_table import shard_tables
from engram_lm.train.together import Together
from engram_lm.train.workers import Workers


def fresh(
    config: EngramLMConfig, tokenizer: Any, workers: Workers, seed: int
) -> EngramLMForCausalLM:
    """A new model, each worker with its rows; the same weights for any number of workers."""
    torch.manual_seed(seed)
    with unallocated():
        model = EngramLMForCausalLM(config)
    if config.memory_config is not None:
        specification = config.memory_config.specification
        model.set_canonical_map(specification.canonical_map(tokenizer, config.vocab_size))
    return _placed(model, workers, seed)


class Saved(NamedTuple):
    """A saved model before its weights are read. sha256: of its checksums, None without any."""

    directory: Path
    config: EngramLMConfig
    canonical: CanonicalMap | None
    sha256: str | None


def read(directory: Path, tokenizer: Any) -> Saved:
    """What a saved model is, to be trained on with this tokenizer.

    MismatchError where the tokenizer beside the weights, or a memory's canonical map, is another's,
    or has more ids than the model.
    """
    config = EngramLMConfig.from_pretrained(directory)
    canonical = canonical_map(directory, tokenizer, {"config": config})
    check_vocabulary(config, tokenizer)
    beside, checksums = directory / "tokenizer.json", directory / CHECKSUMS
    if beside.is_file():
        saved, wanted = (backend_of(each).get_vocab() for each in (directory, tokenizer))
        if saved != wanted:
            raise MismatchError(
                f"{beside}: {len(saved)} tokens that are not the {len(wanted)} of the tokenizer "
                "to train with"
            )
    digest = hashlib.sha256(checksums.read_bytes()).hexdigest() if checksums.is_file() else None
    return Saved(directory, config, canonical, digest)


def load(saved: Saved, workers: Workers) -> EngramLMForCausalLM:
    """Its model in float32, rows in its table_dtype; each worker reads its rows alone."""
    with unallocated():
        model = EngramLMForCausalLM(saved.config)
    if saved.canonical is not None:
        model.set_canonical_map(saved.canonical)
    model = _placed(model, workers, seed=0)
    load_weights(model, saved.directory, Together())
    return model


def check_vocabulary(config: EngramLMConfig, tokenizer: Any) -> None:
    """MismatchError where the tokenizer has more ids than the model."""
    token_ids = vocabulary_size(backend_of(tokenizer))
    if config.vocab_size < token_ids:
        raise MismatchError(
            f"vocab_size={config.vocab_size}: the tokenizer has {token_ids} token ids"
        )


def _placed(model: EngramLMForCausalLM, workers: Workers, seed: int) -> EngramLMForCausalLM:
    # Not `to`: tables without memory cannot be moved.
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(workers.device))
    shard_tables(model, seed=seed, std=model.config.initializer_range)
    return model
