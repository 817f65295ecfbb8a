"""Numbers as readers want them; every table, sentence and label formats through here."""

from __future__ import annotations

import math

MISSING = "–"


def fixed(value: float | None, digits: int = 4) -> str:
    """A plain number with so many decimals; scientific from a million on."""
    if value is None:
        return MISSING
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3e}"
    return text.replace("-", "−")


def signed(value: float | None, digits: int = 4) -> str:
    """A number that always bears its sign."""
    text = fixed(value, digits)
    return text if value is None or math.isnan(value) or value < 0 else f"+{text}"


def with_error(value: float | None, stderr: float | None, digits: int = 4) -> str:
    """A signed number and its standard error."""
    if value is None or stderr is None:
        return signed(value, digits)
    return f"{signed(value, digits)} ± {fixed(stderr, digits)}"


def percent(fraction: float | None, digits: int = 2) -> str:
    """A share of one as per cent."""
    return MISSING if fraction is None else f"{fixed(100 * fraction, digits)} %"


def signed_percent(fraction: float | None, digits: int = 1) -> str:
    """A relative change as per cent, with its sign."""
    return MISSING if fraction is None else f"{signed(100 * fraction, digits)} %"


def count(value: float | None) -> str:
    """A whole number with thousands separated."""
    return MISSING if value is None else f"{round(value):,}"


def size(value: int | None) -> str:
    """Bytes in decimal units, three significant digits."""
    if value is None:
        return MISSING
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= scale:
            amount = value / scale
            return f"{amount:.{2 if amount < 10 else 1 if amount < 100 else 0}f} {unit}"
    return f"{value} B"


def exact_bytes(value: int | None) -> str:
    """Bytes to the last one."""
    return MISSING if value is None else f"{value:,} bytes"


def ratio(value: float | None) -> str:
    """How many times."""
    return MISSING if value is None else f"{fixed(value, 2)}×"


def short(value: float) -> str:
    """A number in the few characters that fit the cell of a heat map."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.1f}M"
    if abs(value) >= 1e3:
        return f"{value / 1e3:.1f}k" if abs(value) < 1e4 else f"{value / 1e3:.0f}k"
    if value == round(value):
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}".removeprefix("0")
