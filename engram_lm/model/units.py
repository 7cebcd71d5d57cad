"""Bytes and seconds as people read them."""

SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def size_text(size: float) -> str:
    """12.3 MB and the like, three digits."""
    return _scaled(size, SIZES)


def time_text(seconds: float) -> str:
    """12.3 ms and the like, three digits; seconds are the largest unit."""
    return _scaled(seconds, TIMES)


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    scale, unit = next((each for each in units if value >= each[0]), units[-1])
    digits = ",.3g" if value < 999.5 * scale else ",.0f"
    return f"{value / scale:{digits}} {unit}"
