"""Per-expert maps: what the ledger says of every expert, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path as FilePath

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path

from moejax.report.figures import FAINT, INK, QUIET, amounts, drawing
from moejax.report.numbers import short
from moejax.runs import Ledger, LedgerRow

KEPT, UNCALIBRATED, DEAD, DROPPED, ABSENT = range(5)
UNKNOWN = "#c9ced4"
UNIT_SQUARE = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5)])
MOST_ANNOTATED = 16  # experts in a row up to which cells bear their number


@dataclass(frozen=True)
class ExpertMap:
    """An arm's experts at the end of its recipe, [layers, experts]; nan where nothing is known.

    code_bits: mean over the matrices, weighted by their codes. tokens: calibration tokens.
    relative_error: mean over the matrices. state: KEPT, UNCALIBRATED, DEAD, DROPPED or ABSENT.
    layers: the layer index of each row.
    """

    arm: str
    layers: tuple[int, ...]
    code_bits: np.ndarray
    tokens: np.ndarray
    relative_error: np.ndarray
    state: np.ndarray


def expert_map(ledger: Ledger, arm: str) -> ExpertMap | None:
    """The map of an arm; None when the ledger has no expert of it."""
    cells: dict[tuple[int, int], list[LedgerRow]] = {}
    for (layer, expert, _), last in ledger.last(arm).items():
        if expert is not None:
            cells.setdefault((layer, expert), []).append(last)
    if not cells:
        return None
    layers = tuple(sorted({layer for layer, _ in cells}))
    shape = (len(layers), 1 + max(expert for _, expert in cells))
    bits, tokens, error = (np.full(shape, np.nan) for _ in range(3))
    state = np.full(shape, ABSENT)
    for (layer, expert), rows in cells.items():
        at = layers.index(layer), expert
        bits[at], tokens[at], error[at] = _mean_bits(rows), _most_tokens(rows), _mean_error(rows)
        state[at] = _state(rows)
    return ExpertMap(arm, layers, bits, tokens, error, state)


def draw_expert_map(path: FilePath, found: ExpertMap, highest_error: float) -> None:
    """Three maps of an arm: bits, calibration tokens, relative error.

    highest_error: the top of the error scale, shared by the arms of a report.
    An expert without tokens is hatched and grey in the error map: its error says nothing.
    """
    height, experts = found.state.shape
    wide = experts > MOST_ANNOTATED
    grid = {"nrows": 3} if wide else {"ncols": 3}
    tall = min(max(height * 0.3, 1.0), 3.4 if wide else 5.0) + 0.9
    size = (9.2, 3 * tall + 0.5) if wide else (11.0, tall + 0.6)
    highest_bits = np.nanmax(found.code_bits) if np.isfinite(found.code_bits).any() else 1.0
    with drawing(path, *size, **grid) as (figure, axes):
        panels = (
            ("bits per code", found.code_bits, "Blues", Normalize(0, 1.25 * highest_bits)),
            ("calibration tokens", found.tokens, "Greens", _token_scale(found.tokens)),
            ("relative error", found.relative_error, "Oranges", Normalize(0, 1.1 * highest_error)),
        )
        for place, (title, values, colours, scale) in zip(axes, panels, strict=True):
            _draw_panel(figure, place, found, title, values, colours, scale)
        keys = [
            Patch(
                facecolor=UNKNOWN,
                edgecolor=QUIET,
                hatch="////",
                label="uncalibrated: too few tokens, or not counted",
            ),
            Patch(facecolor=UNKNOWN, edgecolor=INK, hatch="xxxx", label="dead: no token"),
            Patch(facecolor=INK, label="dropped"),
            Patch(facecolor="white", edgecolor=FAINT, label="not recorded"),
        ]
        figure.legend(handles=keys, loc="outside lower center", ncols=4, fontsize=8.5)


def _draw_panel(
    figure,
    axes: Axes,
    found: ExpertMap,
    title: str,
    values: np.ndarray,
    colours: str,
    scale: Normalize,
) -> None:
    blind = np.isin(found.state, (UNCALIBRATED, DEAD)) & (title == "relative error")
    gone = found.state == DROPPED
    image = axes.imshow(
        np.ma.masked_where(blind | gone | np.isnan(values), values),
        cmap=colours,
        norm=scale,
        aspect="auto",
        interpolation="nearest",
    )
    axes.grid(False)
    axes.set_title(title)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    step = max(1, len(found.layers) // 12)
    axes.set_yticks(range(0, len(found.layers), step), [str(n) for n in found.layers[::step]])
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[attr-defined]
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=14)
    bar.outline.set_visible(False)
    amounts(bar.ax.yaxis)
    _mark(axes, found.state, blind)
    for i, j in np.ndindex(*found.state.shape):
        unseen = blind[i, j] or gone[i, j] or np.isnan(values[i, j])
        if found.state.shape[1] <= MOST_ANNOTATED and not unseen:
            ground = image.cmap(scale(values[i, j]))
            axes.text(
                j,
                i,
                short(float(values[i, j])),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if sum(ground[:3]) < 1.5 else INK,
                bbox={"facecolor": ground, "linewidth": 0, "pad": 0.8},  # keeps the hatch off
                in_layout=False,
            )


def _mark(axes: Axes, state: np.ndarray, blind: np.ndarray) -> None:
    """Marks experts that were not calibrated, are dead or are gone, over what their cells show."""
    for mark, hatch, ink in (
        (UNCALIBRATED, "////", "#5c636b99"),
        (DEAD, "xxxx", INK),
        (DROPPED, "", INK),
    ):
        cells = np.argwhere(state == mark)
        if not len(cells) or (mark == UNCALIBRATED and not blind.any()):
            continue  # the other maps show such an expert as it is: its bits, its few tokens
        face = INK if mark == DROPPED else UNKNOWN if blind.any() else "none"
        squares = [Path(np.add(UNIT_SQUARE, (j, i)), closed=True) for i, j in cells]
        # One path for all cells of a mark: thousands of hatched patches would take half a minute.
        axes.add_patch(
            PathPatch(
                Path.make_compound_path(*squares),
                facecolor=face,
                edgecolor=ink,
                hatch=hatch,
                linewidth=0.3,
                in_layout=False,
            )
        )


def _token_scale(tokens: np.ndarray) -> Normalize:
    seen = tokens[tokens > 0]
    if seen.size and seen.max() > 100 * seen.min():
        return PowerNorm(0.4, 0, 1.25 * seen.max())
    return Normalize(0, 1.25 * seen.max() if seen.size else 1.0)


def _state(rows: list[LedgerRow]) -> int:
    if any(row.dropped for row in rows):
        return DROPPED
    if any(row.dead for row in rows):
        return DEAD
    return KEPT if all(row.calibrated for row in rows) else UNCALIBRATED


def _mean_bits(rows: list[LedgerRow]) -> float:
    coded = [(row.code_bits, row.stored_bytes) for row in rows if row.code_bits is not None]
    if not coded:
        return np.nan
    if all(size and bits for bits, size in coded):
        codes = [size / bits for bits, size in coded if size]
        return float(np.average([bits for bits, _ in coded], weights=codes))
    return float(np.mean([bits for bits, _ in coded]))


def _most_tokens(rows: list[LedgerRow]) -> float:
    return float(max((row.tokens for row in rows if row.tokens is not None), default=np.nan))


def _mean_error(rows: list[LedgerRow]) -> float:
    errors = [row.relative_error for row in rows if row.relative_error is not None]
    return float(np.mean(errors)) if errors else np.nan
