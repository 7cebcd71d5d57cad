"""What each row dtype costs a trained model, in bits per byte of validation text.

    python benchmarks/row_dtypes.py --model runs/demo/nano-engram/model

Rows of one model are written and read back in each dtype in turn; everything else stays as it was
trained, and all of them predict the same tokens, so differences are taken token by token. Two ends
to hold them against: rows as stored, which cost nothing, and memory switched off. Rows shorter than
32 values have a scale for each row. Writes results/row_dtypes.json; the last line printed is its
summary.
"""

import engram_lm.openmp  # noqa: F401

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from engram_lm import corpus
from engram_lm.evaluate.token_losses import token_losses
from engram_lm.memory.rows import DTYPES, RowFormat
from engram_lm.model import EngramLMForCausalLM
from engram_lm.studies.record import Record
from engram_lm.train.config import TrainConfig
from engram_lm.train.text import wordnet_stream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, help="directory of a saved model, trained on WordNet"
    )
    parser.add_argument("--tokens", type=int, default=100_000, help="of validation text")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    record = Record("row_dtypes")
    model = EngramLMForCausalLM.from_pretrained(
        arguments.model, tokenizer=str(corpus.tokenizer_file())
    )
    stored = {layer: table.weight.detach().clone() for layer, table in model.model.tables.items()}
    text = wordnet_stream("validation", arguments.tokens)
    tokens, size = text.judged(arguments.tokens)
    to_bpb = 1 / math.log(2) / size

    def losses() -> Any:
        config = TrainConfig()
        return token_losses(
            model,
            text.read(0, tokens),
            context=config.context,
            batch=config.batch,
        ).astype(np.float64)

    as_stored_T = losses()
    with model.model.without_memory():
        off = losses().sum() * to_bpb
    summary: dict[str, float] = {
        "tokens": tokens,
        "bytes": size,
        "as_stored_bpb": as_stored_T.sum() * to_bpb,
        "memory_off_bpb": off,
    }
    console = Console(stderr=True)
    for name in track(DTYPES, "row dtypes", console=console, disable=not console.is_terminal):
        for layer, table in model.model.tables.items():
            format = RowFormat.named(name, table.weight.shape[1])
            values = format.decode(format.encode(stored[layer]))
            table.weight.data.copy_(values)
        cost_T = losses() - as_stored_T
        summary[f"{name}_row_bytes"] = format.row_bytes
        summary[f"{name}_bpb"] = (as_stored_T + cost_T).sum() * to_bpb
        summary[f"{name}_cost_bpb"] = cost_T.sum() * to_bpb
        # Of the sum of differences, were tokens independent.
        summary[f"{name}_cost_bpb_se"] = cost_T.std() * math.sqrt(len(cost_T)) * to_bpb
        summary[f"{name}_cost_share_of_memory"] = summary[f"{name}_cost_bpb"] / (
            off - summary["as_stored_bpb"]
        )
    raw = {
        "model": str(arguments.model),
        "specification_sha256": model.model.addresses.specification.digest,
    }
    record.write(summary, raw, seeds=[])
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
