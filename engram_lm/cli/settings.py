"""What several verbs share: `--set`, and how a process is prepared."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from engram_lm.errors import ConfigError, DataError


def setting(add: Callable[..., Any], example: str) -> None:
    """Adds `--set KEY=VALUE`, the way to everything that has no option of its own."""
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"any other setting: {example}",
    )


def overcommits(machine: dict[str, Any]) -> bool:
    """What `--set machine.overcommit=` says: train even where memory is too small by our estimate.
    ConfigError for another key or value."""
    for name, value in machine.items():
        if name != "overcommit" or not isinstance(value, bool):
            raise ConfigError(
                f"machine.{name}={value!r}: accepted is machine.overcommit=true or false"
            )
    return bool(machine.get("overcommit", False))


def settings(pairs: list[str], accepted: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """--set train.lr=1e-3 as {"train": {"lr": 0.001}}; values are JSON, or else text."""
    found: dict[str, dict[str, Any]] = {name: {} for name in accepted}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        group, dot, name = key.partition(".")
        if not equals or not dot or group not in accepted:
            forms = " or ".join(f"{name}.KEY=VALUE" for name in accepted)
            raise ConfigError(f"--set {pair}: {forms} is needed")
        try:
            found[group][name] = json.loads(text)
        except ValueError:
            found[group][name] = text
    return found


def train_config(config: Any, changes: dict[str, Any]) -> Any:
    """A TrainConfig with some fields changed. ConfigError on unknown ones and other types."""
    return changed_fields("train", config, changes)


def changed_fields(group: str, config: Any, changes: dict[str, Any]) -> Any:
    """A dataclass with some fields changed, which `--set` calls GROUP.FIELD; errors as above."""
    from dataclasses import fields

    names = {field.name: type(getattr(config, field.name)) for field in fields(config)}
    for name, value in changes.items():
        if name not in names:
            raise ConfigError(f"{group}.{name}: unknown; accepted are {', '.join(names)}")
        if isinstance(value, list):
            value = tuple(value)
        if names[name] is float and isinstance(value, int):
            value = float(value)
        if type(value) is not names[name]:
            raise ConfigError(f"{group}.{name}={value!r}: {names[name].__name__} is needed")
        changes[name] = value
    return replace(config, **changes)


def prepare(threads: int | None) -> Any:
    """torch, its threads set and transformers' chatter off."""
    import torch
    from transformers.utils import logging

    if threads is not None:
        if threads < 1:
            raise ConfigError(f"threads={threads}: at least 1")
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return torch


def progress_bars() -> Any:
    """Bars of tasks that have a `note`, with the time left, on standard error until they end;
    nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %  {task.fields[note]}", markup=False),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def file_bytes(path: Path) -> int:
    """Its size. DataError where there is none."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
