"""What a comparison of a MoE with its Engram twin found, as plain values: report.json."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from engram_lm.analysis.findings import Analysis, BandFindings, Losses, write_plain
from engram_lm.analysis.from_disk import FromDisk
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
class ArmResult:
    """One of the models that are compared."""

    name: str
    log: TrainingLog


@dataclass(frozen=True, kw_only=True)
class DemoResults:
    """Everything that the report shows. `save` and `load` keep it as JSON."""

    moe: ArmResult
    engram: ArmResult
    analysis: Analysis
    """Of the Engram arm against the MoE."""
    samples: dict[str, list[Sample]]
    """Of each of `losses`."""
    disk: FromDisk
    """The Engram arm with its rows on disk."""
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
    def bands(self) -> BandFindings:
        """The part of the analysis that every comparison has."""
        assert self.analysis.bands is not None
        return self.analysis.bands

    @property
    def losses(self) -> dict[str, Losses]:
        """Name -> losses: both arms, and the second with its memory off."""
        off = f"{self.engram.name}, memory off"
        names = (self.moe.name, self.engram.name, off)
        return {name: self.bands.losses[name] for name in names}

    def save(self, path: Path) -> None:
        """Writes JSON, aside first, then renamed. ValueError if a number is not finite."""
        write_plain(path, self)

    @classmethod
    def load(cls, path: Path) -> "DemoResults":
        """What `save` wrote. DataError where the file is missing or is not such a record."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            for arm in ("moe", "engram"):
                log = TrainingLog(**record[arm]["log"])
                record[arm] = ArmResult(name=record[arm]["name"], log=log)
            record["disk"] = FromDisk(**record["disk"])
            record["analysis"] = Analysis.of(record["analysis"])
            return cls(**record)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: no results of a comparison can be read ({error})") from error
