"""Checkpoints of the conformance kit with other tensors in them."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from engram_lm.store.released import Released

KIT = Path(__file__).parents[1] / "conformance"
QWEN, DEEPSEEK = "qwen4_exp", "deepseek_v41"
PLE = "model.layers.1.ple."
TABLE = PLE + "ple_embedding.ngram_embedding."
FP8 = torch.float8_e4m3fn


def stored(family: str = QWEN) -> dict[str, torch.Tensor]:
    """All tensors of a kit."""
    tensors = {}
    for path in sorted((KIT / family).glob("model*.safetensors")):
        tensors |= load_file(path)
    return tensors


def written(directory: Path, changes: dict[str, torch.Tensor | None], family: str = QWEN) -> Path:
    """A kit's checkpoint with other tensors, in one file; None takes one away."""
    directory.mkdir()
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(KIT / family / file, directory)
    tensors = stored(family) | changes
    kept = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / "model.safetensors")
    return directory


def quantised(layer: int, scale: torch.Tensor, whole: bool = False) -> dict:
    """An fp8 table of random bytes, in shards as released or whole, and its one scale."""
    prefix = TABLE.replace(".1.", f".{layer}.")
    rows = torch.cat([stored()[f"{prefix}shard_{i}.weight"] for i in range(4)])
    generator = torch.Generator().manual_seed(layer)
    bytes_VE = torch.randint(0, 256, rows.shape, dtype=torch.uint8, generator=generator)
    bytes_VE[bytes_VE & 127 == 127] = 1  # no number, which equals nothing
    shards = {f"{prefix}shard_{i}.weight": p for i, p in enumerate(bytes_VE.view(FP8).chunk(4))}
    if whole:
        shards = dict.fromkeys(shards) | {f"{prefix}weight": bytes_VE.view(FP8)}
    return {**shards, f"{prefix}weight_scale": scale}


def read_all(directory: Path) -> None:
    released = Released(directory)
    layer = released.layers[0]
    released.parts(layer)
    released.fuse(layer)
