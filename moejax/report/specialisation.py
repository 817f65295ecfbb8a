"""Specialisation: which experts serve which group of text, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moejax.report.figures import drawing, label
from moejax.runs import StudyResult

MOST_LAYERS = 12
STRONGEST = 2.0  # the colour scale ends at a quarter and at four times the even share


def shares_by_layer(study: StudyResult) -> dict[int, np.ndarray]:
    """Layer -> [groups, experts] share of a group's assignments; only layers with experts."""
    layers = study.specialisation or ()
    return {i: np.asarray(share, float) for i, share in enumerate(layers) if share is not None}


def mutual_information(share_GxE: np.ndarray) -> float:
    """Bits that an assignment's expert tells of its group, groups counted equally.

    0 when all groups use the experts alike, log2(groups) when no two share an expert.
    """
    joint_GxE = share_GxE / share_GxE.sum()
    apart_GxE = joint_GxE.sum(1, keepdims=True) * joint_GxE.sum(0, keepdims=True)
    used = joint_GxE > 0
    return float(np.sum(joint_GxE[used] * np.log2(joint_GxE[used] / apart_GxE[used])))


def chosen_layers(layers: Sequence[int]) -> list[int]:
    """At most MOST_LAYERS of the layers, evenly spaced, with the first and the last."""
    if len(layers) <= MOST_LAYERS:
        return list(layers)
    places = np.unique(np.linspace(0, len(layers) - 1, MOST_LAYERS).round().astype(int))
    return [layers[place] for place in places]


def draw_specialisation(path: Path, groups: Sequence[str], shares: dict[int, np.ndarray]) -> None:
    """A panel per layer: groups by experts, coloured by share over the even share 1 / E."""
    layers = chosen_layers(sorted(shares))
    experts = max(share.shape[1] for share in shares.values())
    columns = 1 if experts > 40 else min(2 if experts > 12 else 3, len(layers))
    rows = -(-len(layers) // columns)
    height = max(0.24 * len(groups) + 0.75, 1.3) * rows + 0.4
    with drawing(path, 10.0, height, nrows=rows, ncols=columns, squeeze=False) as (figure, axes):
        image = None
        for place, layer in zip(axes.flat, layers, strict=False):
            share_GxE = shares[layer]
            with np.errstate(divide="ignore"):
                lift_GxE = np.log2(share_GxE * share_GxE.shape[1])
            image = place.imshow(
                np.clip(lift_GxE, -STRONGEST, STRONGEST),
                cmap="PuOr_r",
                vmin=-STRONGEST,
                vmax=STRONGEST,
                aspect="auto",
                interpolation="nearest",
            )
            place.grid(False)
            place.set_title(f"layer {layer}")
            first = place.get_subplotspec().is_first_col()
            place.set_yticks(
                range(len(groups)), [label(g) for g in groups] if first else [""] * len(groups)
            )
            place.xaxis.get_major_locator().set_params(integer=True)
            if place.get_subplotspec().is_last_row():
                place.set_xlabel("expert")
        for place in axes.flat[len(layers) :]:
            place.set_visible(False)
        if image is not None:
            bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=30, ticks=[-2, -1, 0, 1, 2])
            bar.ax.set_yticklabels(["≤ ¼×", "½×", "even", "2×", "≥ 4×"])
            bar.outline.set_visible(False)
