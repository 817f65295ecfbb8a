"""The section on recorded routing: how far a cache of experts would get, who follows whom."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moejax.report.figures import COLOURS, INK, drawing, file_name, label
from moejax.report.page import Page
from moejax.runs import RunFolder
from moejax.trace import (
    RoutingTrace,
    affinity,
    coactivation,
    drift,
    lift,
    popularity,
    reuse_distances,
)

STRONGEST = 2.0  # the colour scales end at a quarter and at four times the expected share
CAPTIONS = (
    "Simulated: a cache of so many of a layer's experts that drops the least recently used, tokens "
    "one at a time in the order of the text. Dotted: what routing at random would hit.",
    "Orange: seen more often than independent choices would be; purple: less often.",
    "Jensen-Shannon divergence of how often the experts are chosen, mean over layers: 0 for texts "
    "routed alike, 1 for texts that share no expert.",
)


def add_traces(page: Page, run: RunFolder) -> None:
    """A part for every trace of the run folder; nothing where none was recorded."""
    folders = sorted(run.traces.iterdir()) if run.traces.is_dir() else []
    for number, folder in enumerate(folders):
        trace = RoutingTrace.open(folder)
        if not len(trace):
            continue
        if "traces" not in page.facts:
            page.facts["traces"] = {}
            page.section("Recorded routing")
        hits_LxC = lru_hits(reuse_distances(trace))
        page.facts["traces"][folder.name] = {
            "tokens": len(trace),
            "layers": list(trace.layout.layers),
            "lru_hit_rate": hits_LxC.round(5).tolist(),
        }
        held = max(trace.layout.experts) // 2
        page.text(
            f"{folder.name}: {len(trace):,} tokens. An LRU cache of {held} experts per layer would "
            f"hit {hits_LxC[:, held].min():.1%} to {hits_LxC[:, held].max():.1%} of the uses "
            f"(simulated); traces/{folder.name} in the run folder has every choice."
        )
        names = [file_name(kind, number, folder.name) for kind in ("cache", "affinity", "drift")]
        paths = [page.plots / name for name in names]
        _draw_hits(paths[0], hits_LxC, trace)
        _draw_pairs(paths[1], trace)
        figures = [
            (paths[0], "Hit rate of an LRU cache by its size, a line per layer", CAPTIONS[0]),
            (paths[1], "Experts chosen together, and one layer after the other", CAPTIONS[1]),
        ]
        if len(trace.layout.groups) > 1:
            _draw_drift(paths[2], trace)
            figures.append((paths[2], "Divergence of routing between groups", CAPTIONS[2]))
        page.figures(figures)


def lru_hits(distances_LxD: np.ndarray) -> np.ndarray:
    """[L, E + 1]: share of uses that a cache of 0, 1, ..., E experts per layer hits.

    distances_LxD: of `reuse_distances`; its last column, first uses, hits nowhere.
    """
    uses_L = np.maximum(distances_LxD.sum(1), 1)
    within = np.cumsum(distances_LxD[:, :-1], axis=1) / uses_L[:, None]
    return np.pad(within, ((0, 0), (1, 0)))


def _draw_hits(path: Path, hits_LxC: np.ndarray, trace: RoutingTrace) -> None:
    with drawing(path, 6.4, 3.6) as (_, axes):
        for index, (layer, hits_C) in enumerate(zip(trace.layout.layers, hits_LxC, strict=True)):
            sizes = np.arange(trace.layout.experts[index] + 1)
            axes.plot(
                sizes,
                hits_C[: len(sizes)],
                color=COLOURS[index % len(COLOURS)],
                alpha=0.85,
                label=f"layer {layer}",
            )
        most = max(trace.layout.experts)
        axes.plot([0, most], [0, 1], color=INK, linestyle=":", linewidth=1)
        axes.set_xlabel("experts of a layer that fit")
        axes.set_ylabel("hit rate")
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter("{x:.0%}")
        if len(hits_LxC) <= 16:
            axes.legend(ncols=2, loc="lower right")


def _draw_pairs(path: Path, trace: RoutingTrace) -> None:
    """Lift of pairs: within the middle layer, and from it to the next."""
    counts, tokens = popularity(trace), len(trace)
    middle = (len(counts) - 1) // 2
    name = trace.layout.layers[middle]
    panels = [
        (
            f"together in layer {name}",
            lift(coactivation(trace)[middle], tokens, counts[middle], counts[middle]),
        )
    ]
    if len(counts) > 1:
        follow = lift(affinity(trace)[middle], tokens, counts[middle], counts[middle + 1])
        panels.append((f"layer {name}, then {trace.layout.layers[middle + 1]}", follow))
    with (
        drawing(path, 9.0, 4.0, ncols=len(panels), squeeze=False) as (figure, axes),
        np.errstate(divide="ignore"),
    ):
        for place, (title, ratio) in zip(axes[0], panels, strict=True):
            image = place.imshow(
                np.clip(np.log2(ratio), -STRONGEST, STRONGEST),
                cmap="PuOr_r",
                vmin=-STRONGEST,
                vmax=STRONGEST,
                interpolation="nearest",
            )
            place.grid(False)
            place.set_title(title)
            place.set_xlabel("expert")
        bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=30, ticks=[-2, -1, 0, 1, 2])
        bar.ax.set_yticklabels(["≤ ¼×", "½×", "independent", "2×", "≥ 4×"])
        bar.outline.set_visible(False)


def _draw_drift(path: Path, trace: RoutingTrace) -> None:
    groups = [label(group) for group in trace.layout.groups]
    bits_GxG = np.nanmean(drift(trace), axis=0)
    side = 1.6 + 0.45 * len(groups)
    with drawing(path, side + 1.2, side) as (figure, axes):
        image = axes.imshow(bits_GxG, cmap="Blues", vmin=0, interpolation="nearest")
        axes.grid(False)
        axes.set_xticks(range(len(groups)), groups, rotation=45, ha="right")
        axes.set_yticks(range(len(groups)), groups)
        figure.colorbar(image, ax=axes, pad=0.02, label="bits").outline.set_visible(False)
