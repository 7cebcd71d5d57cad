"""Checkpoints with larger tables than a small model has, written without one."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from engram_lm.config import MemoryConfig
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.specification import Specification


def trainable(
    directory: Path,
    rows_per_head: int = 20_000,
    dim: int = 32,
    seed: int = 0,
    canonical: CanonicalMap | None = None,
) -> dict[int, torch.Tensor]:
    """What `engram pack` reads of a directory that save_pretrained wrote; returns its tables."""
    directory.mkdir(parents=True, exist_ok=True)
    canonical = canonical or CanonicalMap(torch.arange(50))
    specification = Specification(
        layers=(0, 2), rows_per_head=(rows_per_head,), heads=2, pad_id=0
    ).bind(canonical)
    memory = MemoryConfig(specification=specification, head_dim=dim)
    canonical.save(directory)
    record = {"model_type": "engram_lm", "memory": memory.to_dict()}
    (directory / "config.json").write_text(json.dumps(record))
    generator = torch.Generator().manual_seed(seed)
    tables = {
        layer: torch.randn(specification.table_rows(layer), dim, generator=generator) * 0.02
        for layer in specification.layers
    }
    weights = {f"model.tables.{layer}.weight": table for layer, table in tables.items()}
    digest = torch.frombuffer(bytearray.fromhex(specification.digest), dtype=torch.uint8)
    save_file({**weights, "model.seal.sha256": digest}, directory / "model.safetensors")
    return tables
