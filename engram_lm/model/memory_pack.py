"""A memory saved apart from the model it was trained on, to be read beside others of its kind.

A directory of its own: config.json, weights named as in a model, the canonical map, the
specification and checksums.
"""

import json
import os
import warnings
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from engram_lm import whole
from engram_lm.auto import PACK
from engram_lm.config import MemoryConfig
from engram_lm.errors import ConfigError, DataError, MismatchError, instance
from engram_lm.memory.canonical import FILE_NAME as CANONICAL_MAP
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.fuse import Fuse, ShortConv
from engram_lm.memory.lookup import Memory
from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.offload import held
from engram_lm.memory.served import ServedTables
from engram_lm.memory.table import Table
from engram_lm.model import checksums, serve
from engram_lm.model.checksums import SPECIFICATION
from engram_lm.model.pretrained import MemoryPreTrained
from engram_lm.model.seal import Seal
from engram_lm.store.dequantize import PLAIN
from engram_lm.store.weights import SINGLE

TABLES = "tables."
"""What names of table weights begin with."""
_SHARED = ("model_type", "hidden_size", "num_hidden_layers")
"""What a pack's backbone must have in common with the one that it was trained on."""
_BACKBONE = (*_SHARED, "vocab_size")
"""What is recorded of it. Its vocabulary may have grown since, or not have grown yet."""


class MemoryPack(nn.Module):
    """One memory with its tables, or with the stores in which its rows are. Not trained."""

    def __init__(self, memory: MemoryConfig, width: int, canonical: CanonicalMap) -> None:
        super().__init__()
        specification = memory.specification
        self.layers = nn.ModuleDict(
            {
                str(layer): nn.ModuleDict(
                    {
                        "engram": Fuse(
                            1, width, memory.memory_dim, memory.fusion, specification.max_order
                        )
                    }
                )
                for layer in specification.layers
            }
        )
        self.tables = nn.ModuleDict()
        self.served: ServedTables | None = None
        self.seal = Seal()
        self.addresses = Addresses(specification, canonical)
        convs = [part for part in self.modules() if isinstance(part, ShortConv)]
        self.keep = max([specification.lookback, *(conv.reach for conv in convs)])

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        config: Any,
        *,
        memory: str | None = None,
        memory_budget: int | str | None = None,
        tables: str | os.PathLike[str] | None = None,
    ) -> "MemoryPack":
        """What `save_pack` wrote, for a model of this configuration.

        memory, memory_budget, tables: as for MemoryPreTrained.from_pretrained. DataError where a
        file is missing or damaged, MismatchError where the pack is of another backbone.
        """
        path = Path(directory)
        budget = serve.budget_of(memory, memory_budget, tables)
        record = record_of(path)
        for name in _SHARED:
            if record["backbone"][name] != getattr(config, name):
                raise MismatchError(
                    f"{path}: of a backbone with {name}={record['backbone'][name]!r}, this one has "
                    f"{getattr(config, name)!r}"
                )
        damaged = [file.problem for file in checksums.verify(path) if file.problem is not None]
        if damaged:
            raise DataError(f"{path}: {damaged[0]}")
        kind = MemoryConfig.from_dict(record["memory"])
        canonical = CanonicalMap.load(path / CANONICAL_MAP)
        _check_vocabulary(path, record["backbone"]["vocab_size"], config.vocab_size, canonical)
        pack = cls(kind, config.hidden_size, canonical.grown(config.vocab_size))
        with safe_open(path / SINGLE, "pt") as file:  # tables on disk are not read here
            weights = {
                key: file.get_tensor(key)
                for key in file.keys()  # noqa: SIM118
                if budget is None or not key.startswith(TABLES)
            }
        kept = [f"{TABLES}{layer}.weight" for layer in kind.specification.layers]
        kept = kept if budget is None else []
        _check_weights(path, {*pack.state_dict(), *kept}, weights)
        if budget is None:
            pack.hold_tables(kind, [weights[name].dtype for name in kept])
        else:
            pack.served = serve.open_rows(kind, path, tables, budget)
            weakref.finalize(pack, pack.served.close)
        pack.seal.set(pack.addresses.specification.digest)
        try:
            pack.load_state_dict(weights)
        except RuntimeError as error:  # shapes
            raise MismatchError(f"{path}: {' '.join(str(error).split())}") from error
        return pack.requires_grad_(False).eval()

    def hold_tables(self, memory: MemoryConfig, dtypes: Iterable[torch.dtype]) -> None:
        """Makes room for each layer's table."""
        for layer, dtype in zip(memory.specification.layers, dtypes, strict=True):
            rows = memory.specification.table_rows(layer)
            self.tables[str(layer)] = Table(rows, memory.head_dim, dtype=dtype)

    @property
    def memory(self) -> Memory:
        """Addresses and tables."""
        stores: Any = self.tables if self.served is None else self.served.layers
        return Memory(self.addresses, {int(layer): store for layer, store in stores.items()})

    def fuse(self, layer: int) -> Fuse | None:
        """What turns rows into an update at this layer; None where it has no memory."""
        if str(layer) not in self.layers:
            return None
        holder: Any = self.layers[str(layer)]
        return holder["engram"]


