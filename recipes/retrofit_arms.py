"""The arms of recipes/retrofit.py: what a trained backbone is given, how it learns, its judge.

Trainable FLOPs per token are those of the trained parts' own matrix products: 2 for each of their
parameters forward, 4 backward (gradients of inputs and of weights), so 6 * P. A memory has
P = layers * 2 * width * memory_dim (keys and values), LoRA has P = rank * sum(in + out) over the
matrices that it is put on. Rows that are read, gates, norms and the convolution's taps are
elementwise and not counted, as in engram_lm/model/budget.py. `step_flops` is what torch counts in a
whole training step, the frozen backbone's share included.
"""

import copy
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import engram_lm
from engram_lm import CanonicalMap, JointOptimizer, MemoryConfig, Specification, corpus
from engram_lm.errors import ConfigError
from engram_lm.evaluate.token_losses import token_losses
from engram_lm.memory.fuse import Fuse
from engram_lm.memory.table import Table
from engram_lm.model.budget import memory_components
from engram_lm.precision import choose
from engram_lm.train.batches import Batch, Batches
from engram_lm.train.config import TrainConfig
from engram_lm.train.freeze import freeze
from engram_lm.train.objective import Objective
from engram_lm.train.stream import Continuous

Tell = Callable[[dict[str, float]], None]
ARMS = {
    "memory": "memory",
    "lora_flops": "LoRA, equal FLOPs",
    "lora_parameters": "LoRA, equal parameters",
    "full": "all parameters",
    "memory_lora": "memory + LoRA",
}
"""Name -> as a reader sees it."""
RATES = {
    "memory": 5.4e-2,
    "lora_flops": 6e-3,
    "lora_parameters": 2e-3,
    "full": 2e-3,
    "memory_lora": 6e-3,
}
"""Where the search for an arm's learning rate begins; see `next_rate`."""
APART, SEARCHED = 3.0, 3
"""Between neighbouring rates; rates that each arm may try."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of backbone, memory, data and budget; a smoke test has smaller ones. FFN is three widths."""

    width: int = 192
    layers: int = 6
    attention_heads: int = 4
    memory_layers: tuple[int, ...] = (1, 3)
    rows: int = 5_000
    """Per head; orders 2 and 3."""
    heads: int = 8
    head_dim: int = 15
    """So wide that LoRA on all matrices has a whole rank, 8, at equal FLOPs."""
    batch: int = 16
    context: int = 128
    backbone_tokens: int = 1_200_000
    backbone_rate: float = 8e-3
    tokens: int = 320_000
    """Of the new domain, for every run of every arm; no token is read twice."""
    judged: int = 41_000
    """Tokens of each text that a model is judged by, at most."""
    modules: int | None = None

    @property
    def memory(self) -> MemoryConfig:
        """What `attach` is given."""
        specification = Specification(
            layers=self.memory_layers,
            rows_per_head=(self.rows, self.rows),
            heads=self.heads,
            pad_id=corpus.tokenizer().pad_token_id,
            boundary_rule="cross",
        )
        return MemoryConfig(specification=specification, head_dim=self.head_dim)

    @property
    def ranks(self) -> dict[str, float]:
        """Of LoRA on all matrices of the backbone's layers, before rounding, by arm."""
        lines = memory_components(self.memory, self.width, 1)
        projections = next(line.total for line in lines if line.name == "Engram projections")
        per_rank = self.layers * (4 * 2 * self.width + 3 * (self.width + 3 * self.width))
        flops = projections / per_rank
        return {
            "lora_flops": flops,
            "memory_lora": flops,
            "lora_parameters": sum(line.total for line in lines) / per_rank,
        }

    def rank(self, arm: str) -> int:
        """A whole one, at most the width: beyond it LoRA's product gains nothing.

        ConfigError where equal FLOPs need a rank that is not whole.
        """
        wanted = self.ranks[arm]
        if arm != "lora_parameters" and wanted != int(wanted):
            raise ConfigError(f"rank={wanted:g}: equal FLOPs need a whole rank")
        return min(max(1, round(wanted)), self.width)

    def config(self, tokens: int, rate: float, seed: int) -> TrainConfig:
        """Of a run: its steps, and the learning rate in each."""
        return TrainConfig(
            tokens=tokens, batch=self.batch, context=self.context, lr=rate, seed=seed
        )


def next_rate(arm: str, found: dict[float, float]) -> float | None:
    """The learning rate to try next, after those found (rate -> bits per byte on validation): the
    first, three times it, then further on the better side; None after three rates, for every arm.
    """
    if len(found) == SEARCHED:
        return None
    if not found:
        return RATES[arm]
    if len(found) == 1:
        return RATES[arm] * APART
    low, high = min(found), max(found)
    return high * APART if found[high] < found[low] else low / APART


