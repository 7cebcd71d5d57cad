"""Conditional memory for language models: define, train, study, store and serve Engram tables.

Names are imported when they are first used, so that addressing does not wait for transformers. Its
Auto classes open our models as soon as this package is imported, before or after transformers.
"""

from importlib import import_module
from typing import Any

from engram_lm.auto import announce

_HOMES = {
    "AddressError": "engram_lm.errors",
    "Addresses": "engram_lm.memory.ngrams",
    "AttachedForCausalLM": "engram_lm.model",
    "Cache": "engram_lm.store.cache",
    "CanonicalMap": "engram_lm.memory.canonical",
    "CompiledAddresses": "engram_lm.memory.ngrams_numba",
    "ConfigError": "engram_lm.errors",
    "DataError": "engram_lm.errors",
    "Disk": "engram_lm.store.disk",
    "EngramCallback": "engram_lm.train.trainer_callback",
    "EngramError": "engram_lm.errors",
    "EngramLMConfig": "engram_lm.model",
    "EngramLMForCausalLM": "engram_lm.model",
    "EngramLMModel": "engram_lm.model",
    "EngramTrainer": "engram_lm.train.trainer",
    "EngramTrainerMixin": "engram_lm.train.trainer",
    "FusionConfig": "engram_lm.config",
    "Host": "engram_lm.store.host",
    "JointOptimizer": "engram_lm.train.joint_optimizer",
    "Memory": "engram_lm.memory.lookup",
    "MemoryConfig": "engram_lm.config",
    "MismatchError": "engram_lm.errors",
    "Overlay": "engram_lm.store.overlay",
    "Region": "engram_lm.store.region",
    "Released": "engram_lm.store.released",
    "Resident": "engram_lm.store.resident",
    "RowAdam": "engram_lm.train.row_adam",
    "RowFormat": "engram_lm.memory.rows",
    "RowStore": "engram_lm.memory.rows",
    "RowwiseRMSprop": "engram_lm.train.rowwise_rmsprop",
    "Specification": "engram_lm.memory.specification",
    "Table": "engram_lm.memory.table",
    "UntrainedRowsWarning": "engram_lm.errors",
    "WorkerError": "engram_lm.errors",
    "Workers": "engram_lm.train.workers",
    "attach": "engram_lm.model.attach",
    "detach": "engram_lm.model.attach",
    "give_memory": "engram_lm.model.surgery",
    "ledger": "engram_lm.model.budget",
    "param_groups": "engram_lm.train.joint_optimizer",
    "preset": "engram_lm.model.presets",
    "readdress": "engram_lm.model.surgery",
    "replicate_tables": "engram_lm.train.replicas",
    "save_pack": "engram_lm.model.memory_pack",
    "shard_tables": "engram_lm.train.sharded_table",
    "twin": "engram_lm.model.twin",
    "unallocated": "engram_lm.memory.table",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engram_lm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__


announce()
