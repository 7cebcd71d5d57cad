"""A trained model as save_pretrained writes it, and a start from one: each worker with its rows.

Shapes: rows of a table (rows, E), of which a worker holds those from `first_row` on.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from engram_lm.errors import DataError, MismatchError
from engram_lm.memory.table import Table
from engram_lm.model.directory import first
from engram_lm.model.modeling import EngramLMForCausalLM
from engram_lm.store.weights import weight_files
from engram_lm.train.blocks import BYTES
from engram_lm.train.sharded_table import ShardedTable
from engram_lm.train.together import Together, reason


def export(model: EngramLMForCausalLM, tokenizer: Any, directory: Path, together: Together) -> None:
    """Writes the model and its tokenizer, file for file what a single worker's would be.

    Rows that several workers hold go through files beside the directory, which the first worker
    maps into its memory: no worker holds a whole table, and for a while the disk holds it twice.
    The first worker holds the whole backbone. DataError, on all workers, where one cannot write.
    """
    scratch = directory.with_name(f"{directory.name}.partial")
    tables = {name: each for name, each in _tables(model).items() if each.shards is not None}

    def make_room() -> None:
        if together.main:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            for name, table in tables.items():
                with (scratch / name).open("wb") as file:
                    file.truncate(table.rows * table.format.row_bytes)

    def write_rows() -> None:
        for name, table in tables.items():
            _write(table, scratch / name)

    def save() -> None:
        if together.main:
            for name, table in tables.items():
                state[name] = _mapped(scratch / name, table)
            try:
                model.save_pretrained(directory, state_dict=state)
            except SafetensorError as error:
                raise DataError(f"{directory}: cannot be written ({reason(error)})") from error
            tokenizer.save_pretrained(directory)
            shutil.rmtree(scratch)

    together.do(scratch, make_room)
    together.do(scratch, write_rows)
    state = {}
    for name, tensor in _whole(model):  # collective under fully_shard; kept by the first alone
        if together.main and name not in tables:
            state[name] = tensor
    together.do(directory, save)


def load_weights(model: EngramLMForCausalLM, directory: Path, together: Together) -> None:
    """Fills a model from what save_pretrained wrote; of a ShardedTable, this worker's rows alone.

    Before fully_shard takes the backbone apart. Values are converted to the model's dtypes.
    MismatchError where names, shapes or specification are others, DataError where a file cannot be
    read; on all workers.
    """
    together.do(directory, lambda: _load(model, directory))


def _tables(model: EngramLMForCausalLM) -> dict[str, ShardedTable]:
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, ShardedTable)
    }


def _whole(model: EngramLMForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Weights by name, tied ones once; what fully_shard took apart is put together."""
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor not in seen:
            seen.add(tensor)
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            yield name, whole.detach()


def _write(table: ShardedTable, path: Path) -> None:
    if table.replicas is not None and table.replicas.rank > 0:
        return  # another worker holds, and writes, the same rows
    with path.open("r+b") as file:
        file.seek(table.first_row * table.format.row_bytes)
        for start, stop in _blocks(0, len(table.weight), table.format.row_bytes):
            rows = table.weight[start:stop].detach().cpu().contiguous()
            file.write(rows.view(torch.uint8).numpy().data)


def _mapped(path: Path, table: ShardedTable) -> Tensor:
    dim = table.format.dim
    values = torch.from_file(
        str(path), shared=True, size=table.rows * dim, dtype=table.weight.dtype
    )
    return values.view(table.rows, dim)


def _blocks(start: int, stop: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, BYTES // row_bytes)
    return ((row, min(row + step, stop)) for row in range(start, stop, step))


@torch.no_grad()
def _load(model: EngramLMForCausalLM, directory: Path) -> None:
    tables = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, Table)}
    files, tied = weight_files(directory), model.all_tied_weights_keys
    wanted = {name: value for name, value in model.state_dict().items() if name not in tied}
    for names, words in (
        (wanted.keys() - files.keys(), "the weights lack"),
        (files.keys() - wanted.keys(), "the model has no place for"),
    ):
        if names:
            raise MismatchError(f"{directory}: {words} {first(names)}")
    backbone = {}
    for name, value in sorted(wanted.items(), key=lambda item: str(files[item[0]])):
        table = tables.get(name)
        shape, first_row = tuple(value.shape), 0
        if isinstance(table, ShardedTable):
            shape, first_row = (table.rows, table.format.dim), table.first_row
        with _opened(files[name]) as file:
            saved = file.get_slice(name)
            if tuple(saved.get_shape()) != shape:
                raise MismatchError(
                    f"{directory}: {name} has shape {tuple(saved.get_shape())} in the weights, "
                    f"{shape} in the model"
                )
            if table is None:
                backbone[name] = file.get_tensor(name)
                continue
            for start, stop in _blocks(0, len(value), table.format.row_bytes):
                value[start:stop] = saved[first_row + start : first_row + stop]
    # By way of load_state_dict, where the seal compares specifications.
    model.load_state_dict(backbone, strict=False)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: the weights cannot be read ({reason(error)})") from error
