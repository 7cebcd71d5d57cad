"""What a user's mistake raises, and the checks of types that constructors share. Our own
invariants are asserts.

EngramError
|-- ConfigError      a field of a specification, preset or configuration cannot be used
|-- AddressError     token ids, histories or masks that cannot be addressed
|-- MismatchError    files that do not belong together: tokenizer, map, specification, weights
|-- DataError        text, token or checkpoint files that are missing, damaged or too short
`-- WorkerError      workers of one run that died, do not answer, or were started wrongly

UntrainedRowsWarning is the one warning: rows that will not be trained, or not as the rest is.
"""

from math import isfinite
from numbers import Integral, Real
from typing import Any


class EngramError(Exception):
    """Base of all of them; the command line prints it as one line and exits with 2."""


class ConfigError(EngramError):
    """Names the field, its value, and what would be accepted."""


class AddressError(EngramError):
    """Names the position and value of the first id that has no address."""


class MismatchError(EngramError):
    """Names both checksums, or both values, that ought to be equal."""


class DataError(EngramError):
    """Names the file or the request that cannot be served."""


class WorkerError(EngramError):
    """Names the worker that noticed, and what it waited for or was given."""


class UntrainedRowsWarning(UserWarning):
    """Names the table, and who has left, dropped or not scaled the gradient of its rows."""


def shown(value: object) -> str:
    """A value as an error shows it: on one line, and not all of a long one."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """An integer, NumPy's too. ConfigError for any other type, bool too, and below `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ConfigError(f"{name}={shown(value)}: an integer is needed")
    if least is not None and value < least:
        raise ConfigError(f"{name}={value}: {least} or more")
    return int(value)


def whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    """A tuple of integers, of a tuple or a list. ConfigError for anything else."""
    if not isinstance(values, tuple | list):
        raise ConfigError(f"{name}={shown(values)}: a tuple of integers is needed")
    return tuple(whole_number(f"{name}[{place}]", value) for place, value in enumerate(values))


def number(name: str, value: Any, least: float | None = None) -> float:
    """A finite number, NumPy's too. ConfigError for any other type, bool too, and below `least`."""
    if not isinstance(value, Real) or isinstance(value, bool) or not isfinite(value):
        raise ConfigError(f"{name}={shown(value)}: a number is needed")
    if least is not None and value < least:
        raise ConfigError(f"{name}={value}: {least:g} or more")
    return float(value)


def instance(name: str, value: Any, *kinds: type) -> None:
    """ConfigError unless the value is of one of these classes."""
    if not isinstance(value, kinds):
        wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ConfigError(f"{name}={shown(value)}: {wanted} is needed")
