"""What a comparison of a MoE with its Engram twin found, as plain values: report.json."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

from engram_lm.analysis.bands import BandLoss
from engram_lm.analysis.from_disk import FromDisk
from engram_lm.analysis.gates import GateTrace
from engram_lm.analysis.samples import Sample
from engram_lm.errors import DataError

Value = str | int | float


class LedgerLine(TypedDict):
    """A `model.budget.Component` as a dictionary; `active` and `flops` are per token."""

    name: str
    total: int
    active: int
    flops: int
    moment_bytes: int
    counted: bool


class LedgerRecord(TypedDict):
    """What `model.budget.Ledger.to_dict` gives."""

    context: int
    components: list[LedgerLine]
    p_tot: int
    p_act: int
    p_sparse: int
    tables: int
    rho: float | None
    parameters: int
    flops_per_token: int
    optimizer_bytes: int


class CurvePoint(TypedDict):
    """Training loss in nats per token of the step that ended after `tokens` tokens."""

    step: int
    tokens: int
    loss: float


class ValidationPoint(TypedDict):
    """Validation loss in nats per token, and in bits per byte."""

    step: int
    tokens: int
    loss: float
    bpb: float


@dataclass(frozen=True, kw_only=True)
class TrainingLog:
    """What a training run leaves behind besides its model."""

    ledger: LedgerRecord
    curve: list[CurvePoint]
    validation: list[ValidationPoint]
    tokens_per_second: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One model on the validation tokens; the same model with its memory off has another."""

    loss: float
    """Nats per token."""
    bpb: float
    """Bits per byte of UTF-8 text."""
    bands: list[list[BandLoss]]
    """Order -> band."""
    samples: list[Sample]


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One of the models that are compared."""

    name: str
    log: TrainingLog
    evaluation: Evaluation


@dataclass(frozen=True, kw_only=True)
class DemoResults:
    """Everything that the report shows. `save` and `load` keep it as JSON."""

    moe: ArmResult
    engram: ArmResult
    memory_off: Evaluation
    """The Engram arm without its memory, weights untouched."""
    orders: list[int]
    """Of the n-grams in every `bands`, ascending."""
    difference_bands: list[list[BandLoss]]
    """Engram minus MoE, token by token: order -> band."""
    difference: float
    """Mean over all validation tokens of Engram minus MoE, nats."""
    difference_error: float
    """Standard error of `difference` over validation windows; the seed's share is not in it."""
    gates: list[GateTrace]
    disk: FromDisk
    """The Engram arm with its rows on disk."""
    context: int
    validation_tokens: int
    validation_bytes: int
    analysis_seconds: float
    settings: dict[str, Value]
    """What was trained and how: label -> value, shown in this order."""
    machine: dict[str, Value]
    """Where, and with which versions: label -> value."""
    command: str
    seed: int

    @property
    def arms(self) -> tuple[ArmResult, ArmResult]:
        return self.moe, self.engram

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """Name -> evaluation: both arms, and the second with its memory off."""
        return {
            self.moe.name: self.moe.evaluation,
            self.engram.name: self.engram.evaluation,
            f"{self.engram.name}, memory off": self.memory_off,
        }

    def save(self, path: Path) -> None:
        """Writes JSON, aside first, then renamed. ValueError if a number is not finite."""
        aside = path.with_suffix(".partial")
        text = json.dumps(asdict(self), allow_nan=False, ensure_ascii=False, indent=1)
        aside.write_text(text + "\n", encoding="utf-8")
        os.replace(aside, path)

    @classmethod
    def load(cls, path: Path) -> "DemoResults":
        """What `save` wrote. DataError where the file is missing or is not such a record."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            record |= {arm: _arm(record[arm]) for arm in ("moe", "engram")}
            record["memory_off"] = Evaluation(**record["memory_off"])
            record["disk"] = FromDisk(**record["disk"])
            record["gates"] = [GateTrace(**trace) for trace in record["gates"]]
            return cls(**record)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: no results of a comparison can be read ({error})") from error


def _arm(record: dict[str, object]) -> ArmResult:
    log, evaluation = record["log"], record["evaluation"]
    assert isinstance(log, dict) and isinstance(evaluation, dict)
    return ArmResult(
        name=str(record["name"]), log=TrainingLog(**log), evaluation=Evaluation(**evaluation)
    )
