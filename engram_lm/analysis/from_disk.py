"""One model twice: tables in memory, and rows on disk within a budget. What that costs.

Shapes: T token ids, B windows, C positions in a window.
"""

import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engram_lm.evaluate.inference import inference
from engram_lm.memory.served import ServedTables
from engram_lm.model.modeling import EngramLMForCausalLM

SHARE = 4
"""The budget is one part in so many of the tables."""
PASSES = 8


@dataclass(frozen=True, kw_only=True)
class FromDisk:
    """Forward passes over the same tokens, in turn; speeds and the wait are those of the median."""

    equal_logits: bool
    """Every one of them, bit for bit."""
    tokens: int
    table_bytes: int
    budget_bytes: int
    memory_tokens_per_second: float
    disk_tokens_per_second: float
    rows_asked: int
    """Distinct ones of each pass."""
    hits: int
    """Of these: found within the budget."""
    bytes_read: int
    """From the file, page by page."""
    wait_ms: float
    """Of one layer in one pass."""


def from_disk(
    model: EngramLMForCausalLM,
    ids_T: npt.NDArray[np.integer],
    *,
    context: int,
    batch: int,
    autocast: torch.dtype | None = None,
) -> FromDisk:
    """Saves the model, opens it with its rows on disk, and has both read the same windows.

    At most PASSES batches of them, and one before that is not counted.
    """
    tables = model.model.tables.values()
    table_bytes = sum(table.weight.numel() * table.weight.itemsize for table in tables)
    budget = table_bytes // SHARE
    step = min(batch, len(ids_T) // context) * context
    passes = min(PASSES, len(ids_T) // step)
    seconds: dict[str, list[float]] = {"memory": [], "disk": []}
    equal = True
    with tempfile.TemporaryDirectory() as directory, inference(model):
        model.save_pretrained(directory)
        # Kernels are no part of a saved model, and others round otherwise.
        served = EngramLMForCausalLM.from_pretrained(
            directory,
            dtype=model.dtype,
            memory="disk",
            memory_budget=budget,
            attn_implementation=model.config._attn_implementation,
            experts_implementation=model.config._experts_implementation,
        ).to(model.device)
        # Weights opened from a file begin anywhere; on some CPUs a product's last bit depends on
        # it. Copies begin where those of the other model do.
        served._apply(torch.clone)
        tables_on_disk = served.model.served
        for number in [0, *range(passes)]:
            window = torch.from_numpy(ids_T[number * step : (number + 1) * step].astype(np.int64))
            ids_BC = window.view(-1, context).to(model.device)
            logits = {}
            for name, each in (("memory", model), ("disk", served)):
                begun = time.perf_counter()
                with torch.autocast(model.device.type, autocast) if autocast else nullcontext():
                    logits[name] = each(input_ids=ids_BC, use_cache=False).logits
                seconds[name].append(time.perf_counter() - begun)
            if len(seconds["disk"]) == 1:  # the pass that is not counted
                before = _counts(tables_on_disk)
            equal &= torch.equal(logits["memory"], logits["disk"])
        asked, hits, bytes_read = _counts(tables_on_disk) - before
        waits = [wait for each in tables_on_disk.layers.values() for wait in list(each.waits)[1:]]
        found = FromDisk(
            equal_logits=equal,
            tokens=passes * step,
            table_bytes=table_bytes,
            budget_bytes=budget,
            memory_tokens_per_second=step / statistics.median(seconds["memory"][1:]),
            disk_tokens_per_second=step / statistics.median(seconds["disk"][1:]),
            rows_asked=int(asked),
            hits=int(hits),
            bytes_read=int(bytes_read),
            wait_ms=1e3 * statistics.median(waits),
        )
        tables_on_disk.close()
    return found


def _counts(served: ServedTables) -> npt.NDArray[np.int64]:
    """Distinct rows asked for, rows found within the budget, bytes read."""
    counts = [
        (each.unique, each.tiers[0].hits, sum(tier.bytes_read for tier in each.tiers))
        for each in served.metrics().values()
    ]
    return np.sum(counts, axis=0, dtype=np.int64)
