"""What a step tells of itself: gates, router loads, gradients, memory.

Figures stay on the device, as tensors, until the step has ended; then all of them are moved at
once. docs/training.md says what each name means.

Shapes: L layers with a gate or a router, S streams, N tokens of a micro-batch, E experts.
"""

import resource
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram_lm.memory.fuse import Gate
from engram_lm.memory.table import Table
from engram_lm.model.modeling import EngramLMForCausalLM
from engram_lm.train.row_optimizer import RowOptimizer
from engram_lm.train.sharded_table import ShardedTable

SHUT, OPEN = 0.05, 0.95
"""A gate beyond them is saturated: its gradient is below a fifth of what it is at one half."""


class Telemetry:
    """Watches the gates of a model in training."""

    def __init__(self, model: EngramLMForCausalLM) -> None:
        self.gates: dict[int, Gate] = {
            layer: block.engram.gate
            for layer, block in enumerate(model.model.layers)
            if block.engram is not None
        }
        self.streams = model.config.streams
        self.device = model.device
        self._seen = self._nothing()
        self._hooks = [
            gate.register_forward_hook(self._watcher(index))
            for index, gate in enumerate(self.gates.values())
        ]

    def close(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def take(self) -> Tensor:
        """What the gates did since the last call, flat and float64: tokens, sums of their values,
        of their squares, and how many were saturated. Adds up over micro-batches and workers.
        """
        seen, self._seen = self._seen, self._nothing()
        return seen.flatten()

    def _nothing(self) -> Tensor:
        shape = (len(self.gates), 4, self.streams)
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def _watcher(self, index: int) -> Any:
        def watch(gate: Gate, inputs: Any, gate_BTS: Tensor) -> None:
            if not gate.training:
                return
            gate_NS = gate_BTS.detach().flatten(0, 1).double()
            saturated_NS = (gate_NS < SHUT) | (gate_NS > OPEN)
            seen_4S = self._seen[index]
            seen_4S[0] += len(gate_NS)
            seen_4S[1] += gate_NS.sum(0)
            seen_4S[2] += gate_NS.square().sum(0)
            seen_4S[3] += saturated_NS.sum(0)

        return watch


def gate_figures(layers: Collection[int], streams: int, seen: list[float]) -> dict[str, float]:
    """Mean, spread (their standard deviation) and saturated share, by layer and stream.

    seen: of `Telemetry.take`.
    """
    found: dict[str, float] = {}
    seen_L4S = torch.tensor(seen, dtype=torch.float64).view(len(layers), 4, streams)
    for layer, (tokens_S, sum_S, square_S, saturated_S) in zip(layers, seen_L4S, strict=True):
        mean_S = sum_S / tokens_S
        spread_S = (square_S / tokens_S - mean_S.square()).clamp_min(0).sqrt()
        for stream in range(streams):
            place = f"layer_{layer}_stream_{stream}"
            found[f"gate_mean/{place}"] = mean_S[stream].item()
            found[f"gate_spread/{place}"] = spread_S[stream].item()
            found[f"gate_saturation/{place}"] = (saturated_S / tokens_S)[stream].item()
    return found


def load_figures(layers: Collection[int], loads: list[float]) -> dict[str, float]:
    """An expert's largest and smallest load over the mean, by layer; `expert_load`: the worst.

    loads: how often each expert was chosen, layer after layer. An even router has 1 and 1.
    """
    if not layers:
        return {}
    found = {"expert_load": 1.0}
    loads_LE = torch.tensor(loads, dtype=torch.float64).view(len(layers), -1)
    for layer, load_E in zip(layers, loads_LE, strict=True):
        largest, smallest = (load_E.max() / load_E.mean(), load_E.min() / load_E.mean())
        found[f"expert_load/layer_{layer}"] = largest.item()
        found[f"expert_load_min/layer_{layer}"] = smallest.item()
        found["expert_load"] = max(found["expert_load"], largest.item())
    return found


def row_sums(optimizer: RowOptimizer | None, taken: bool) -> list[float]:
    """Of each table here, what adds up over workers: rows moved so far, rows, the sum of squares of
    the step's update over values per row, rows moved by it. taken: False for a step left out.
    """
    if optimizer is None:
        return []
    found: list[float] = []
    sizes = zip(optimizer.tables, optimizer.touched(), optimizer.update_rms(), strict=True)
    for table, touched, rms in sizes:
        gradient = table.row_gradient
        moved = len(gradient.rows_U) if taken and gradient is not None else 0
        found += [touched, table.weight.shape[0], rms * rms * moved, moved]
    return found


def row_figures(names: list[str], sums: list[float]) -> dict[str, float]:
    """Share of each table's rows moved so far, and root mean square of the step over the rows it
    moved. sums: of `row_sums`.
    """
    found: dict[str, float] = {}
    for index, name in enumerate(names):
        touched, rows, squares, moved = sums[4 * index : 4 * index + 4]
        found[f"rows_touched/{name}"] = touched / rows
        found[f"row_update/{name}"] = (squares / max(1.0, moved)) ** 0.5
    return found


def exchanged_bytes(tables: Sequence[Table]) -> int:
    """What this worker has sent to others for the rows of these tables, so far."""
    traffic = [table.traffic for table in tables if isinstance(table, ShardedTable)]
    return sum(
        each.id_bytes + each.row_bytes + each.gradient_bytes + each.replica_bytes
        for each in traffic
    )


def memory_figures(device: torch.device) -> dict[str, float]:
    """Bytes of this process: resident now (where the system tells) and at most; of the GPU too."""
    found: dict[str, float] = {}
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent had when it forked, too
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        found["memory/resident"] = int(lines["VmRSS"].split()[0]) * 1024
        found["memory/resident_peak"] = int(lines["VmHWM"].split()[0]) * 1024
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        found["memory/resident_peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        found["memory/gpu"] = torch.cuda.memory_allocated(device)
        found["memory/gpu_peak"] = torch.cuda.max_memory_allocated(device)
    return found


def read(tensors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """The values of several tensors on one device, flat, in one transfer."""
    sizes = [tensor.numel() for tensor in tensors.values()]
    flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors.values()])
    parts = flat.cpu().split(sizes)
    return {name: part.tolist() for name, part in zip(tensors, parts, strict=True)}
