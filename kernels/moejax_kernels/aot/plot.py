"""A picture of a schedule: slots filled per bundle, regions marked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moejax_kernels.aot.schedule import Schedule


def plot(
    schedule: Schedule,
    path: str | Path,
    counts: Mapping[str, int] | None = None,
    title: str = "",
) -> None:
    """Draws the share of slots filled over the addresses of the bundles, a row per kind of slot.

    Vertical lines begin and end loops and guards. With `counts`, the title tells the share of all
    slots of a kind that one call fills. Needs matplotlib.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    use = schedule.slots / np.maximum(schedule.capacity, 1)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(use.T, aspect="auto", interpolation="nearest", cmap="magma_r", vmin=0)
    labels = list(schedule.kinds)
    if counts is not None:
        total = schedule.bundles(counts)
        for k, (kind, filled) in enumerate(schedule.slot_use(counts).items()):
            labels[k] = f"{kind} {filled / (total * max(schedule.capacity[k], 1)):.0%}"
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("bundle")
    edges = {edge for region in schedule.root.walk() for edge in (region.start, region.stop)}
    for edge in edges - {0, len(schedule.text)}:
        axes.axvline(edge - 0.5, color="tab:blue", linewidth=0.6)
    for region in schedule.root.walk():
        if not region.children and region.path:
            middle = (region.start + region.stop) / 2
            name = region.path.rpartition("/")[2]
            axes.text(middle, -0.7, name, ha="center", va="bottom", fontsize=7)
    axes.set_title(title, loc="left", pad=14, fontsize=9)
    figure.colorbar(image, ax=axes, label="slots filled")
    figure.savefig(path, dpi=110)
