"""Weights that accelerate has taken off a module: read where they lie, without bringing them back.

accelerate puts a whole weight on the device that computes, for as long as its module's forward
runs. A table is the largest weight of a model, a few of its rows are needed, and nobody calls its
forward: so rows are read from what accelerate itself holds, memory or a mapped file.
"""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn


def held(module: nn.Module, name: str) -> Tensor:
    """A module's parameter or buffer; of an offloaded one the values that accelerate holds, on the
    CPU and perhaps of another dtype: in a file, a map of it, of which nothing has been read yet.

    A tensor on the meta device that nobody holds is given back as it is.
    """
    tensor: Tensor = getattr(module, name)
    if not tensor.is_meta:
        return tensor.detach()
    weights = next((hook.weights_map for hook in _hooks(module) if hook.weights_map), None)
    if weights is None:
        return tensor.detach()
    while hasattr(weights, "dataset"):  # accelerate's view of one module
        weights, name = weights.dataset, f"{weights.prefix}{name}"
    index = getattr(weights, "index", {})
    if name not in index or name in weights.state_dict:
        values: Tensor = weights[name]
        return values
    record = index[name]
    if record.get("safetensors_file") is not None:
        with safe_open(record["safetensors_file"], "pt") as file:
            values = file.get_tensor(record.get("weight_name", name))
        return values
    shape = record["shape"]
    path = str(Path(weights.save_folder) / f"{name}.dat")
    dtype: torch.dtype = getattr(torch, record["dtype"])
    return torch.from_file(path, size=math.prod(shape), dtype=dtype).view(shape)


def computes_on(module: nn.Module) -> torch.device:
    """Where a module computes: where its parameters are, or where accelerate brings them."""
    device = next(module.parameters()).device
    if device.type == "meta":
        for part in module.modules():
            for hook in _hooks(part):
                if hook.weights_map and hook.execution_device is not None:
                    return torch.device(hook.execution_device)
    return device


def stays_on(module: nn.Module) -> torch.device:
    """Where a module's weights are between two passes: of an offloaded module, the CPU."""
    device = next(module.parameters()).device
    return device if device == computes_on(module) else torch.device("cpu")


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [each for each in getattr(hook, "hooks", [hook]) if hasattr(each, "weights_map")]
