"""Packs the kit's tables, and writes what any reader must find in them.

    python conformance/packed.py

The files are those of `engram pack`. What is expected of them comes from the checkpoints' tensors
alone: bytes of single rows, values and scales side by side, and a hash of all rows.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from engram_lm.cli import main as engram

HERE = Path(__file__).parent
LAYERS = {"deepseek_v41": (1, 14), "qwen4_exp": (1, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "packed")
    out = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    expected = {}
    for family, layers in LAYERS.items():
        engram(["pack", str(HERE / family), "--out", str(out / family)])
        for layer in layers:
            name = f"{family}/table-{layer:05d}.safetensors"
            expected[name] = said_of(rows_of(family, layer), out / name)
    lines = json.dumps(expected, indent=1) + "\n"
    (out / "expected.json").write_text(lines, encoding="utf-8")


def rows_of(family: str, layer: int) -> torch.Tensor:
    """(V, R) uint8, from the checkpoint's tensors."""
    tensors = {}
    for path in sorted((HERE / family).glob("model*.safetensors")):
        tensors |= load_file(path)
    if family == "deepseek_v41":
        parts = [tensors[f"layers.{layer}.engram.embed.{name}"] for name in ("weight", "scale")]
        return torch.cat([part.view(torch.uint8) for part in parts], dim=1)
    shard = f"model.layers.{layer}.ple.ple_embedding.ngram_embedding.shard_{{}}.weight"
    return torch.cat([tensors[shard.format(i)] for i in range(4)]).view(torch.uint8)


def said_of(bytes_VR: torch.Tensor, path: Path) -> dict:
    last = len(bytes_VR) - 1
    some = [0, 1, 61, 62, last // 2, last - 1, last]  # of 66 bytes, row 62 lies across two pages
    return {
        "file_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "shape": list(bytes_VR.shape),
        "rows_sha256": hashlib.sha256(bytes_VR.numpy().tobytes()).hexdigest(),
        "rows": {str(row): bytes_VR[row].numpy().tobytes().hex() for row in some},
    }


if __name__ == "__main__":
    main()
