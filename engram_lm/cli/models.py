"""What verbs that open models share."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engram_lm.errors import ConfigError, DataError

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")


@contextmanager
def opening(directory: Path) -> Iterator[None]:
    """One line for what transformers says of a saved model that it cannot read. DataError."""
    if not (directory / "config.json").is_file():
        raise DataError(
            f"{directory}: no config.json; `engram demo` or `engram train` makes a model"
        )
    from engram_lm.model.directory import UNREADABLE

    try:
        yield
    except UNREADABLE as error:
        raise DataError(f"{directory}: {' '.join(str(error).split())}") from error


def open_model(directory: Path, places: dict[str, Any]) -> Any:
    """A causal language model: with its memory, in these places, or one that has none.

    In float32, and said on standard error, where its own dtype is slow on this machine.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from engram_lm.model.attached import AttachedForCausalLM
    from engram_lm.precision import fast_products, opening_dtype

    config: Any = AutoConfig.from_pretrained(directory)
    options: dict[str, Any] = {}
    stored = getattr(config, "dtype", None) or _stored_dtype(directory)
    if stored is not None and opening_dtype(stored) != stored:
        options["dtype"] = opening_dtype(stored)
        if stored == torch.bfloat16 and getattr(config, "table_dtype", "") is None:
            # Rows are gathered, not multiplied: the tables need not grow.
            options["table_dtype"] = "bf16"
        print(
            f"{directory}: opened as float32, in which its {stored} weights have the same values; "
            f"{fast_products(stored, 'cpu')[1]}",
            file=sys.stderr,
        )
    if not hasattr(config, "memory_config"):
        return AutoModelForCausalLM.from_pretrained(directory, **options)
    return AttachedForCausalLM.from_pretrained(directory, **places, **options)


def _stored_dtype(directory: Path) -> Any:
    """The dtype of the first floating tensor of the weights, which transformers takes where
    config.json names none; None where there are no safetensors files."""
    import torch
    from safetensors import safe_open

    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    for path in sorted(directory.glob("*.safetensors")):
        if path.name.startswith("model"):
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    if (name := file.get_slice(key).get_dtype()) in dtypes:
                        return dtypes[name]
    return None


def open_tokenizer(directory: Path) -> Any:
    """The one that lies beside the model. DataError where there is none."""
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in _TOKENIZERS):
        raise DataError(
            f"{directory}: no tokenizer; tokenizer.save_pretrained puts it beside the model"
        )
    return AutoTokenizer.from_pretrained(directory)


def check_distinct(directories: Sequence[Path]) -> None:
    """ConfigError where two are one: a checkpoint is one seed."""
    seen: set[Path] = set()
    for directory in directories:
        if directory.resolve() in seen:
            raise ConfigError(f"{directory}: named twice; one checkpoint is one seed")
        seen.add(directory.resolve())


def memory_options(add: Callable[..., Any], *choices: str) -> None:
    """Adds `--memory` (on, disk and these) and `--memory-budget`."""
    off = "off: the backbone alone; " if "off" in choices else ""
    add(
        "--memory",
        choices=("on", *choices, "disk"),
        default="on",
        help=f"{off}disk: rows stay in the files (default: %(default)s)",
    )
    add("--memory-budget", metavar="SIZE", help="memory that rows on disk may take, as 2GB")


def memory_places(arguments: Any) -> dict[str, Any]:
    """Where `open_model` and from_pretrained are to leave the tables, after those options."""
    return {
        "memory": "disk" if arguments.memory == "disk" else None,
        "memory_budget": arguments.memory_budget,
    }