def _check_vocabulary(path: Path, recorded: int, size: int, canonical: CanonicalMap) -> None:
    """MismatchError for a model with fewer token ids than the pack's; a line for another number."""
    if size < canonical.token_ids:
        raise MismatchError(
            f"{path}: addressed by {canonical.token_ids} token ids, this model has vocab_size="
            f"{size}"
        )
    if size != recorded:
        warnings.warn(
            f"{path}: of a backbone with vocab_size={recorded}, this one has {size}: taken for the "
            "same with tokens added at the end",
            stacklevel=3,
        )


def _check_weights(path: Path, wanted: set[str], weights: Mapping[str, torch.Tensor]) -> None:
    """MismatchError for a tensor that is missing, is one too many (a quantiser's scale), or is no
    float: what it would become is not what it stands for."""
    for names, words in ((wanted - set(weights), "lack"), (set(weights) - wanted, "also hold")):
        if names:
            raise MismatchError(f"{path}: the weights {words} {min(names)}")
    for name, weight in weights.items():
        if name.split(".")[0] != "seal" and weight.dtype not in PLAIN:
            raise MismatchError(
                f"{path}: {name} is {weight.dtype}: float32, bfloat16 or float16 is needed"
            )


def save_pack(model: Any, directory: str | os.PathLike[str]) -> None:
    """Writes the memory of an attached model, without its backbone. ConfigError where there is none
    or its rows are in files; what stood in the directory before is replaced at the end."""
    if not isinstance(model, MemoryPreTrained):
        raise ConfigError(f"{type(model).__name__}: no memory to save; attach one")
    instance("directory", directory, str, os.PathLike)
    decoder: Any = model.base_model
    memory = model.config.memory_config
    if memory is None or decoder.addresses is None:
        raise ConfigError(f"{type(model).__name__}: no memory to save; attach one")
    if decoder.served is not None:
        raise ConfigError(
            "memory='disk': the rows are in files; open the model without, to save it"
        )
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    (path / checksums.FILE_NAME).unlink(missing_ok=True)
    weights = {
        key: held(decoder.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2])
        .to("cpu", value.dtype)
        .contiguous()
        for key, value in decoder.state_dict().items()
        if key.startswith((TABLES, "seal.")) or ".engram." in key
    }
    renamed = {_layer_name(key): value for key, value in weights.items()}
    with whole.aside(path / SINGLE) as partial:
        save_file(renamed, partial, {"format": "pt"})
    backbone = {name: getattr(model.config, name) for name in _BACKBONE}
    record = {"model_type": PACK, "backbone": backbone, "memory": model.config.memory}
    whole.write(path / "config.json", json.dumps(record, indent=1) + "\n")
    decoder.addresses.canonical.save(path)
    decoder.addresses.specification.save(path / SPECIFICATION)
    checksums.write(path)


def _layer_name(key: str) -> str:
    """Families call the list of their layers what they like (GPT-2: h)."""
    return key if ".engram." not in key else f"layers.{key.split('.', 1)[1]}"


def record_of(path: Path) -> dict[str, Any]:
    """config.json: model_type, backbone, memory. DataError where it is not a pack's."""
    try:
        record = json.loads((path / "config.json").read_text())
        if record["model_type"] != PACK:
            raise DataError(
                f"{path}: config.json is of a {record['model_type']!r}, not of a {PACK!r}"
            )
        if not set(_BACKBONE) <= set(record["backbone"]) or "memory" not in record:
            raise KeyError("backbone")
    except OSError as error:
        raise DataError(f"{path}/config.json: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}/config.json: not that of a memory pack ({error!r})") from error
    return dict(record)
