"""What an analysis found, as plain values: analysis.json."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from engram_lm import whole
from engram_lm.analysis.ablation_losses import AblationLoss
from engram_lm.analysis.bands import BandLoss
from engram_lm.analysis.gates import GateTrace
from engram_lm.analysis.row_sharing import HeadSharing, OrderSharing
from engram_lm.analysis.student import half_width
from engram_lm.analysis.suite_ablation import PartScore
from engram_lm.errors import DataError


class Estimate(TypedDict):
    """A mean and its 95 % interval; None where there is one text only."""

    mean: float
    low: float | None
    high: float | None


class GateScore(TypedDict):
    """How well the gates of one layer and stream tell tokens apart. AUROCs: 0.5 tells nothing."""

    layer: int
    stream: int
    """From 0."""
    order: int
    frequent: int
    """Tokens whose n-gram of this order stood `FREQUENT` times or more in the corpus."""
    auroc_frequent: Estimate | None
    """Of these against the others; None where one kind has no token."""
    names: int
    """Tokens that end a name of two tokens or more."""
    auroc_names: Estimate | None
    gate_names: float | None
    """Mean gate there, and everywhere else."""
    gate_elsewhere: float | None


class NgramGate(TypedDict):
    """One n-gram of the longest order in the text."""

    ngram: str
    times: int
    """In the text."""
    in_corpus: int | None
    gate: float
    """Mean over these times, layers and streams."""
    added: float
    """The same of what memory adds, against the hidden state's length."""


@dataclass(frozen=True, kw_only=True)
class GateFindings:
    """Of the first checkpoint; scores are of each checkpoint."""

    traces: list[GateTrace]
    scores: list[list[GateScore]]
    """Checkpoint -> layer, stream and order."""
    highest: list[NgramGate]
    lowest: list[NgramGate]


@dataclass(frozen=True, kw_only=True)
class LensFindings:
    """One model's logit lens."""

    checkpoints: int
    texts: int
    layers: list[int]
    at: list[str]
    """Of each place: "block", "before memory" or "after memory"."""
    normed: dict[str, list[Estimate]]
    """Measure -> place."""
    plain: dict[str, list[Estimate]]


@dataclass(frozen=True, kw_only=True)
class LensDifference:
    """Of two models' logit lenses, text by text and checkpoint by checkpoint."""

    name: str
    """What minus what."""
    normed: dict[str, list[Estimate]]
    """Measure -> block."""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """One model on the text, as it is or with a part switched off; means over checkpoints."""

    loss: float
    """Nats per token."""
    bpb: float
    """Bits per byte."""
    by_checkpoint: list[float]
    bands: list[list[BandLoss]]
    """Order -> band; errors over tokens with one checkpoint, over checkpoints with several."""


@dataclass(frozen=True, kw_only=True)
class BandFindings:
    """Losses by how often the suffix n-gram stood in the corpus."""

    orders: list[int]
    losses: dict[str, Losses]
    difference: str | None
    """What minus what; None where there is nothing to compare."""
    difference_mean: float | None
    """Nats per token."""
    difference_error: float | None
    """Standard error: over windows with one checkpoint, over checkpoints with several."""
    difference_bands: list[list[BandLoss]]


@dataclass(frozen=True, kw_only=True)
class AlignmentFindings:
    """Which layers of two models are alike (CKA), and of two seeds of one of them."""

    first: str
    """Rows of `across`: the paper's i, a model without memory there."""
    second: str
    inputs: int
    """Hidden states that were compared, `batch` at a time."""
    batch: int
    where: str
    """At which tokens."""
    neighbours: int
    across: list[list[float]]
    """Mean over all pairs of checkpoints."""
    index: list[list[float]]
    """Pair (checkpoint of `first`, of `second`) -> layer of `second`: the soft alignment index."""
    likest: list[int]
    """Of each layer of `second`, in the mean map."""
    null: list[list[float]] | None
    """The same between checkpoints of `first`; None with one seed."""
    null_index: list[list[float]]
    above: list[list[float]]
    """Checkpoint of `first` -> layer: mean index in it of the second's checkpoints, less that of
    other checkpoints of the first. [] with one seed, or where the two have not as many blocks."""
    null_likest: list[int]


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Parts that were not asked for, or that a model without memory does not have, are None."""

    name: str
    against: str | None
    checkpoints: int
    """Of each model; where two are compared, as many of both."""
    text: str
    tokens: int
    bytes: int
    """Of UTF-8 text, that these tokens stand for."""
    corpus: str | None
    context: int
    names: str
    """What counts as a name."""
    apart: bool
    """Documents saw nothing of one another."""
    gates: GateFindings | None = None
    lens: dict[str, LensFindings] | None = None
    lens_difference: LensDifference | None = None
    """None with one model, or where the two have not as many blocks."""
    bands: BandFindings | None = None
    addresses: list[OrderSharing] | None = None
    alignment: AlignmentFindings | None = None
    ablation: list[list[AblationLoss]] | None = None
    """Checkpoint -> part."""
    suites: list[list[PartScore]] | None = None
    """Checkpoint -> suite, part, kind and metric."""
    seconds: dict[str, float]
    """What each part took."""

    @property
    def difference_half(self) -> float:
        """Half the width of the 95 % interval of `bands.difference_mean`: over checkpoints, or with
        one over windows of the text."""
        assert self.bands is not None and self.bands.difference_error is not None
        several = self.checkpoints > 1
        over = self.checkpoints if several else self.tokens // self.context
        return half_width(self.bands.difference_error, over)

    @property
    def corpus_named(self) -> str:
        """What n-grams were counted in, for a reader."""
        return self.corpus or "nothing (no corpus was given)"

    def save(self, path: Path) -> None:
        """Writes JSON, aside first, then renamed. ValueError if a number is not finite."""
        write_plain(path, self)

    @classmethod
    def load(cls, path: Path) -> "Analysis":
        """What `save` wrote. DataError where the file is missing or is not such a record."""
        try:
            return cls.of(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: no analysis can be read ({error})") from error

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Analysis":
        """From what `asdict` gives."""
        made = dict(record)
        if gates := made["gates"]:
            traces = [GateTrace(**trace) for trace in gates["traces"]]
            made["gates"] = GateFindings(**{**gates, "traces": traces})
        if lens := made["lens"]:
            made["lens"] = {name: LensFindings(**each) for name, each in lens.items()}
        if difference := made["lens_difference"]:
            made["lens_difference"] = LensDifference(**difference)
        if bands := made["bands"]:
            losses = {name: Losses(**each) for name, each in bands["losses"].items()}
            made["bands"] = BandFindings(**{**bands, "losses": losses})
        if made["addresses"]:
            made["addresses"] = [order_sharing(order) for order in made["addresses"]]
        if made["alignment"]:
            made["alignment"] = AlignmentFindings(**made["alignment"])
        if made["ablation"]:
            made["ablation"] = [
                [AblationLoss(**part) for part in parts] for parts in made["ablation"]
            ]
        return cls(**made)


def write_plain(path: Path, found: Any) -> None:
    """A dataclass as JSON. ValueError if a number is not finite."""
    text = json.dumps(asdict(found), allow_nan=False, ensure_ascii=False, indent=1)
    whole.write(path, text + "\n")


def order_sharing(record: dict[str, Any]) -> OrderSharing:
    """From what `asdict` gives."""
    heads = tuple(HeadSharing(**head) for head in record["heads"])
    return OrderSharing(**{**record, "heads": heads})
