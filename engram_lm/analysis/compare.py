"""A MoE and its Engram twin on the same validation tokens: losses, bands, samples and gates.

Shapes: T validation tokens, V token ids.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engram_lm.analysis.bands import NgramCounts, count_ngrams, loss_by_band, window_bands
from engram_lm.analysis.from_disk import from_disk
from engram_lm.analysis.gates import GateTrace, gate_trace
from engram_lm.analysis.results import ArmResult, DemoResults, Evaluation, TrainingLog, Value
from engram_lm.analysis.samples import samples
from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluate.token_losses import token_losses
from engram_lm.model.modeling import EngramLMForCausalLM

SENTENCES = (
    "Alexander the Great was king of Macedon and conqueror of Greece, Egypt and Persia.",
    "Johann Sebastian Bach was a German composer and organist of the 18th century.",
    "New York is a city in the United States, at the mouth of the Hudson River.",
    "In World War II the Battle of Britain was fought by the Royal Air Force.",
    'To kick the bucket means to die. As in "the old man kicked the bucket".',
    "The Milky Way is a galaxy; by the way, the solar system is a part of it.",
    "Any of various small plants of the genus Viola, native to North America.",
    "Seven tired painters quietly borrowed our smallest ladder after lunch yesterday.",
)
"""Names, titles, idioms and WordNet's own phrases; the last has no fixed phrase, as a contrast."""

PROMPTS = (
    "Alexander the Great, also called",
    "New York is a",
    "To kick the bucket means",
    'The noun "music" means',
    "Any of various small birds",
    "In World War II",
)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A trained model and the log of its training."""

    name: str
    model: EngramLMForCausalLM
    log: TrainingLog


Losses = npt.NDArray[np.float32]
Progress = Callable[[str], None]


def compare(
    moe: Arm,
    engram: Arm,
    tokenizer: Any,
    *,
    training_ids: npt.NDArray[np.integer],
    validation_ids: npt.NDArray[np.integer],
    token_bytes: npt.NDArray[np.int64],
    context: int,
    seed: int,
    command: str,
    settings: dict[str, Value],
    machine: dict[str, Value],
    batch: int = 8,
    autocast: torch.dtype | None = None,
    sample_tokens: int = 48,
    progress: Progress | None = None,
) -> DemoResults:
    """Everything that a report of the two needs.

    `engram.model` has a memory, and its canonical map is the one that n-grams are counted with.
    training_ids: those that both arms were trained on; token_bytes: (V,) bytes of each token id.
    `settings`, `machine`, `command` and `seed` are shown as they are. `progress` is called with
    what begins next. Three passes over the validation tokens: with 60,000 of them, two models of
    1M parameters (4M with tables) take 25 s on one core, 39 s with four streams. What reading from
    disk costs is measured on a part of them.
    """
    addresses = engram.model.model.addresses
    if addresses is None:
        raise ConfigError(f"arm {engram.name!r} has no memory: there is nothing to compare")
    if len(validation_ids) <= 2 * context:
        raise DataError(
            f"{len(validation_ids)} validation ids: two windows of {context} are needed"
        )
    started = time.perf_counter()
    tell = progress if progress is not None else _silent

    def losses_of(arm: Arm, name: str) -> Losses:
        tell(f"validation loss of {name}")
        return token_losses(
            arm.model, validation_ids, context=context, batch=batch, autocast=autocast
        )

    def samples_of(arm: Arm) -> Any:
        return samples(arm.model, tokenizer, list(PROMPTS), tokens=sample_tokens)

    moe_losses = losses_of(moe, moe.name)
    moe_samples = samples_of(moe)
    engram_losses = losses_of(engram, engram.name)
    engram_samples = samples_of(engram)
    with engram.model.model.without_memory():
        off_losses = losses_of(engram, f"{engram.name}, memory off")
        off_samples = samples_of(engram)

    tell("counting n-grams")
    canonical_V = addresses.canonical.ids_V.numpy()
    base = addresses.canonical.canonical_ids
    orders = list(range(2, addresses.specification.max_order + 1))
    counts = [count_ngrams(canonical_V[training_ids], order, base=base) for order in orders]
    bands_by_order = [window_bands(count, canonical_V[validation_ids], context) for count in counts]

    predicted_bytes = int(token_bytes[validation_ids[1:]].sum())

    def evaluation(losses_T: Losses, written: Any) -> Evaluation:
        return Evaluation(
            loss=_mean(losses_T),
            bpb=float(losses_T.sum(dtype=np.float64)) / math.log(2) / predicted_bytes,
            bands=[loss_by_band(losses_T, bands_T) for bands_T in bands_by_order],
            samples=written,
        )

    tell("gates")
    traces = [gate_trace(engram.model, tokenizer, sentence) for sentence in SENTENCES]
    tell(f"{engram.name} from disk")
    disk = from_disk(engram.model, validation_ids, context=context, batch=batch, autocast=autocast)
    # In float64: the difference is small against both losses.
    difference_T = engram_losses.astype(np.float64) - moe_losses
    return DemoResults(
        moe=ArmResult(name=moe.name, log=moe.log, evaluation=evaluation(moe_losses, moe_samples)),
        engram=ArmResult(
            name=engram.name, log=engram.log, evaluation=evaluation(engram_losses, engram_samples)
        ),
        memory_off=evaluation(off_losses, off_samples),
        orders=orders,
        difference_bands=[loss_by_band(difference_T, bands_T) for bands_T in bands_by_order],
        difference=_mean(difference_T),
        difference_error=_window_error(difference_T, context),
        gates=[_counted(trace, counts, canonical_V) for trace in traces],
        disk=disk,
        context=context,
        validation_tokens=len(moe_losses),
        validation_bytes=predicted_bytes,
        analysis_seconds=time.perf_counter() - started,
        settings=settings,
        machine=machine,
        command=command,
        seed=seed,
    )


def _silent(_message: str) -> None:
    return None


def _mean(values_T: npt.NDArray[np.floating]) -> float:
    return float(values_T.mean(dtype=np.float64))


def _window_error(difference_T: npt.NDArray[np.float64], context: int) -> float:
    # Tokens of one window are alike, windows hardly: so the windows' means are what varies freely.
    whole = len(difference_T) // context * context
    means = difference_T[:whole].reshape(-1, context).mean(axis=1)
    return float(means.std(ddof=1)) / math.sqrt(len(means))


def _counted(
    trace: GateTrace, counts: list[NgramCounts], canonical_V: npt.NDArray[np.integer]
) -> GateTrace:
    canonical_T = canonical_V[np.array(trace.ids)]
    return replace(trace, counts=[count.of(canonical_T).tolist() for count in counts])
