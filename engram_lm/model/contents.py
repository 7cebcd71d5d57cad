"""What a saved directory holds, and whether it is whole. Weights are not loaded: headers only."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from engram_lm.auto import CONFIGURATIONS, PACK
from engram_lm.config import MemoryConfig
from engram_lm.errors import DataError, EngramError
from engram_lm.memory.canonical import FILE_NAME as CANONICAL_MAP
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.specification import Specification
from engram_lm.model import checksums
from engram_lm.model.attached import CAUSAL_LMS, DECODERS
from engram_lm.model.checksums import SPECIFICATION, Checked
from engram_lm.model.directory import UNREADABLE, check_tokenizer, compare, first
from engram_lm.model.memory_pack import MemoryPack, record_of
from engram_lm.model.seal import digest
from engram_lm.store.weights import INDEX, SINGLE, check_one_save, weight_files

_KINDS = (CAUSAL_LMS, DECODERS)


@dataclass(frozen=True, kw_only=True)
class Contents:
    """One saved model or memory pack. Whole: every file is as it was saved, and all are of one."""

    directory: str
    model: dict[str, Any]
    """architecture, layers, hidden_size, streams, parameters, dtypes (name -> parameters)."""
    memory: dict[str, Any] | None
    tokenizer: str
    """beside it, none, or another's."""
    files: tuple[Checked, ...]
    problems: tuple[str, ...]
    """One line each; empty if the directory is whole."""

    @property
    def whole(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {"whole": self.whole, **asdict(self)}


def read(directory: Path) -> Contents:
    """Looks at every file. DataError where there is no saved model of ours at all."""
    kind = _kind(directory)
    problems: list[str] = []
    try:
        files = checksums.verify(directory)
    except DataError as error:
        problems.append(str(error))
        files = checksums.unverified(directory)
    problems += [file.problem for file in files if file.problem is not None]
    model: dict[str, Any] = {}
    memory, tokenizer = None, "none"
    tensors = _tensors(directory, problems)
    with _noting(problems, "config.json"):
        config, empty = _pack(directory) if kind == PACK else _empty(directory)
        model = _model(config, empty, tensors, problems)
        memory = _memory(directory, config, tensors, problems)
        tokenizer = _tokenizer(directory, config, problems)
    return Contents(
        directory=str(directory),
        model=model,
        memory=memory,
        tokenizer=tokenizer,
        files=tuple(files),
        problems=tuple(dict.fromkeys(problems)),
    )


def _kind(directory: Path) -> str | None:
    """What config.json says; None where it says nothing."""
    if (directory / "model" / "config.json").is_file():
        raise DataError(f"{directory}: a training run; the model it saved is {directory / 'model'}")
    path = directory / "config.json"
    if not path.is_file():
        raise DataError(f"{directory}: no config.json, so no saved model")
    if (directory / "metrics.jsonl").exists():
        raise DataError(f"{directory}: a training run that has not saved its model yet")
    try:
        kind = json.loads(path.read_text()).get("model_type")
    except (ValueError, AttributeError):
        return None  # said in one line when the configuration is read
    accepted = (*CONFIGURATIONS, PACK)
    if kind not in accepted:
        raise DataError(
            f"{directory}: a model of type {kind!r}, not {' or '.join(map(repr, accepted))}"
        )
    return str(kind)


@contextmanager
def _noting(problems: list[str], name: str) -> Iterator[None]:
    """A line in problems instead of an error, where the file `name` will not do."""
    try:
        yield
    except EngramError as error:
        problems.append(str(error))
    except UNREADABLE as error:
        problems.append(f"{name}: {' '.join(str(error).split())}")


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    dtype: str
    path: Path


def _tensors(directory: Path, problems: list[str]) -> dict[str, _Tensor]:
    """Every tensor of the weights, by the headers of the files that from_pretrained reads."""
    with _noting(problems, SINGLE):
        check_one_save(directory)
    paths = [directory / SINGLE]
    if not paths[0].exists() and (directory / INDEX).exists():
        with _noting(problems, INDEX):
            paths = sorted(set(weight_files(directory).values()))
    tensors: dict[str, _Tensor] = {}
    for path in paths:
        if not path.exists():
            problems.append(f"missing: {path.name}")
            continue
        with _noting(problems, path.name):
            found = _header(path)
            twice = sorted(found.keys() & tensors.keys())
            if twice:
                other = tensors[twice[0]].path.name
                problems.append(f"twice: {first(twice)} in {other} and {path.name}")
            tensors |= found
    return tensors


def _header(path: Path) -> dict[str, _Tensor]:
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: _Tensor(tuple(part.get_shape()), part.get_dtype(), path)
            for name, part in slices.items()
        }


