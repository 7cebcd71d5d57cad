"""Bytes and seconds as people read them, and write them."""

from engram_lm.errors import ConfigError

SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def size_text(size: float) -> str:
    """12.3 MB and the like, three digits."""
    return _scaled(size, SIZES)


def time_text(seconds: float) -> str:
    """12.3 ms and the like, three digits; seconds are the largest unit."""
    return _scaled(seconds, TIMES)


def bytes_of(name: str, size: int | str) -> int:
    """Bytes, of a number or of a text as "2GB" or "1.5 MB". ConfigError for anything else."""
    number, unit = str(size).strip(), "B"
    for _, each in SIZES:
        if number.endswith(each):
            number, unit = number.removesuffix(each), each
            break
    scale = next(scale for scale, each in SIZES if each == unit)
    try:
        count = float(number) * scale
        if not 0 < count < 2**63:
            raise ValueError
    except ValueError:
        units = ", ".join(unit for _, unit in SIZES)
        raise ConfigError(f"{name}={size!r}: a number above 0 with one of {units}") from None
    return int(count)


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    scale, unit = next((each for each in units if value >= each[0]), units[-1])
    digits = ",.3g" if value < 999.5 * scale else ",.0f"
    return f"{value / scale:{digits}} {unit}"
