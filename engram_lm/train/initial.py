"""The model that a run begins with: new weights, or those of a saved model.

On several workers none holds a whole table, not even for a moment.
"""

from pathlib import Path
from typing import Any

import torch

from engram_lm.errors import MismatchError
from engram_lm.memory.canonical import backend_of, vocabulary_size
from engram_lm.memory.table import unallocated
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
        model.set_canonical_map(specification.canonical_map(tokenizer))
    return _placed(model, workers, seed)


def load(directory: Path, tokenizer: Any, workers: Workers) -> EngramLMForCausalLM:
    """The model of a saved directory, in float32, to be trained on with this tokenizer.

    MismatchError where the tokenizer beside the weights, or a memory's canonical map, is another's,
    or has more ids than the model.
    """
    config = EngramLMConfig.from_pretrained(directory)
    canonical = canonical_map(directory, tokenizer, {"config": config})
    token_ids = vocabulary_size(backend_of(tokenizer))
    if config.vocab_size < token_ids:
        raise MismatchError(
            f"vocab_size={config.vocab_size}: the tokenizer has {token_ids} token ids"
        )
    beside = directory / "tokenizer.json"
    if beside.is_file():
        saved, wanted = (backend_of(each).get_vocab() for each in (directory, tokenizer))
        if saved != wanted:
            raise MismatchError(
                f"{beside}: {len(saved)} tokens that are not the {len(wanted)} of the tokenizer "
                "to train with"
            )
    with unallocated():
        model = EngramLMForCausalLM(config)
    if canonical is not None:
        model.set_canonical_map(canonical)
    model = _placed(model, workers, seed=0)
    load_weights(model, directory, Together())
    return model


def _placed(model: EngramLMForCausalLM, workers: Workers, seed: int) -> EngramLMForCausalLM:
    # Not `to`: tables without memory cannot be moved.
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(workers.device))
    shard_tables(model, seed=seed, std=model.config.initializer_range)
    return model
