"""What a training run takes of memory, counted before any is taken, and what there is.

Letters of the counts: N tokens of a micro-batch, B its sequences, T their length, D width, S
streams, H attention heads, k experts a token. They follow what autograd keeps of each operation of
one block, as torch.autograd.graph.saved_tensors_hooks lists it (transformers 5.23, torch 2.13).
"""

import os
from pathlib import Path
from typing import NamedTuple

import torch

from engram_lm.errors import ConfigError
from engram_lm.model.budget import Ledger, ledger
from engram_lm.model.config import TABLE_DTYPES, EngramLMConfig
from engram_lm.model.units import size_text
from engram_lm.train.config import TrainConfig
from engram_lm.train.telemetry import memory_figures
from engram_lm.train.workers import Workers

LIBRARIES = 75_000_000
"""What a process grows by in its first step whatever the model is: kernels, logs, buffers."""
FRAGMENTS = 0.1
"""Of the activations, that the allocator keeps between them: measured, 0 to 0.3."""
SCORES = 8
"""Copies of one layer's attention scores that forward and backward make on the way, and the
allocator keeps: measured at contexts of 128 and 512."""
LOSS_CHUNK = 512
"""Tokens whose logits train/objective.py makes at once."""


class Needed(NamedTuple):
    """Bytes of one process at its peak, by what they are for."""

    process: int
    """Of the interpreter and its libraries, before the model is made."""
    weights: int
    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        parts = zip(self._fields, self, strict=True)
        shown = ", ".join(f"{name} {size_text(size)}" for name, size in parts)
        return f"{size_text(self.total)} ({shown})"


