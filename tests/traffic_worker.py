"""One worker of a launch that trains on real text and counts what it sends; run by
test_plan_counts.py.

    torchrun --nproc-per-node N traffic_worker.py OUT

OUT/RANK.json: the traffic that each table counted, and the bytes that were handed to every
All-to-All, counted beside it.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from engram_lm import corpus
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.model import EngramLMForCausalLM
from engram_lm.model.presets import configure, nano_engram
from engram_lm.train.batches import Batch
from engram_lm.train.exchange import Exchange
from engram_lm.train.objective import Objective
from engram_lm.train.sharded_table import shard_tables
from engram_lm.train.workers import Workers

SEQUENCES, CONTEXT = 16, 128


def config():
    """The memory of nano-engram in a decoder that is over quickly."""
    small = {"hidden_size": 32, "moe_intermediate_size": 16, "shared_intermediate_size": 16}
    return configure(nano_engram(), {**small, "intermediate_size": 32})


def text() -> torch.Tensor:
    """The tokens of the step, and one more of each sequence."""
    ids = corpus.tokens("train", SEQUENCES * (CONTEXT + 1)).ids.astype(np.int64)
    return torch.from_numpy(ids).view(SEQUENCES, CONTEXT + 1)


def main(out: Path) -> None:
    workers = Workers.join()
    handed: list[tuple[str, int]] = []
    counts, all_to_all = Exchange.counts, Exchange.all_to_all

    def counting_counts(self, outgoing):
        handed.append(("counts", 8 * len(outgoing)))
        return counts(self, outgoing)

    def counting_all_to_all(self, values, outgoing, incoming):
        kind = {torch.int64: "ids", torch.uint8: "rows", torch.float32: "gradients"}
        handed.append((kind[values.dtype], values.nbytes))
        return all_to_all(self, values, outgoing, incoming)

    Exchange.counts, Exchange.all_to_all = counting_counts, counting_all_to_all
    torch.manual_seed(0)
    model = EngramLMForCausalLM(config()).train()
    model.set_canonical_map(CanonicalMap.from_tokenizer(corpus.tokenizer()))
    tables = shard_tables(model)
    mine = workers.share(SEQUENCES)
    ids = text()[mine.start : mine.stop]
    Objective(model)(Batch(ids[:, :-1], ids[:, 1:], None)).backward()
    assert all(table.row_gradient is not None for table in tables)
    traffic = [vars(table.traffic) for table in tables]
    (out / f"{workers.rank}.json").write_text(json.dumps({"traffic": traffic, "handed": handed}))
    dist.barrier()
    workers.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