def _empty(directory: Path) -> tuple[Any, nn.Module]:
    """A saved model's configuration, and the model on the meta device."""
    config = AutoConfig.from_pretrained(directory)
    kinds = {kind[type(config)].__name__: kind[type(config)] for kind in _KINDS}
    architecture = (config.architectures or list(kinds))[0]
    with torch.device("meta"):
        return config, kinds.get(architecture, _KINDS[0][type(config)])(config)


def _pack(directory: Path) -> tuple[Any, nn.Module]:
    """The same of a memory pack; what is said of its backbone stands for a configuration."""
    record = record_of(directory)
    memory = MemoryConfig.from_dict(record["memory"])
    config = SimpleNamespace(**record["backbone"], architectures=None, memory_config=memory)
    canonical = CanonicalMap.load(directory / CANONICAL_MAP)
    with torch.device("meta"):
        pack = MemoryPack(memory, config.hidden_size, canonical)
        pack.hold_tables(memory, [torch.float32] * len(memory.specification.layers))
    return config, pack


def _model(
    config: Any, model: nn.Module, tensors: dict[str, _Tensor], problems: list[str]
) -> dict[str, Any]:
    tied: Any = getattr(model, "all_tied_weights_keys", ())
    expected = {name: value for name, value in model.state_dict().items() if name not in tied}
    buffers = {name for name, _ in model.named_buffers()}
    if isinstance(model, PreTrainedModel) and not set(expected) <= set(tensors):
        # Files hold some families' experts one by one.
        expected = revert_weight_conversion(model, expected)
    for name, value in expected.items():
        if name in tensors and tensors[name].shape != tuple(value.shape):
            problems.append(
                f"mismatch: {name} has shape {tensors[name].shape} in the weights, "
                f"{tuple(value.shape)} by config.json"
            )
    for names, words in (
        (set(expected) - set(tensors), "missing: the weights lack"),
        (set(tensors) - set(expected), "extra: config.json has no place for these weights:"),
    ):
        if names and tensors:
            problems.append(f"{words} {first(names)}")
    dtypes: dict[str, int] = {}
    for name, tensor in tensors.items():
        if name in expected and name not in buffers:
            dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return {
        "architecture": (config.architectures or [type(model).__name__])[0],
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "streams": getattr(config, "streams", 1),
        "parameters": sum(dtypes.values()),
        "dtypes": dtypes,
    }


def _memory(
    directory: Path, config: Any, tensors: dict[str, _Tensor], problems: list[str]
) -> dict[str, Any] | None:
    memory = config.memory_config
    if memory is None:
        return None
    specification = memory.specification
    if (directory / SPECIFICATION).exists():
        with _noting(problems, SPECIFICATION):
            compare(Specification.load(directory / SPECIFICATION), specification)
    else:
        problems.append(f"missing: {SPECIFICATION}")
    with _noting(problems, CANONICAL_MAP):
        specification.bind(CanonicalMap.load(directory / CANONICAL_MAP))
    for name in tensors:
        if name.split(".", 1)[-1] == "seal.sha256" or name == "seal.sha256":
            with _noting(problems, tensors[name].path.name):
                _check_seal(tensors[name].path, name, specification)
    rows = {layer: specification.table_rows(layer) for layer in specification.layers}
    return {
        "specification_sha256": specification.digest,
        "layers": list(specification.layers),
        "orders": [2, specification.max_order],
        "heads": specification.heads,
        "rows": {str(layer): count for layer, count in rows.items()},
        "head_dim": memory.head_dim,
        "parameters": sum(rows.values()) * memory.head_dim,
    }


def _check_seal(path: Path, name: str, specification: Specification) -> None:
    with safe_open(path, "pt") as file:
        found = digest(file.get_tensor(name))
    if found != specification.digest:
        raise DataError(
            f"mismatch: the weights were trained with the specification of sha256 {found}, "
            f"config.json holds {specification.digest}"
        )


def _tokenizer(directory: Path, config: Any, problems: list[str]) -> str:
    path = directory / "tokenizer.json"
    if not path.exists():
        return "none"
    if config.memory_config is not None:
        before = len(problems)
        with _noting(problems, path.name):
            ids = check_tokenizer(config.memory_config.specification, path)
        if len(problems) > before:
            return "another's"
        if ids > config.vocab_size:
            problems.append(
                f"mismatch: {path.name} has {ids} ids, vocab_size is {config.vocab_size}"
            )
    return "beside it"
