"""Everything a run goes on from, as named tensors: weights, optimiser states, random numbers.

States go by their parameter's name, not by a position, and rows by their numbers in the whole
table: so they find their places on any number of workers.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from engram_lm.memory.table import Table
from engram_lm.train.blocks import Blocks
from engram_lm.train.checkpoint import Checkpoint, Checkpoints
from engram_lm.train.optimizers import Optimizers
from engram_lm.train.sharded_table import ShardedTable

_RANDOM, _SKIPPED = "random", "skipped_steps"


class State:
    """Of one model and its optimisers, where they are: nothing is copied."""

    def __init__(self, model: nn.Module, optimizers: Optimizers) -> None:
        self.model, self.optimizers = model, optimizers
        modules = model.modules()
        self.tables = {each.weight: each for each in modules if isinstance(each, Table)}

    def tensors(self, rank: int) -> dict[str, Tensor]:
        """What a checkpoint holds of worker `rank`, which is this one."""
        return {
            **self._weights(),
            **self._states(),
            _SKIPPED: torch.tensor([self.optimizers.skipped, self.optimizers.skipped_in_a_row]),
            f"{_RANDOM}.{rank}": torch.get_rng_state(),
        }

    def load(self, checkpoint: Checkpoint, checkpoints: Checkpoints) -> None:
        """Takes all of it from a checkpoint of any number of workers; all call it.

        Random numbers go on where the number is the same; else each worker gets a new seed.
        MismatchError where the model is another, DataError where a file is damaged.
        """
        for name, optimizer, parameter in self._trained():
            optimizer.state[parameter] = {
                key.removeprefix(name): self._empty(parameter, saved)
                for key, saved in checkpoint.shapes.items()
                if key.startswith(name)
            }
        weights = self._weights()
        # Buffers by way of load_state_dict, where the seal compares.
        buffers = {
            f"model.{name}": torch.empty_like(buffer)
            for name, buffer in self.model.named_buffers()
            if f"model.{name}" in weights
        }
        random = {
            name: torch.empty(tuple(saved.size), dtype=torch.uint8)
            for name, saved in checkpoint.shapes.items()
            if name.startswith(_RANDOM)
        }
        skipped = torch.zeros(2, dtype=torch.int64)
        rest = {**self._states(), **random, _SKIPPED: skipped}
        checkpoints.read(checkpoint, {**weights, **buffers, **rest})
        self.optimizers.skipped, self.optimizers.skipped_in_a_row = skipped.tolist()
        if self.optimizers.rows is not None:  # they count on the CPU, wherever the rows are
            for state in self.optimizers.rows.state.values():
                if state:  # none before the first step
                    state["step"] = state["step"].cpu()
        self.model.load_state_dict(
            {name.removeprefix("model."): buffer for name, buffer in buffers.items()}, strict=False
        )
        together = checkpoints.together
        states = [random[f"{_RANDOM}.{rank}"] for rank in range(len(random))]
        if len(states) == together.size:
            torch.set_rng_state(states[together.rank])
        else:
            first = torch.Generator()
            first.set_state(states[0])
            seeds = torch.randint(2**62, (together.size,), generator=first)
            torch.manual_seed(int(seeds[together.rank]))

    def _weights(self) -> dict[str, Tensor]:
        """Parameters and buffers; tied ones once."""
        kept, seen = {}, set()
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if tensor not in seen:
                seen.add(tensor)
                kept[f"model.{name}"] = self._placed(tensor, tensor)
        return kept

    def _states(self) -> dict[str, Tensor]:
        return {
            f"{name}{key}": self._placed(parameter, value)
            for name, optimizer, parameter in self._trained()
            for key, value in optimizer.state[parameter].items()
        }

    def _trained(self) -> Iterator[tuple[str, torch.optim.Optimizer, Tensor]]:
        """Prefix of the states' names, optimiser and parameter."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for kind, optimizer in self.optimizers.each.items():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield f"{kind}.{names[parameter]}.", optimizer, parameter

    def _placed(self, parameter: Tensor, value: Tensor) -> Tensor:
        """A value per table row as blocks of the whole table; anything else as it is."""
        table = self.tables.get(parameter)  # type: ignore[call-overload]
        if table is None or value.shape[:1] != parameter.shape[:1]:
            return value.detach()
        return Blocks(value, *_place(table))

    def _empty(self, parameter: Tensor, saved: TensorStorageMetadata) -> Tensor:
        """Room for a saved state: of a table, for this worker's rows."""
        size, dtype = tuple(saved.size), saved.properties.dtype
        if isinstance(parameter, DTensor) and size == tuple(parameter.shape):
            return torch.empty_like(parameter, dtype=dtype)
        table = self.tables.get(parameter)  # type: ignore[call-overload]
        if table is not None and size[:1] == _place(table)[1:]:
            size = (len(parameter), *size[1:])
        return torch.empty(size, dtype=dtype, device=parameter.device)


def _place(table: Table) -> tuple[int, int]:
    """Number of its first row in the whole table, and how many rows that has."""
    if isinstance(table, ShardedTable):
        return table.first_row, table.rows
    return 0, len(table.weight)
