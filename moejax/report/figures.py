"""What every figure shares: look, colours that colour-blind readers tell apart, safe labels."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moejax.core.atomic import write_atomically

# Okabe and Ito's palette, without its yellow, which is faint on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#4d4d4d")
STYLES = ("-", "--", ":", "-.")
INK, QUIET, FAINT = "#1c1f23", "#5c636b", "#dfe3e8"
DOTS_PER_INCH = 160
LABEL_LENGTH = 40
MOST_POINTS = 1500

_LOOK: Any = {
    "font.size": 10,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "text.color": INK,
    "text.parse_math": False,  # a name with a dollar sign is a name
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "hatch.linewidth": 0.6,
    "figure.constrained_layout.use": True,
}


@contextmanager
def drawing(path: Path, width: float, height: float, **grid: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure of so many inches and its axes; saved as PNG when all is drawn, or not at all.

    grid: arguments of `plt.subplots`.
    """
    with plt.rc_context(_LOOK), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure, axes = plt.subplots(figsize=(width, height), **grid)
        try:
            yield figure, axes
            image = io.BytesIO()
            # The constrained layout now and then cuts a label off; "tight" never does.
            options = {"bbox_inches": "tight", "pad_inches": 0.06}
            figure.savefig(image, format="png", dpi=DOTS_PER_INCH, **options)
            write_atomically(path, image.getvalue())
        finally:
            plt.close(figure)


def label(name: str) -> str:
    """A name as a figure can bear it: printable, on one line, not too long."""
    text = "".join(letter if letter.isprintable() else " " for letter in name).strip()
    return text if len(text) <= LABEL_LENGTH else text[: LABEL_LENGTH - 1] + "…"


def file_name(kind: str, number: int, name: str) -> str:
    """A file name for the figure of a thing with any name; the number keeps names apart."""
    slug = "".join(
        letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower()
    )
    return f"{kind}-{number:02d}-{slug[:40].strip('-') or 'unnamed'}.png"


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS points of a curve: evenly spaced ones, and the last."""
    x_N, y_N = np.asarray(x, float), np.asarray(y, float)
    if len(x_N) <= MOST_POINTS:
        return x_N, y_N
    keep = np.unique(np.linspace(0, len(x_N) - 1, MOST_POINTS).astype(int))
    return x_N[keep], y_N[keep]


def smoothed(y_N: np.ndarray) -> np.ndarray:
    """A moving mean over a fiftieth of the points; nan and inf are left out of it."""
    width = max(len(y_N) // 50, 1)
    finite = np.isfinite(y_N)
    total = np.cumsum(np.concatenate([[0.0], np.where(finite, y_N, 0.0)]))
    many = np.cumsum(np.concatenate([[0], finite]))
    last = np.arange(1, len(y_N) + 1)
    first = np.maximum(last - width, 0)
    with np.errstate(invalid="ignore"):
        return (total[last] - total[first]) / (many[last] - many[first])


def lines(axes: Axes, series: dict[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    """One line per series; colour and dash tell them apart."""
    for i, (name, (x, y)) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        style = STYLES[i // len(COLOURS) % len(STYLES)]
        few = len(x) <= 30
        x_N, y_N = thinned(x, y)
        axes.plot(
            x_N, y_N, color=colour, linestyle=style, marker="o" if few else None, markersize=3.5
        )
        axes.lines[-1].set_label(label(name).lstrip("_") or "unnamed")
    if len(series) > 1:
        axes.legend(ncols=1 if len(series) <= 6 else 2)


def amounts(axis: Any) -> None:
    """Ticks such as 20M for large counts."""
    axis.set_major_formatter(lambda value, _: amount(value))


def amount(value: float) -> str:
    """A count in three digits and a letter."""
    for letter, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{letter}"
    return f"{value:.3g}"


def finite(values: Sequence[float | None]) -> bool:
    """Whether every value is a finite number."""
    return all(value is not None and math.isfinite(value) for value in values)