def small(sizes: Sizes, seed: int) -> Any:
    """A fresh Llama of transformers, its weights drawn from `seed`."""
    torch.manual_seed(seed)
    tokenizer = corpus.tokenizer()
    kind: Any = LlamaConfig
    config = kind(
        vocab_size=len(tokenizer),
        hidden_size=sizes.width,
        intermediate_size=3 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.attention_heads,
        num_key_value_heads=sizes.attention_heads,
        max_position_embeddings=sizes.context,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def arm_of(name: str, backbone: Any, sizes: Sizes, seed: int, canonical: CanonicalMap) -> Any:
    """A copy of the backbone as this arm trains it: what is to learn has requires_grad.

    LoRA goes on every matrix of the backbone's layers, PEFT's "all-linear", with alpha = rank.
    """
    model = copy.deepcopy(backbone)
    torch.manual_seed(seed)
    if name.startswith("memory"):
        engram_lm.attach(model, canonical, sizes.memory)
        freeze(model, ("backbone",))
    if "lora" in name:
        rank = sizes.rank(name)
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=rank,
            target_modules="all-linear",
            exclude_modules=r".*\.engram\..*" if name.startswith("memory") else None,
        )
        get_peft_model(model, lora)  # in place; what it gives back is only a wrapper
        for part in model.modules():
            if isinstance(part, Fuse | Table):
                part.requires_grad_(True)
    return model


class Taught(NamedTuple):
    """What a run of training was."""

    order_sha256: str
    """Of all token ids that it saw, in their order."""
    tokens: int
    tokens_per_second: float
    """Of the median step."""
    seconds: float
    losses: list[float]


def teach(model: Any, stream: Continuous, config: TrainConfig, decay: float, tell: Tell) -> Taught:
    """Trains what has requires_grad; JointOptimizer for every arm: Muon for matrices (LoRA's two as
    well), Adam for the rest, row Adam at five times the rate for rows."""
    batches = Batches(stream, batch=config.batch, context=config.context, seed=config.seed)
    optimizer = JointOptimizer(model, lr=config.lr, weight_decay=decay, clip=config.clip)
    objective = Objective(model.train())
    seen, seconds, losses = hashlib.sha256(), [], []
    for step in range(config.steps):
        begun = time.perf_counter()
        batch = batches[step]
        seen.update(batch.inputs_BT.numpy().tobytes() + batch.targets_BT.numpy().tobytes())
        optimizer.optimizers.set_factor(config.factor(step))
        loss = objective(batch, choose("auto").autocast)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begun)
        tokens = batch.targets_BT.numel()
        nats = losses[-1] * tokens / batches.text_bytes(step)
        tell(
            {
                "step": step + 1,
                "loss": losses[-1],
                "bpb": nats / math.log(2),
                "tokens_per_second": tokens / seconds[-1],
            }
        )
    each = config.batch * config.context
    return Taught(
        order_sha256=seen.hexdigest(),
        tokens=config.steps * each,
        tokens_per_second=each / statistics.median(seconds),
        seconds=sum(seconds),
        losses=losses,
    )


def bits_per_byte(model: Any, ids_T: npt.NDArray[np.uint16], sizes: Sizes) -> float:
    """Of the text that all ids but the first stand for, in windows of `context` tokens."""
    losses = token_losses(
        model,
        ids_T,
        context=sizes.context,
        batch=sizes.batch,
        autocast=choose("auto").autocast,
    )
    text_bytes = int(corpus.token_bytes()[ids_T[1:]].sum())
    return float(losses.sum(dtype=np.float64)) / math.log(2) / text_bytes


def sha256(parameters: Iterable[nn.Parameter]) -> str:
    """Of their bits."""
    found = hashlib.sha256()
    for parameter in parameters:
        found.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def frozen(model: Any) -> list[nn.Parameter]:
    """What keeps its values."""
    return [parameter for parameter in model.parameters() if not parameter.requires_grad]


def costs(model: Any, sizes: Sizes) -> dict[str, int]:
    """Parameters trained, and FLOPs per token: of the trained parts alone where they were added to
    the backbone (6 for each parameter of their matrices), and of a whole step as torch counts."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = {
        "backbone_parameters": sum(p.numel() for p in frozen(model)),
        "trained_parameters": sum(p.numel() for p in trained),
        "step_flops": counted_flops(model, sizes, backward=True),
    }
    if frozen(model):
        matrices = [
            part.weight.numel()
            for part in model.modules()
            if isinstance(part, nn.Linear) and part.weight.requires_grad
        ]
        found["trainable_flops"] = 6 * sum(matrices)
    return found


def counted_flops(model: Any, sizes: Sizes, *, backward: bool) -> int:
    """Per token of one sequence, forward or both ways. The head is left out."""
    ids_BT = torch.arange(sizes.context)[None]
    with FlopCounterMode(display=False) as counter, nullcontext() if backward else torch.no_grad():
        hidden_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        if backward:
            hidden_BTD.sum().backward()
    model.zero_grad()
    for part in model.modules():
        if isinstance(part, Table):
            part.row_gradient = None
    return int(counter.get_total_flops()) // sizes.context


def seconds_a_token(model: Any, sizes: Sizes) -> float:
    """Of training all parameters of a copy, from three steps: for the estimate of the time."""
    ids_BT = torch.zeros(sizes.batch, sizes.context, dtype=torch.int64)
    objective = Objective(copy.deepcopy(model))
    took = []
    for _ in range(3):
        begun = time.perf_counter()
        objective(Batch(ids_BT, ids_BT, None), choose("auto").autocast).backward()
        took.append(time.perf_counter() - begun)
    return min(took) / ids_BT.numel()
