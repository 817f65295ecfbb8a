"""The frontier of a study: what is stored against what is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from moejax.report.figures import COLOURS, INK, QUIET, drawing, finite, label

MOST_LABELS = 18


@dataclass(frozen=True)
class Point:
    """An arm in the plane of stored bytes and change of bits per byte; `base` is the dense twin.

    series: the run it belongs to, where several share the plane.
    """

    name: str
    stored_bytes: int
    bits_per_byte: float
    stderr: float | None
    base: bool = False
    series: str = ""


def draw_frontier(path: Path, points: Sequence[Point]) -> list[str]:
    """Draws the points and the line of those that no other beats; returns the names left out.

    Points that are not finite cannot be drawn and are named in the result.
    """
    shown = [point for point in points if finite([point.bits_per_byte])]
    series = list(dict.fromkeys(point.series for point in points))
    with drawing(path, 9.2, 5.2) as (figure, axes):
        axes.axhline(0, color=QUIET, linewidth=0.9)
        for i, name in enumerate(series):
            _draw_series(axes, [p for p in shown if p.series == name], COLOURS[i % len(COLOURS)])
        axes.set_xlabel("stored size (MB, 10⁶ bytes)")
        axes.set_ylabel("bits per byte above the first arm")
        _scale(axes, shown)
        _legend(axes, series)
        _name_points(figure, axes, shown)
    return [point.name for point in points if point not in shown]


def on_frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both size and loss, smallest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.stored_bytes, p.bits_per_byte)):
        if not kept or point.bits_per_byte < kept[-1].bits_per_byte:
            kept.append(point)
    return kept


def _draw_series(axes: Axes, points: list[Point], colour: str) -> None:
    best = on_frontier(points)
    axes.plot(
        [p.stored_bytes / 1e6 for p in best],
        [p.bits_per_byte for p in best],
        color=colour,
        linewidth=1.2,
        alpha=0.55,
        zorder=2,
    )
    for point in points:
        axes.errorbar(
            point.stored_bytes / 1e6,
            point.bits_per_byte,
            yerr=point.stderr if finite([point.stderr]) else None,
            fmt="*" if point.base else "o",
            markersize=15 if point.base else 6.5,
            color=INK if point.base else colour,
            markeredgecolor="white",
            markeredgewidth=0.8,
            ecolor=colour,
            elinewidth=1.1,
            capsize=3,
            zorder=4 if point.base else 3,
        )


def _scale(axes: Axes, points: Sequence[Point]) -> None:
    sizes = [point.stored_bytes for point in points if point.stored_bytes > 0]
    if len(sizes) == len(points) and max(sizes, default=0) > 4 * min(sizes, default=0):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.margins(x=0.08)
    else:
        axes.set_xlim(left=0)
    losses = np.abs([point.bits_per_byte for point in points if point.bits_per_byte])
    if len(losses) > 2 and losses.max() > 40 * np.median(losses):
        # One ruined arm must not flatten the others: linear near zero, logarithmic beyond.
        axes.set_yscale("symlog", linthresh=float(np.median(losses)))
        axes.set_ylabel("bits per byte above the first arm (logarithmic when large)")
    axes.margins(y=0.12)


def _legend(axes: Axes, series: Sequence[str]) -> None:
    axes.plot(
        [], [], "*", color=INK, markersize=12, markeredgecolor="white", label="base, as trained"
    )
    axes.plot([], [], "-", color=COLOURS[0], alpha=0.55, label="not beaten in both size and loss")
    if len(series) > 1:
        for i, name in enumerate(series):
            text = label(name).lstrip("_") or "unnamed"
            axes.plot([], [], "o", color=COLOURS[i % len(COLOURS)], label=text)
    axes.legend(loc="upper right")


def _name_points(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Writes names beside points, each at the first of eight places where it covers nothing."""
    best = {
        id(point)
        for name in {p.series for p in points}
        for point in on_frontier([p for p in points if p.series == name])
    }
    named = (
        list(points)
        if len(points) <= MOST_LABELS
        else [p for p in points if p.base or id(p) in best]
    )
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    pixels = {
        id(p): axes.transData.transform((p.stored_bytes / 1e6, p.bits_per_byte)) for p in points
    }
    taken = [_box(x - 7, y - 7, 14, 14) for x, y in pixels.values()]
    legend = axes.get_legend()
    if legend is not None:
        extent = legend.get_window_extent(renderer)
        taken.append(_box(extent.x0, extent.y0, extent.width, extent.height))
    frame = axes.get_window_extent(renderer)
    for point in sorted(named, key=lambda p: (not p.base, p.stored_bytes)):
        text = axes.annotate(
            label(point.name),
            (point.stored_bytes / 1e6, point.bits_per_byte),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=9,
            annotation_clip=False,
        )
        extent = text.get_window_extent(renderer)
        x, y = pixels[id(point)]
        places = _places(extent.width, extent.height, figure.dpi / 72)
        boxes = [_box(x + dx, y + dy, extent.width, extent.height) for dx, dy in places]
        inside = [
            i for i, box in enumerate(boxes) if box[0] >= frame.x0 and box[2] <= frame.x1
        ] or [0]
        chosen = min(inside, key=lambda i: (sum(_overlap(boxes[i], other) for other in taken), i))
        dx, dy = places[chosen]
        text.set_position((dx * 72 / figure.dpi, dy * 72 / figure.dpi))
        taken.append(boxes[chosen])


Box = tuple[float, float, float, float]


def _places(width: float, height: float, scale: float) -> list[tuple[float, float]]:
    near, far = 7 * scale, 16 * scale
    middle, left = -height / 2, -width
    return [
        (near, near / 2),
        (near, -near / 2 - height),
        (left - near, near / 2),
        (left - near, -near / 2 - height),
        (left / 2, near),
        (left / 2, -near - height),
        (near, far),
        (near, -far - height),
        (left - near, far),
        (left - near, -far - height),
        (near * 1.4, middle),
    ]


def _box(x: float, y: float, width: float, height: float) -> Box:
    return x, y, x + width, y + height


def _overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)
