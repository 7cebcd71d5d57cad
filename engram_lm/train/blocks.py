"""Rows of a tensor that may be spread over workers, as torch.distributed.checkpoint takes them.

A DTensor would be written as one piece a worker, and a reader loads a piece whole: a table saved by
one worker would pass whole through the memory of each of many. So rows go in blocks, and no process
grouping has to be named: who holds which rows is told by their numbers.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

BYTES = 16 * 2**20
"""Of a block at most (one row at least): what a worker holds beside its rows while it reads."""


class Blocks(Tensor):
    """Rows [first_row, first_row + len(local)) of a tensor of `rows` rows, written and read in
    place, block by block. It has the whole tensor's shape and answers nothing but the checkpoint.
    """

    local: Tensor
    first_row: int

    @staticmethod
    def __new__(cls, local: Tensor, first_row: int, rows: int) -> "Blocks":
        size = (rows, *local.shape[1:])
        blocks: Blocks = Tensor._make_wrapper_subclass(
            cls, size, dtype=local.dtype, device=local.device
        )
        blocks.local, blocks.first_row = local.detach(), first_row
        return blocks

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Blocks(shape={tuple(self.shape)}, first_row={self.first_row})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any) -> Any:
        raise NotImplementedError(f"{function}: blocks are only written and read")

    # What torch.distributed._checkpointable asks of a tensor that is not one piece.

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        values = self.local[0].numel() if len(self.local) else 1
        step = max(1, BYTES // (values * self.local.itemsize))
        return [
            ChunkStorageMetadata(
                offsets=torch.Size((self.first_row + start, *(0 for _ in self.shape[1:]))),
                sizes=torch.Size((min(step, len(self.local) - start), *self.shape[1:])),
            )
            for start in range(0, len(self.local), step)
        ]

    def __create_write_items__(self, name: str, blocks: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for chunk in self.__create_chunk_list__():
            if chunk.offsets == index.offset:
                return self.local.narrow(0, chunk.offsets[0] - self.first_row, chunk.sizes[0])
        raise ValueError(f"{index}: not a block of rows {self.first_row} and on")
