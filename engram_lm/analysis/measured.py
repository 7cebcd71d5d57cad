"""What is read off one checkpoint. Those of several, measured at any time, make an analysis.

Shapes: K places of the stream, N texts, T tokens, A layers, I inputs, D width.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engram_lm import whole
from engram_lm.analysis.ablation_losses import AblationLoss
from engram_lm.analysis.findings import GateScore, NgramGate, order_sharing
from engram_lm.analysis.gates import GateTrace
from engram_lm.analysis.logit_lens import MEASURES, LogitLens, Place
from engram_lm.analysis.row_sharing import OrderSharing
from engram_lm.analysis.suite_ablation import PartScore
from engram_lm.errors import DataError

Made = TypeVar("Made")
Nats = npt.NDArray[np.float64]


@dataclass(kw_only=True)
class Measured:
    """Parts that were not measured are None."""

    scores: list[GateScore] | None = None
    traces: list[GateTrace] = field(default_factory=list)
    highest: list[NgramGate] = field(default_factory=list)
    lowest: list[NgramGate] = field(default_factory=list)
    lens: LogitLens | None = None
    lens_off: LogitLens | None = None
    """With memory off; None for a model without one."""
    losses_T: Nats | None = None
    losses_off_T: Nats | None = None
    """With memory off; None for a model without one."""
    bands_OT: npt.NDArray[np.int8] | None = None
    """Order -> the tokens' bands in what this checkpoint was trained on."""
    states_AID: torch.Tensor | None = None
    where: str = ""
    """At which tokens the states were taken."""
    addresses: list[OrderSharing] | None = None
    ablation: list[AblationLoss] | None = None
    suites: list[PartScore] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """One safetensors file, aside first, then renamed. States are rounded to half precision.
        DataError where they do not fit it, ValueError for a number that is not finite."""
        arrays: dict[str, torch.Tensor] = {}
        lenses = {"lens": self.lens, "lens_off": self.lens_off}
        for which, lens in lenses.items():
            for norm in ("normed", "plain") if lens is not None else ():
                values = getattr(lens, norm)
                names = {f"{which}.{norm}.{name}": torch.tensor(values[name]) for name in MEASURES}
                arrays |= names
        for name, losses_T in (("losses", self.losses_T), ("losses_off", self.losses_off_T)):
            if losses_T is not None:
                arrays[name] = torch.tensor(losses_T).float()  # as they were computed
        if self.bands_OT is not None:
            arrays["bands"] = torch.from_numpy(self.bands_OT)
        if self.states_AID is not None:
            arrays["states"] = self.states_AID.half()
            if not torch.isfinite(arrays["states"]).all():
                raise DataError(f"{path}: some hidden states are beyond half precision")
        plain = {
            "scores": self.scores,
            "traces": [asdict(trace) for trace in self.traces],
            "highest": self.highest,
            "lowest": self.lowest,
            "places": {
                which: None if lens is None else [asdict(each) for each in lens.places]
                for which, lens in lenses.items()
            },
            "where": self.where,
            "addresses": _plain(self.addresses),
            "ablation": _plain(self.ablation),
            "suites": self.suites,
            "seconds": self.seconds,
        }
        with whole.aside(path) as partial:
            save_file(arrays, partial, metadata={"plain": json.dumps(plain, allow_nan=False)})

    @classmethod
    def load(cls, path: Path) -> "Measured":
        """What `save` wrote. DataError where that cannot be read."""
        try:
            with safe_open(path, "pt") as file:
                plain = json.loads((file.metadata() or {})["plain"])
                names = file.keys()
                arrays = {name: file.get_tensor(name) for name in names}
            return cls._read(plain, arrays)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise DataError(f"{path}: nothing measured can be read ({error})") from error

    @classmethod
    def _read(cls, plain: dict[str, Any], arrays: dict[str, torch.Tensor]) -> "Measured":
        def lens(which: str) -> LogitLens | None:
            if (places := plain["places"][which]) is None:
                return None
            values = {
                norm: {name: arrays[f"{which}.{norm}.{name}"].numpy() for name in MEASURES}
                for norm in ("normed", "plain")
            }
            return LogitLens(places=tuple(Place(**each) for each in places), **values)

        def losses(name: str) -> Nats | None:
            return arrays[name].double().numpy() if name in arrays else None

        return cls(
            scores=plain["scores"],
            traces=[GateTrace(**trace) for trace in plain["traces"]],
            highest=plain["highest"],
            lowest=plain["lowest"],
            lens=lens("lens"),
            lens_off=lens("lens_off"),
            losses_T=losses("losses"),
            losses_off_T=losses("losses_off"),
            bands_OT=arrays["bands"].numpy() if "bands" in arrays else None,
            states_AID=arrays["states"].float() if "states" in arrays else None,
            where=plain["where"],
            addresses=_each(order_sharing, plain["addresses"]),
            ablation=_each(lambda part: AblationLoss(**part), plain["ablation"]),
            suites=plain["suites"],
            seconds=plain["seconds"],
        )


def _each(make: Callable[[dict[str, Any]], Made], records: list[Any] | None) -> list[Made] | None:
    return None if records is None else [make(record) for record in records]


def _plain(values: list[OrderSharing] | list[AblationLoss] | None) -> list[object] | None:
    return None if values is None else [asdict(value) for value in values]
