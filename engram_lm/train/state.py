"""Everything a run goes on from, as named tensors: weights, optimiser states, random numbers.

States go by their parameter's name, not by a position, and rows by their numbers in the whole
table: so they find their places on any number of workers.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from engram_lm.memory.table import Table
from engram_lm.train.blocks import Blocks
from engram_lm.train.checkpoint import Checkpoint
from engram_lm.train.optimizers import Optimizers

_RANDOM = "random"


class State:
    """Of one model and its optimisers, where they are: nothing is copied."""

    def __init__(self, model: nn.Module, optimizers: Optimizers) -> None:
        self.model, self.optimizers = model, optimizers
        modules = model.modules()
        self.tables = {each.weight: each for each in modules if isinstance(each, Table)}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of this worker."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        return {**self._weights(), **self._states(), f"{_RANDOM}.{rank}": torch.get_rng_state()}

    def load(self, checkpoint: Checkpoint) -> None:
        """Takes all of it from a checkpoint of any number of workers.

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
        checkpoint.read({**weights, **buffers, **self._states(), **random})
        self.model.load_state_dict(
            {name.removeprefix("model."): buffer for name, buffer in buffers.items()}, strict=False
        )
        _go_on([random[f"{_RANDOM}.{rank}"] for rank in range(len(random))])

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
        return Blocks(value, 0, len(parameter))

    def _empty(self, parameter: Tensor, saved: TensorStorageMetadata) -> Tensor:
        """Room for a saved state."""
        size, dtype = tuple(saved.size), saved.properties.dtype
        if isinstance(parameter, DTensor) and size == tuple(parameter.shape):
            return torch.empty_like(parameter, dtype=dtype)
        return torch.empty(size, dtype=dtype, device=parameter.device)


def _go_on(random: list[Tensor]) -> None:
    workers, rank = 1, 0
    if dist.is_initialized():
        workers, rank = dist.get_world_size(), dist.get_rank()
    if len(random) == workers:
        torch.set_rng_state(random[rank])
        return
    first = torch.Generator()
    first.set_state(random[0])
    torch.manual_seed(int(torch.randint(2**62, (workers,), generator=first)[rank]))
