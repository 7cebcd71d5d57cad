"""A MoE and its Engram twin: an analysis of both, how they write, and what rows on disk cost."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from engram_lm.analysis.ablation import memory_off
from engram_lm.analysis.analyze import PARTS, Subject, analyze
from engram_lm.analysis.from_disk import from_disk
from engram_lm.analysis.material import Material
from engram_lm.analysis.measure import BATCH, Progress, silent
from engram_lm.analysis.results import ArmResult, DemoResults, TrainingLog, Value
from engram_lm.analysis.samples import Sample, samples
from engram_lm.errors import ConfigError
from engram_lm.model.modeling import EngramLMForCausalLM

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


def compare(
    moe: Arm,
    engram: Arm,
    tokenizer: Any,
    material: Material,
    *,
    seed: int,
    command: str,
    settings: dict[str, Value],
    machine: dict[str, Value],
    autocast: torch.dtype | None = None,
    sample_tokens: int = 48,
    progress: Progress | None = None,
) -> DemoResults:
    """Everything that a report of the two needs.

    material: validation text, and as its corpus what both arms were trained on. `settings`,
    `machine`, `command` and `seed` are shown as they are. What reading from disk costs is measured
    on a part of the text. ConfigError where the second arm has no memory.
    """
    if engram.model.model.addresses is None:
        raise ConfigError(f"arm {engram.name!r} has no memory: there is nothing to compare")
    started = time.perf_counter()
    tell = progress or silent
    analysis = analyze(
        Subject(name=engram.name, models=[engram.model]),
        tokenizer,
        material,
        against=Subject(name=moe.name, models=[moe.model]),
        parts=[part for part in PARTS if part != "suites"],
        autocast=autocast,
        progress=tell,
    )

    def written(arm: Arm) -> list[Sample]:
        return samples(arm.model, tokenizer, list(PROMPTS), tokens=sample_tokens)

    tell("samples", 0, 1)
    by_name = {moe.name: written(moe), engram.name: written(engram)}
    with memory_off(engram.model):
        by_name[f"{engram.name}, memory off"] = written(engram)
    tell(f"{engram.name} from disk", 0, 1)
    disk = from_disk(
        engram.model, material.ids_T, context=material.context, batch=BATCH, autocast=autocast
    )
    return DemoResults(
        moe=ArmResult(name=moe.name, log=moe.log),
        engram=ArmResult(name=engram.name, log=engram.log),
        analysis=analysis,
        samples=by_name,
        disk=disk,
        analysis_seconds=time.perf_counter() - started,
        settings=settings,
        machine=machine,
        command=command,
        seed=seed,
    )
