"""Parts of a model that keep their values while the rest is trained."""

from torch import nn

from engram_lm.errors import ConfigError
from engram_lm.memory.fuse import Fuse
from engram_lm.memory.table import Table


def freeze(model: nn.Module, names: tuple[str, ...]) -> None:
    """Takes parts out of training: they get no gradient, no moments and no update.

    Accepted are `tables` (the rows of all layers), `tables.1` (those of layer 1), `fusion` (what
    turns rows into an update) and `backbone` (all the rest). ConfigError for another name,
    or where nothing is left to train.
    """
    parts = _parts(model)
    for name in names:
        if name not in parts:
            raise ConfigError(f"frozen={name!r}: accepted are {', '.join(parts)}")
    for name in names:
        for parameter in parts[name]:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"frozen={', '.join(names)}: nothing is left to train")


def _parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    tables = {
        f"tables.{name.rpartition('.')[2]}": module.weight
        for name, module in model.named_modules()
        if isinstance(module, Table)
    }
    fusion = [p for m in model.modules() if isinstance(m, Fuse) for p in m.parameters()]
    memory = {*tables.values(), *fusion}
    backbone = [parameter for parameter in model.parameters() if parameter not in memory]
    if not tables:
        return {"backbone": backbone}
    rows = {name: [weight] for name, weight in tables.items()}
    return {"backbone": backbone, "fusion": fusion, "tables": [*tables.values()], **rows}