def needed(config: EngramLMConfig, train: TrainConfig, workers: Workers | None = None) -> Needed:
    """What a process will take of the memory in which its model is. train: with a precision chosen.

    Moments of rows are counted whole, though they take memory only as rows are first touched.
    """
    workers = workers or Workers()
    counts = ledger(config, train.context)
    sequences = -(-train.batch // (train.micro_batches * workers.size))
    # Rows are shared by all workers; of the backbone each has all, but under fully_shard a part.
    parts = workers.size if train.backbone == "fully_shard" else 1
    dense = (counts.parameters - counts.tables) / parts
    table_dtype = TABLE_DTYPES[config.table_dtype] or torch.float32
    tables = counts.tables / workers.size
    trained = [part for part in counts.components if _part(part.name) not in train.frozen]
    trained = [part for part in trained if _part(part.name) != "tables"]
    rows = tables * _trained_tables(config, train)
    moments = sum(part.total * part.moment_bytes for part in trained) / parts
    moments += rows * (8 if train.table_optimizer == "adam" else 4)
    gradients = 4 * sum(part.total for part in trained) / parts
    if rows:
        gradients += _row_gradients(config, sequences * train.context)
    on_cpu = workers.device.type == "cpu"
    here = int(memory_figures(workers.device).get("memory/resident", 0.0)) if on_cpu else 0
    return Needed(
        process=here + LIBRARIES,
        weights=int(4 * dense + tables * table_dtype.itemsize),
        gradients=int(gradients),
        moments=int(moments),
        activations=_activations(config, train, counts, sequences),
    )


def check(wanted: Needed, workers: Workers, name: str) -> None:
    """ConfigError where this machine has less, for all its workers together. name: of the model.

    For the first worker, before any of them takes memory.
    """
    if workers.device.type == "cpu":
        # Workers of one machine share its memory; what each has taken already is not free.
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        free, where = free_memory()
        more = processes * (wanted.total - wanted.process + LIBRARIES)
    else:
        processes = 1
        free, where = torch.cuda.mem_get_info(workers.device)[0], f"on {workers.device}"
        more = wanted.total
    if more > free:
        each = f"each of {processes} workers" if processes > 1 else "training"
        raise ConfigError(
            f"{name}: {each} needs about {wanted}, and {size_text(free)} are free ({where}); take "
            "fewer tokens at once (train.micro_batches), a smaller model or more machines, or go "
            "on all the same with --set machine.overcommit=true"
        )


def free_memory(
    proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> tuple[int, str]:
    """Bytes that this process may still take, and what bounds them: the machine or a control group.

    Page cache that can be dropped counts as free; swap does not.
    """
    found = [(limit, str(path)) for path, limit in _group_limits(proc, cgroups)]
    meminfo = proc / "meminfo"
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append((int(line.split()[1]) * 1024, "MemAvailable"))
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found.append((size, "the machine's memory"))
    return min(found, default=(2**63 - 1, "not known"))


def _group_limits(proc: Path, cgroups: Path) -> list[tuple[Path, int]]:
    """What each control group above this process leaves, of version 2 and 1."""
    found = []
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, names = cgroups, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        place = root / path.lstrip("/")
        # In a container the path may be the host's: the group itself is then at the root.
        for group in [place, *place.parents] if place.is_dir() else [root]:
            left = _left(group, *names)
            if left is not None:
                found.append((group / names[0], left))
            if group == root:
                break
    return found


def _left(group: Path, limit: str, usage: str) -> int | None:
    try:
        most, taken = (group / limit).read_text().strip(), (group / usage).read_text()
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not most.isdecimal():  # "max"
        return None
    cache = sum(int(statistics.get(name, 0)) for name in ("inactive_file", "active_file"))
    return max(0, int(most) - int(taken) + cache)


def _row_gradients(config: EngramLMConfig, tokens: int) -> int:
    """Of rows that a micro-batch reads: summed values, and requests sorted by row."""
    memory = config.memory_config
    if memory is None:
        return 0
    requests = tokens * memory.specification.heads_per_layer * len(memory.specification.layers)
    return requests * (2 * 4 * memory.head_dim + 4 * 8)


def _part(component: str) -> str:
    """What `train.frozen` calls the part of the model that a line of the ledger belongs to."""
    if component.startswith("table rows"):
        return "tables"
    return "fusion" if component.startswith("Engram") else "backbone"


def _trained_tables(config: EngramLMConfig, train: TrainConfig) -> float:
    """The share of rows that is not frozen."""
    memory = config.memory_config
    if memory is None or "tables" in train.frozen:
        return 0.0
    sizes = {layer: memory.specification.table_rows(layer) for layer in memory.specification.layers}
    frozen = [size for layer, size in sizes.items() if f"tables.{layer}" in train.frozen]
    return 1 - sum(frozen) / sum(sizes.values())


def _activations(config: EngramLMConfig, train: TrainConfig, counts: Ledger, sequences: int) -> int:
    """What is kept for the backward pass, and what is made on the way; or the logits of as many
    sequences in validation, where they are larger."""
    half = train.precision == "bf16"
    item = 2 if half else 4  # bytes of what a matrix product reads and writes
    N, D, S = sequences * train.context, config.hidden_size, config.streams
    scores = sequences * config.num_attention_heads * train.context**2 * (4 + 2 * half)
    kept = sum(
        N * _block(config, layer, kind, item)
        for layer, kind in enumerate(config.mlp_layer_types or [])
    )
    if train.attention == "eager":
        kept += config.num_hidden_layers * scores
    else:  # sdpa keeps its own layout of queries, values and what comes out
        query, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim or 0
        heads = config.num_hidden_layers * config.num_attention_heads
        kept += heads * N * item * (query + 2 * value)
    kept += N * 3 * 4 * D + (N * 2 * 4 * S * D if S > 1 else 0)  # the last norm, and the loss's
    if half:  # autocast's copies of the matrices
        linear = ("attention", "dense FFN", "shared expert", "router", "Engram projections")
        kept += 2 * sum(part.total for part in counts.components if part.name in linear)
    passing = LOSS_CHUNK * config.vocab_size * 4 * 3
    if train.attention == "eager":
        passing += SCORES * scores
    # Of all sequences in the dtype of products, and of one, twice, in float32.
    logits = config.vocab_size * (N * item + train.context * 8)
    return int(max(kept * (1 + FRAGMENTS) + passing, logits))


def _block(config: EngramLMConfig, layer: int, kind: str, item: int) -> int:
    """Bytes that one block keeps for each token, attention scores left out."""
    D, S, H = config.hidden_size, config.streams, config.num_attention_heads
    half = item == 2
    query = config.qk_nope_head_dim + config.qk_rope_head_dim
    latent, value = config.kv_lora_rank, config.v_head_dim or 0
    # Two norms: what comes in and what is scaled, in float32, and each product's input. Under
    # autocast every product has a copy of its own.
    inputs = 4 + (kind == "sparse") if half else 2
    kept = 2 * 2 * 4 * D + inputs * item * D
    kept += item * H * (2 * query + 2 * value)
    kept += latent * (8 if half else 12) + item * config.qk_rope_head_dim
    if kind == "sparse":
        k, width = config.num_experts_per_tok or 0, config.moe_intermediate_size
        kept += 4 * k * (2 * D + 4 * width) + 4 * item * config.shared_intermediate_size
        kept += config.n_routed_experts * (item + 1) + 5 * 8 * k
    else:
        kept += 4 * item * config.intermediate_size
    if S > 1:  # mHC, before attention and before the FFN
        rounds = config.hc_sinkhorn_iters
        kept += 2 * S * D * 8 + (6 if half else 8) * D
        kept += 4 * rounds * S * S * 4 + (4 * rounds + 2) * S * 4
    memory = config.memory_config
    if memory is not None and layer in memory.specification.layers:
        rows = memory.specification.heads_per_layer
        kept += (item + 4) * memory.memory_dim + 4 * 8 * rows
        kept += 8 * 4 * S * D if half else (S + 1) * 4 * D + 6 * 4 * S * D
    return kept
